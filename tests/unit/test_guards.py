"""Guards: six kinds of failure pause soon, healthy campaigns never, missing metrics are ignored."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError

import pytest

from rayhf.config.guards import GuardsConfig
from rayhf.config.load import dump_config, load_config
from rayhf.errors import ConfigError
from rayhf.monitoring.guards import Alarm, check_guards

DEFAULT = GuardsConfig()
PATIENCE = 5
"""Iterations (or evaluations) from the crossing of the threshold, without noise, to the pause."""


def steady(iterations, *, evaluate_every=5, seed=0, rise=0.0, noise=1.0):
    """Make the metrics of a campaign that is constant or whose rewards rise."""
    rng = random.Random(seed)
    lines = [{"iteration": 0, "eval/t/sampled": 0.3, "eval/t/reference_kl": 0.0}]
    for i in range(1, iterations + 1):
        gained = rise * (1 - math.exp(-i / 40))
        lines.append(
            {
                "iteration": i,
                "rollout/length_mean": 200 * (1 + 0.05 * noise * rng.gauss(0, 1)),
                "rollout/truncated": abs(0.02 * noise * rng.gauss(0, 1)),
                "scorer/reward_mean": 0.3 + gained + 0.02 * noise * rng.gauss(0, 1),
                "scorer/reward_std": 0.45,
                "selection/no_signal": 14 / 64,
                "learner/steps": 1,
                "staleness/max": 0.0,
                "policy/entropy": 0.8 * (1 + 0.05 * noise * rng.gauss(0, 1)),
                "reference/kl": 2 + noise * rng.gauss(0, 1),
                "rollout/mismatch_kl": 0.001 * (1 + noise * rng.gauss(0, 1)),
            }
        )
        if i % evaluate_every == 0:
            lines[-1] |= {
                "eval/t/sampled": 0.3 + 0.8 * gained + 0.02 * noise * rng.gauss(0, 1),
                "eval/t/reference_kl": 3.0,
            }
    return lines


def replayed(lines, config=DEFAULT):
    """Return every alarm, line by line, as in a campaign."""
    return [
        alarm for end in range(1, len(lines) + 1) for alarm in check_guards(lines[:end], config)
    ]


def first_pause(lines, guard, config=DEFAULT):
    """Return the iteration of the first pause, which must be `guard`'s."""
    pauses = [alarm for alarm in replayed(lines, config) if alarm.level == "pause"]
    assert pauses and pauses[0].guard == guard, pauses[:3]
    return pauses[0].iteration


def spoiled(name, curve, *, iterations=80, since=20, seed=1, **line):
    """Make a constant campaign whose metric becomes curve(iterations since `since`), with noise."""
    rng, lines = random.Random(seed), steady(iterations, seed=seed)
    for i in range(1, iterations + 1):
        lines[i] |= line
        if i > since:
            lines[i][name] = curve(i - since) * (1 + 0.03 * rng.gauss(0, 1))
    return lines


PATHOLOGIES = {
    "kl": ("reference/kl", lambda t: 2 * math.exp(t / 6), lambda v: v > 100),
    "entropy": ("policy/entropy", lambda t: 0.8 * math.exp(-t / 10), lambda v: v < 0.2),
    "truncated": ("rollout/truncated", lambda t: min(0.03 * t, 1.0), lambda v: v > 0.5),
    "length": ("rollout/length_mean", lambda t: 200 * math.exp(t / 12), lambda v: v > 400),
    "mismatch": ("rollout/mismatch_kl", lambda t: 0.001 * math.exp(t / 5), lambda v: v > 0.1),
}


@pytest.mark.parametrize("guard", PATHOLOGIES)
@pytest.mark.parametrize("seed", range(3))
def test_diverging_metric_pauses_soon_after_its_threshold(guard, seed):
    name, curve, beyond = PATHOLOGIES[guard]
    crossing = 20 + next(t for t in range(1, 61) if beyond(curve(t)))
    lines = spoiled(name, curve, seed=seed)
    assert crossing - 1 <= first_pause(lines, guard) <= crossing + PATIENCE
    warned = [a.iteration for a in replayed(lines) if (a.guard, a.level) == (guard, "warn")]
    assert warned and warned[0] < crossing


