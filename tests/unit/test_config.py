"""Strict configs: every typo has an answer."""

import copy

import pytest
import yaml

from rayhf.algorithms import build_algorithm
from rayhf.config.algorithms import OnlineDPOConfig, PPOConfig
from rayhf.config.load import dump_config, load_config, validate
from rayhf.errors import ConfigError
from rayhf.planning.preflight import check_settings

MINIMAL = {
    "run": {"dir": "r", "iterations": 3},
    "policy": {"model": "m"},
    "prompts": {"train": "t", "batch": 12},
    "algorithm": {"type": "online_dpo"},
    "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
}


def with_(**sections):
    data = copy.deepcopy(MINIMAL)
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return data


def test_dump_and_load_agree(tmp_path):
    config = validate(MINIMAL, source="test")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"learner": {"lrr": 1}}, "unknown key learner.lrr; did you mean lr?"),
        ({"algorithm": {"betta": 1}}, "unknown key algorithm.betta; did you mean beta?"),
        (
            {"algorithm": {"reference": {"type": "ema", "alpa": 1}}},
            "unknown key algorithm.reference.alpa; did you mean alpha?",
        ),
        (
            {"scorer": {"train": [{"type": "rule", "function": "a:b", "wait": 1}]}},
            "unknown key scorer.train.0.wait",
        ),
        ({"polici": {"model": "m"}}, "unknown key polici; did you mean policy?"),
        ({"learner": {"lr": "fast"}}, "learner.lr: input should be a valid number"),
        ({"learner": {"lr": float("nan")}}, "learner.lr: input should be a finite number"),
        ({"learner": {"lr": -1}}, "learner.lr: input should be greater than 0, got -1"),
        ({"prompts": {"batch": 1.5}}, "prompts.batch: input should be a valid integer"),
        ({"algorithm": {"type": "dpo"}}, "algorithm: input tag 'dpo'"),
    ],
)
def test_refusals_name_the_key_and_the_nearest(section, expected):
    with pytest.raises(ConfigError) as error:
        validate(with_(**section), source="c.yaml")
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"learner": {"prompts_per_step": 5}},
            "does not divide prompts.batch 12; nearest valid values: 3, 4, 6",
        ),
        (
            {"algorithm": {"type": "ppo", "advantage": "grpo"}},
            "algorithm.samples is 1; grpo compares responses",
        ),
        (
            {"algorithm": {"type": "ppo", "kl": {"where": "loss"}}},
            "k1 has no useful gradient as a loss; expected k2 or k3",
        ),
        ({"algorithm": {"loss": "exo"}}, "exo is infinite at 0"),
        (
            {"algorithm": {"type": "ppo", "kl": {"target": 6.0, "coef": 0}}},
            "must be finite and above 0 for the adaptive",
        ),
    ],
)
def test_settings_that_contradict_each_other(section, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(validate(with_(**section), source="c.yaml"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.lr"], "expected key=value"),
        (["scorer.train.4.weight=2"], "expected an index from 0 to 0"),
        (["learner.lr=1", "learner.lr.x=1"], "learner.lr: 1 is a value"),
        (["prompts=: :"], "not valid YAML"),
    ],
)
def test_overrides_are_checked(tmp_path, overrides, expected):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "c.yaml", overrides)


def test_overrides_reach_lists_and_new_sections(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    config = load_config(
        tmp_path / "c.yaml", ["scorer.train.0.weight=2", "learner.lr=1e-6", "rollout.stop=[a, b]"]
    )
    assert (config.scorer.train[0].weight, config.learner.lr, config.rollout.stop) == (
        2.0,
        1e-6,
        ("a", "b"),
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping, got|mapping"),
    ],
)
def test_unreadable_files(tmp_path, content, expected):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*c\.yaml"):
        load_config(tmp_path / "d.yaml")


def test_defaults_are_their_sources_settings():
    """ALGORITHMS.md A1, A2: the numbers a bare `type` stands for."""
    ppo, dpo = PPOConfig(), OnlineDPOConfig()
    assert (ppo.gamma, ppo.lam, ppo.clip_low, ppo.clip_high, ppo.value_clip) == (
        1.0,
        0.95,
        0.2,
        0.2,
        0.2,
    )
    assert (ppo.kl.coef, ppo.kl.estimator, ppo.kl.where, ppo.importance.cap) == (
        0.01,
        "k1",
        "reward",
        2.0,
    )
    assert (dpo.beta, dpo.samples, dpo.loss, dpo.pairs, dpo.reference.type) == (
        0.1,
        8,
        "sigmoid",
        "best_worst",
        "initial",
    )
    for config in (ppo, dpo):
        assert build_algorithm(config, max_tokens=8).samples == config.samples
