"""Preference and self-play algorithms through the real controller with fake roles."""

import asyncio
import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeChat, FakeLearner, FakeRollout, FakeScorer, make_prompts
from scripted_spar import make_completion

from rayhf.algorithms.base import SelectionContext, needs_frozen_reference
from rayhf.algorithms.sppo import SPPOConfig, log_odds
from rayhf.config.load import load_config
from rayhf.config.registry import ALGORITHMS
from rayhf.data.preferences import encode_pairs, load_pairs
from rayhf.errors import ConfigError
from rayhf.types import Compared, Failed, Invalid, Sampling


def write_pairs(tmp_path, rows=None):
    path = tmp_path / "pairs.jsonl"
    rows = rows or [
        {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def give(algorithm, path):
    algorithm.give(encode_pairs(load_pairs(path, key="k").pairs, FakeChat(), key="k"))
    return algorithm


LOOPS = {
    "iterative_dpo": {"samples": 4, "earlier": [0.5], "disjoint_iterations": False},
    "sppo": {"samples": 4, "eta": 2.0},
    "inpo": {"samples": 4},
    "mnpo": {"samples": 4, "population": {"size": 2}},
    "nash_md": {"samples": 4},
    "xpo": {},
    "dno": {"samples": 4, "disjoint_iterations": False, "min_margin": 0.1},
    "hypo": {"samples": 3},
    "tpo": {"iterations": 2, "depth": 1},
    "online_kto": {"samples": 3},
}


def config_of(name, tmp_path, **more):
    algorithm = {"type": name, **LOOPS[name]}
    if name == "hypo":
        algorithm["offline"] = {"path": str(write_pairs(tmp_path))}
    return make_config(tmp_path, algorithm=algorithm, **more)


def run_with_pairs(config, **roles):
    return run_campaign(
        config,
        pairs=config.algorithm.offline.path if config.algorithm.type == "hypo" else None,
        **roles,
    )


@pytest.mark.parametrize("name", LOOPS)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, broken = config_of(name, tmp_path / "a"), config_of(name, tmp_path / "b")
    first = run_with_pairs(whole)
    with pytest.raises(RuntimeError, match="killed"):
        run_with_pairs(broken, learner=FakeLearner(fail_at=3))
    second = run_with_pairs(broken)
    assert metrics_of(whole) == metrics_of(broken)
    assert second.learners["policy"].steps == first.learners["policy"].steps == 4
    for folder in ("samples", "examples"):
        for file in sorted((whole.run.dir / folder).glob("*.parquet")):
            assert file.read_bytes() == (broken.run.dir / folder / file.name).read_bytes(), (
                file.name
            )


def test_iterative_dpo_mixes_in_earlier_and_given_pairs(tmp_path):
    algorithm = {
        "type": "iterative_dpo",
        "samples": 4,
        "earlier": [1.0, 0.5],
        "disjoint_iterations": False,
    }
    algorithm["offline"] = {"path": str(write_pairs(tmp_path)), "share": 0.5}
    config = make_config(tmp_path, algorithm=algorithm)
    roles = run_campaign(config, pairs=tmp_path / "pairs.jsonl")
    lines = metrics_of(config)[1:]
    kept = [int(m["pairs/kept"]) for m in lines]
    assert lines[0]["pairs/earlier"] == 0 and lines[1]["pairs/earlier"] == min(kept[0], kept[1])
    assert [m["pairs/given"] for m in lines] == [2, 2, 2, 2]
    batches = roles.learners["policy"].batches
    given = [
        e.rows[0].response_ids.tobytes() for b in batches for e in b.examples if e.scalars["given"]
    ]
    assert len(given) == 8 and len(set(given[:6])) == 6  # nothing twice before everything was seen
    assert all(
        math.isnan(e.rows[0].tokens["behavior_logp"][0])
        for b in batches
        for e in b.examples
        if e.scalars["given"]
    )
    fresh = [e for e in batches[1].examples if not e.iterations_back and not e.scalars["given"]]
    earlier = [e for e in batches[1].examples if e.iterations_back]
    # Examples mixed into an iteration are not passed on as its own.
    for before, now in itertools.pairwise(batches):
        own = {
            e.rows[0].response_ids.tobytes()
            for e in before.examples
            if not e.iterations_back and not e.scalars["given"]
        }
        assert {
            e.rows[0].response_ids.tobytes() for e in now.examples if e.iterations_back == 1
        } <= own
    assert {e.iterations_back for b in batches[2:] for e in b.examples} == {
        0,
        1,
        2,
    }
    assert len(fresh) == kept[1] and {e.rows[0].response_ids.tobytes() for e in earlier} <= {
        e.rows[0].response_ids.tobytes() for e in batches[0].examples
    }


def test_learner_is_its_own_previous_reference(tmp_path):
    config = make_config(
        tmp_path, algorithm={"type": "sppo", "samples": 4, "eta": 2.0, "train_on": "all"}
    )
    assert not needs_frozen_reference(ALGORITHMS.build(config.algorithm))
    roles = run_campaign(config, reference=None)
    rows = [
        row for batch in roles.learners["policy"].batches for e in batch.examples for row in e.rows
    ]
    assert all((row.tokens["ref_logp"] == row.tokens["old_logp"]).all() for row in rows)
    assert {round(row.scalars["target"], 6) for row in rows} != {0.0}
    assert not config.algorithm.reference.model_copy(update={"every": 2}).is_learner


@pytest.mark.parametrize("target", ["soft", "single", "hard"])
def test_sppo_targets(tmp_path, target):
    config = make_config(
        tmp_path, algorithm={"type": "sppo", "samples": 4, "eta": 2.0, "target": target}
    )
    rows = [e.rows for b in run_campaign(config).learners["policy"].batches for e in b.examples]
    for best, worst in rows:
        if target == "single":  # in a cycle the best on the whole may lose to the worst
            assert best.scalars["target"] == -worst.scalars["target"] and abs(
                best.scalars["target"]
            ) in (0.0, 0.4)
            continue
        expected = {"soft": best.scalars["score"] - 0.5, "hard": 0.5}[target]
        assert best.scalars["target"] == pytest.approx(expected) and worst.scalars["target"] < 0
    samples = pq.read_table(config.run.dir / "samples/iteration-000001.parquet").to_pylist()
    assert all(
        len(s["wins"]) == 4 and s["score"] == pytest.approx(sum(s["wins"]) / 4) for s in samples
    )


@pytest.mark.parametrize("target", ["soft", "single"])
def test_gpo_regresses_onto_preference_scores(tmp_path, target):
    """Zhang et al. 2024: the mean score, log-odds of P(win), against the policy's samples."""
    settings = {"payoff": "log_odds", "target": target}
    algorithm = ALGORITHMS.build(SPPOConfig(samples=3, eta=2.0, **settings))
    score = np.array([[0.0, 2.0, -1.0], [-2.0, 0.0, 0.5], [1.0, -0.5, 0.0]])  # cyclic
    completions = [make_completion(text, index=i) for i, text in enumerate("abc")]

    class Context:
        async def sample(self, n):
            return completions

        async def compare(self, completions):
            return Compared(win=1 / (1 + np.exp(-score)), source="pairwise")

    group = asyncio.run(algorithm.explore(make_prompts(1)[0], Context()))
    context = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=4))
    (example,) = algorithm.select([group], context).examples
    assert [row.sample for row in example.rows] == [0, 1]
    targets = [row.scalars["target"] for row in example.rows]
    expected = {"soft": [1 / 3, -1.5 / 3], "single": [2.0, -2.0]}[target]
    assert targets == pytest.approx(expected)
    assert algorithm.loss().eta == 2.0