@pytest.mark.parametrize("seed", range(5))
def test_reward_up_and_held_out_down_pauses(seed):
    rng, lines = random.Random(seed), steady(200, seed=seed, rise=0.5)
    for i in range(101, 201):
        lines[i]["scorer/reward_mean"] = 0.75 + 0.003 * (i - 100) + 0.02 * rng.gauss(0, 1)
        if "eval/t/sampled" in lines[i]:
            lines[i]["eval/t/sampled"] = 0.67 - 0.006 * (i - 100) + 0.005 * rng.gauss(0, 1)
    assert 100 < first_pause(lines, "reward_gap") <= 100 + 5 * PATIENCE


def test_training_scorer_on_held_out_samples_is_preferred():
    lines = steady(60, noise=0.0)
    for i in range(5, 61, 5):
        lines[i] |= {"eval/t/sampled": 0.5 - 0.002 * i, "eval/t/reward": 0.3 + 0.01 * i}
    assert first_pause(lines, "reward_gap") == 30
    for i in range(5, 61, 5):
        lines[i]["eval/t/reward"] = (
            0.3  # nothing is gained: the policy is worse, but it exploits no scorer
        )
    assert replayed(lines) == []


BAD_ROUNDS = [
    ("reference/kl", 500.0),
    ("policy/entropy", 0.01),
    ("rollout/truncated", 0.9),
    ("rollout/length_mean", 900.0),
    ("rollout/length_mean", 5.0),
    ("rollout/mismatch_kl", 1.0),
    ("pairs/kept", 0.0),
    ("eval/t/sampled", 0.0),
]
"""One metric in one iteration, as after a bad batch."""


@pytest.mark.parametrize("seed", range(20))
def test_healthy_campaign_never_pauses(seed):
    rng = random.Random(1000 + seed)
    lines = steady(
        300, seed=seed, rise=rng.choice([0.0, 0.2, 0.6]), evaluate_every=rng.choice([2, 5, 10])
    )
    length, kl, narrow = rng.choice([0.7, 1.0, 1.8]), rng.uniform(0, 20), rng.uniform(0.35, 1.1)
    bad = set(rng.sample(range(4, 300, 4), 15))
    for i, line in enumerate(lines[1:], start=1):
        done = i / len(lines)
        line["rollout/length_mean"] *= length**done
        line["reference/kl"] += kl * done
        line["policy/entropy"] *= narrow**done
        if i in bad:
            name, value = rng.choice(BAD_ROUNDS)
            line |= {name: value} if name in line else {}
    missing = rng.choice(
        [
            None,
            "policy/entropy",
            "reference/kl",
            "rollout/mismatch_kl",
            "scorer/reward_mean",
            "eval/t/sampled",
        ]
    )
    lines = [{k: v for k, v in line.items() if k != missing} for line in lines]
    assert [a for a in replayed(lines) if a.level == "pause"] == []


# --------------------------------------------------------------------------- thresholds and windows


def short(name, *values, **line):
    return [{"iteration": i, name: value, **line} for i, value in enumerate(values)]


def levels(lines, **guards):
    return {a.guard: a.level for a in check_guards(lines, GuardsConfig.model_validate(guards))}


def test_one_outlier_warns_and_two_of_three_pause():
    assert levels(short("reference/kl", 1, 1, 500)) == {"kl": "warn"}
    assert levels(short("reference/kl", 500, 1, 500)) == {"kl": "pause"}
    assert levels(short("reference/kl", 500, 500, 1)) == {}  # it has recovered
    assert levels(short("reference/kl", 500, 500)) == {"kl": "warn"}  # too few values for a pause
    assert levels(short("eval/t/reference_kl", 500, 500, 500)) == {"kl": "pause"}


def test_thresholds_of_the_kl_grow_with_the_length_of_responses():
    lines = short("reference/kl", 450, 450, 450, **{"rollout/length_mean": 2000.0})
    assert levels(lines) == {"kl": "warn"}
    assert levels(lines, kl={"tokens": 2000}) == {"kl": "pause"}
    assert levels(short("reference/kl", 501, 501, 501, **{"rollout/length_mean": 2000.0})) == {
        "kl": "pause"
    }
    evaluated = {"eval/t/length": 2000.0, "rollout/length_mean": 10.0}
    assert levels(short("eval/t/reference_kl", 199, 199, 199, **evaluated)) == {}


def test_null_disables_a_threshold():
    lines = short("reference/kl", 500, 500, 500)
    assert levels(lines, kl={"pause": None}) == {"kl": "warn"}
    assert levels(lines, kl={"warn": None}) == {"kl": "pause"}
    assert levels(lines, kl={"warn": None, "pause": None}) == {}
    assert levels(lines, kl={"warn": 600, "pause": 1000}) == {}


def test_truncation_from_the_start_does_not_pause():
    assert levels(short("rollout/truncated", 0.6, 0.7, 0.6, 0.8, 0.9, 0.9)) == {}
    assert levels(short("rollout/truncated", 0.3, 0.3, 0.3, 0.55, 0.55, 0.55)) == {}
    assert levels(short("rollout/truncated", 0.3, 0.3, 0.3, 0.7, 0.7)) == {"truncated": "pause"}
    assert levels(short("rollout/truncated", 0.0, 0.0, 0.0, 0.3, 0.3)) == {"truncated": "warn"}
    assert (
        levels(short("rollout/truncated", 0.0, 0.0, 0.0, 0.3, 0.3), truncated={"warn": 0.4}) == {}
    )


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "no completion contains a stop token: .* rollout.stop"),
        ({"rollout/thinking_unfinished": 0.5}, "no completion contains a stop token"),
        ({"rollout/thinking_unfinished": 1.0}, "no completion ended its thinking: .*thinking.end"),
    ],
)
def test_total_truncation_is_explained_in_the_first_iteration(metrics, expected):
    line = {"iteration": 1, "rollout/truncated": 1.0, **metrics}
    (alarm,) = check_guards([line], DEFAULT)
    assert (alarm.guard, alarm.level) == ("truncated", "warn")
    assert re.search(f"rollout/truncated is 100%: {expected}", alarm.message)
    line["rollout/truncated"] = 0.9
    assert check_guards([line], DEFAULT) == []


def test_length_is_compared_over_twenty_iterations():
    assert levels(short("rollout/length_mean", *[100] * 5, 160)) == {"length": "warn"}
    assert levels(short("rollout/length_mean", *[100] * 5, 250, 250)) == {"length": "pause"}
    assert levels(short("rollout/length_mean", *[100] * 5, 49, 49)) == {"length": "warn"}
    assert levels(short("rollout/length_mean", *[100] * 5, 20, 20)) == {"length": "pause"}
    # 20 times longer, but in 200 iterations.
    assert levels(short("rollout/length_mean", *[100 * 1.015**i for i in range(200)])) == {}
    assert levels(
        short("rollout/length_mean", *[100 * 1.015**i for i in range(200)]),
        length={"iterations": 60},
    ) == {"length": "pause"}


def test_falling_entropy_of_a_learning_policy_does_not_pause():
    lines = [
        {
            "iteration": i,
            "policy/entropy": 1.0 - 0.03 * i,
            "scorer/reward_mean": 0.2 + 0.02 * i,
            "scorer/reward_std": 0.4,
        }
        for i in range(30)
    ]
    assert levels(lines) == {"entropy": "warn"}
    assert levels(lines, entropy={"unless_gain": None}) == {"entropy": "pause"}
    assert levels([{**line, "scorer/reward_mean": 0.2} for line in lines]) == {"entropy": "pause"}
    lost = [
        {**line, "scorer/reward_mean": 0.9 - 0.02 * max(i - 10, 0) if i > 3 else 0.2}
        for i, line in enumerate(lines)
    ]
    assert levels(lost) == {"entropy": "pause"}
    stuck = [{**line, "scorer/reward_mean": 0.2} for line in lines]
    assert check_guards(stuck, DEFAULT, muted={"entropy"}) == []