def test_scores_of_certain_verdicts_are_bounded():
    odds = log_odds([[0.5, 1.0], [0.0, np.nan]])
    assert odds[:, 0].tolist() == pytest.approx([0.0, -10.0]) and odds[0, 1] == pytest.approx(10.0)
    assert np.isnan(odds[1, 1])


def test_sppo_refuses_targets_that_completions_lack(tmp_path):
    algorithm = {"type": "sppo", "target": "hard", "train_on": "all"}
    with pytest.raises(ConfigError, match="target hard"):
        make_config(tmp_path, algorithm=algorithm)
    algorithm = {"type": "sppo", "target": "hard", "payoff": "log_odds"}
    with pytest.raises(ConfigError, match="log_odds expects soft or single"):
        make_config(tmp_path, algorithm=algorithm)


@pytest.mark.parametrize("outcome", [Invalid(reason="no verdict"), Failed(reason="too late")])
@pytest.mark.parametrize("name", ["sppo", "inpo"])
def test_completion_without_comparison_never_trains(tmp_path, name, outcome):
    config = config_of(
        name,
        tmp_path,
        scorer={
            "train": [{"type": "rule", "function": "a:b"}],
            "max_failed": 1.0,
            "evaluate": None,
        },
    )
    learner = FakeLearner()

    class Mute(FakeScorer):
        async def compare(self, requests):
            return [outcome for _ in requests]

    run_with_pairs(config, scorer=Mute(), learner=learner)
    counted = "scorer/invalid" if isinstance(outcome, Invalid) else "scorer/failed"
    assert (
        learner.steps == 0
        and metrics_of(config)[1][counted] == 16
        and metrics_of(config)[1]["learner/steps"] == 0
    )


def test_ties_are_dropped_and_counted(tmp_path):
    config = config_of("sppo", tmp_path)

    class Even(FakeScorer):
        async def compare(self, requests):
            import numpy as np

            wins = [np.full((len(r.completions),) * 2, 0.5) for r in requests]
            return [Compared(win=win, source="pairwise") for win in wins]

    learner = FakeLearner()
    run_with_pairs(config, scorer=Even(), learner=learner)
    assert learner.steps == 0 and metrics_of(config)[1]["sppo/ties"] == 4


def test_hypo_takes_pairs_and_samples_in_every_step(tmp_path):
    config = config_of("hypo", tmp_path, learner={"prompts_per_step": 2})
    batches = run_with_pairs(config).learners["policy"].batches
    assert len(batches) == 8
    for batch in batches:
        assert {e.scalars["pair"] for e in batch.examples} == {0.0, 1.0}
        assert all(len(e.rows) == (2 if e.scalars["pair"] else 3) for e in batch.examples)


def test_semi_online_dpo_keeps_the_generating_weights_for_several_steps(tmp_path):
    config = make_config(
        tmp_path,
        run={"iterations": 2},
        prompts={"train": "t", "batch": 12},
        learner={"prompts_per_step": 4},
    )
    rollout = FakeRollout()
    learner = run_campaign(config, rollout=rollout, heldout=()).learners["policy"]
    assert learner.steps == 6 and rollout.version == 2
    trained = [e.rows[0].prompt_id for batch in learner.batches[:3] for e in batch.examples]
    assert len(set(trained)) == len(trained) <= 12  # every prompt in one step only
    for iteration in (1, 2):
        file = config.run.dir / f"samples/iteration-{iteration:06d}.parquet"
        versions = pq.read_table(file, columns=["policy_version"])["policy_version"].to_pylist()
        assert set(versions) == {iteration - 1}


def test_disjoint_iterations_are_guaranteed_or_refused(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "iterative_dpo"})
    with pytest.raises(ConfigError, match=r"16, but prompts.train has 12; expected"):
        config.algorithm.check_prompts(config, make_prompts(12))
    config.algorithm.check_prompts(config, make_prompts(16))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "a", "chosen": "b"}], "row 1: expected `rejected`"),
        ([{"chosen": "b", "rejected": "c"}], "expected a `prompt` with it"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}], "margin"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "x"}], "finite number"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "equal texts"),
    ],
)
def test_bad_pairs_file_is_refused_by_row(tmp_path, rows, problem):
    with pytest.raises(ConfigError, match=problem):
        load_pairs(write_pairs(tmp_path, rows), key="algorithm.offline.path")


def test_equal_completions_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    found = load_pairs(write_pairs(tmp_path, rows), key="k")
    assert len(found.pairs) == 1 and found.identical == 1
    with pytest.raises(ConfigError, match="pair 1 has"):
        encode_pairs(
            [
                found.pairs[0].__class__(
                    messages=found.pairs[0].messages, chosen="x" * 99, rejected="c"
                )
            ],
            FakeChat(),
            key="k",
        )


def test_type_alone_gives_the_papers_setting():
    def defaults(name, **more):
        return load_config(
            {
                "run": {"dir": "r", "iterations": 1},
                "policy": {"model": "m"},
                "prompts": {"train": "t"},
                "algorithm": {"type": name, **more},
                "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
            }
        ).algorithm

    sppo = defaults("sppo")  # Wu et al. 2024: K = 5, eta = 1e3, the previous policy as reference
    assert (sppo.samples, sppo.eta, sppo.target, sppo.reference.type) == (
        5,
        1000.0,
        "soft",
        "previous",
    )
    # RLHFlow: 8 samples, best against worst, moving reference.
    iterative = defaults("iterative_dpo")
    assert (iterative.samples, iterative.pairs, iterative.loss.beta, iterative.reference.type) == (
        8,
        "best_worst",
        0.1,
        "previous",
    )
    inpo = defaults("inpo")  # Zhang et al. 2024
    assert (inpo.samples, inpo.eta) == (8, 0.0075) and inpo.tau == pytest.approx(inpo.eta / 3)
    hypo = defaults("hypo", offline={"path": "p"})
    assert (hypo.samples, hypo.beta) == (2, 0.1)


def test_algorithm_without_earlier_iterations_gets_none():
    assert (
        list(SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=8)).earlier(0))
        == []
    )