def test_drift_of_stale_completions_is_no_mismatch():
    drifting = short("rollout/mismatch_kl", 0.03, 0.04, 0.03, 0.2, 0.2)
    assert levels(drifting) == {"mismatch": "pause"}
    stale = [{**line, "staleness/max": 1.0} for line in drifting]
    assert levels(stale) == {}
    assert levels([{**line, "pairs/earlier": 4.0} for line in drifting]) == {}
    assert levels(stale, mismatch={"drift": 3}) == {"mismatch": "pause"}
    # k1 over pairs has either sign.
    negative = short("rollout/mismatch_kl", 0.0, 0.0, 0.0, -0.2, -0.2)
    assert levels(negative) == {"mismatch": "pause"}


def test_ten_iterations_without_signal_pause():
    lines = [{"iteration": i, "selection/no_signal": 0.95} for i in range(10)]
    assert levels(lines[:9]) == {"no_signal": "warn"}
    assert levels(lines) == {"no_signal": "pause"}
    once = {"iteration": 4, "selection/no_signal": 0.1}
    assert levels([*lines[:4], once, *lines[5:]]) == {"no_signal": "warn"}


def test_missing_and_non_finite_metrics_are_ignored():
    assert check_guards([], DEFAULT) == []
    assert check_guards([{}], DEFAULT) == []
    assert levels(short("reference/kl", 500, 500, math.nan)) == {}
    assert levels(short("reference/kl", 500, math.nan, 500, math.inf, 500)) == {"kl": "pause"}
    assert levels([*short("reference/kl", 500, 500, 500), {"iteration": 3}]) == {}
    for name in steady(10)[-1]:
        broken = [{**line, name: math.nan} if name != "iteration" else line for line in steady(10)]
        assert replayed(broken) == []


def test_iterations_of_the_baseline_are_not_checked_against_it():
    for value in (1e-6, 0.5, 0.99):
        assert (
            levels(short("policy/entropy", value, value))
            == levels(short("rollout/truncated", value, value))
            == {}
        )
    assert replayed(short("rollout/length_mean", 1, 50, 2)) == []


def test_only_window_and_beginning_are_read():
    class Counting(Sequence):  # iterates, either way, by its items
        read = 0

        def __len__(self):
            return len(lines)

        def __getitem__(self, index):
            Counting.read += 1
            return lines[index]

    lines = steady(2000)
    assert check_guards(Counting(), DEFAULT) == check_guards(lines, DEFAULT)
    assert 0 < Counting.read < 300


def test_alarm_names_metric_value_threshold_and_remedy():
    (alarm,) = check_guards(short("reference/kl", 120, 120, 123.4), DEFAULT)
    assert (alarm.guard, alarm.level, alarm.iteration) == ("kl", "pause", 2)
    assert "\n" not in alarm.message
    for part in (
        "reference/kl is 123.4 nats per response",
        "guards.kl.pause = 100",
        "learner.lr",
        "rayhf unpause RUN",
    ):
        assert part in alarm.message
    with pytest.raises(FrozenInstanceError):
        alarm.level = "warn"
    assert alarm == Alarm("kl", "pause", 2, alarm.message)


# ------------------------------------------------------------------------------------------- config

MINIMAL = {
    "run": {"dir": "r", "iterations": 3},
    "policy": {"model": "m"},
    "prompts": {"train": "t"},
    "algorithm": {"type": "online_dpo"},
    "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
}


def test_guards_are_a_section_of_the_campaign(tmp_path):
    assert load_config(MINIMAL).guards == DEFAULT
    config = load_config(
        {**MINIMAL, "guards": {"kl": {"pause": None}, "length": {"iterations": 5}}}
    )
    assert (config.guards.kl.pause, config.guards.length.iterations) == (None, 5)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "guards",
    [
        {"kl": {"warn": 50, "pause": 40}},
        {"entropy": {"warn": 0.2, "pause": 0.3}},
        {"length": {"warn_shrunk": 0.2, "pause_shrunk": 0.3}},
        {"length": {"warn": 0.9}},
        {"truncated": {"pause": 50}},
        {"reward_gap": {"warn": 1}},
        {"kl": {"warn": float("nan")}},
        {"kll": {}},
    ],
)
def test_invalid_thresholds_are_refused(guards):
    with pytest.raises(ConfigError, match="guards"):
        load_config({**MINIMAL, "guards": guards})
