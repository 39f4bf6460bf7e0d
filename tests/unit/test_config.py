"""Strict configs: typos and contradictions are refused with the nearest valid key or value."""

import copy

import pytest
import yaml

from rayhf.algorithms.online_dpo import OnlineDPOConfig
from rayhf.algorithms.ppo import PPOConfig
from rayhf.config.load import dump_config, load_config
from rayhf.config.registry import ALGORITHMS
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


def test_dumped_config_loads_equal(tmp_path):
    config = load_config(MINIMAL)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"learner": {"lrr": 1}}, "unknown key learner.lrr; did you mean lr?"),
        (
            {"learner": {"learning_rate": 1}},
            "unknown key learner.learning_rate; did you mean lr?",
        ),
        # samples is a key of the algorithm, not of the learner: no such hint there
        ({"learner": {"group_size": 8}}, "unknown key learner.group_size; valid: "),
        (
            {"learner": {"lr": -1, "lrr": 1}},
            "2 problems: (1) unknown key learner.lrr; did you mean lr?; "
            "(2) learner.lr: input should be greater than 0, got -1",
        ),
        (
            {"algorithm": {"loss": {"type": "ipo", "betta": 1}}},
            "unknown key algorithm.loss.betta; did you mean beta?",
        ),
        (
            {"algorithm": {"reference": {"type": "ema", "alpa": 1}}},
            "unknown key algorithm.reference.alpa; did you mean alpha?",
        ),
        (
            {"scorer": {"train": [{"type": "rule", "function": "a:b", "wait": 1}]}},
            "unknown key scorer.train.0.wait",
        ),
        (
            {
                "scorer": {
                    "train": [{"type": "rule", "function": "a:b", "comparisons": {"type": "x"}}]
                }
            },
            "config mapping: scorer.train.0.comparisons: input tag 'x'",
        ),
        (
            {"learner": {"packing": 3}},
            "mapping: learner.packing: input should be 'tree', 'rows' or 'off' or 'auto', got 3",
        ),
        ({"polici": {"model": "m"}}, "unknown key polici; did you mean policy?"),
        ({"learner": {"lr": "fast"}}, "learner.lr: input should be a valid number"),
        ({"learner": {"lr": float("nan")}}, "learner.lr: input should be a finite number"),
        ({"learner": {"lr": -1}}, "learner.lr: input should be greater than 0, got -1"),
        ({"prompts": {"batch": 1.5}}, "prompts.batch: input should be a valid integer"),
        (
            {"algorithm": {"type": "onlinedpo"}},
            "algorithm.type: 'onlinedpo' is not a known algorithm; did you mean online_dpo?",
        ),
        (
            {"algorithm": {"type": "grpo", "loss": "ipo"}},
            "algorithm.loss.type: 'ipo' is a loss of another family; valid: clipped",
        ),
        ({"algorithm": {"type": "a.b:C"}}, "algorithm.type: a.b:C: no module named 'a'"),
    ],
)
def test_refusals_name_key_and_nearest_valid_one(section, expected):
    with pytest.raises(ConfigError) as error:
        load_config(with_(**section))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"learner": {"prompts_per_step": 5}},
            "does not divide prompts.batch 12; nearest valid values: 3, 4, 6",
        ),
        (
            {"algorithm": {"type": "grpo", "samples": 1}},
            "algorithm.samples: input should be greater than or equal to 2, got 1",
        ),
        (
            {"algorithm": {"type": "ppo", "kl": {"where": "loss"}}},
            "k1 has no useful gradient as a loss; expected k2 or k3",
        ),
        (
            {"algorithm": {"loss": {"type": "exo", "label_smoothing": 0}}},
            "algorithm.loss.label_smoothing: input should be greater than 0",
        ),
        (
            {"algorithm": {"type": "ppo", "kl": {"target": 6.0, "coef": 0}}},
            "an adaptive coefficient must start above 0",
        ),
    ],
)
def test_contradicting_settings_are_refused(section, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(load_config(with_(**section)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.lr"], "expected key=value"),
        (["scorer.train.4.weight=2"], "expected an index from 0 to 0"),
        (["learner.lr=1", "learner.lr.x=1"], "learner.lr: 1 is a value"),
        (["prompts={"], "not valid YAML"),
    ],
)
def test_overrides_are_validated(tmp_path, overrides, expected):
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
def test_unreadable_files_are_refused(tmp_path, content, expected):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*c\.yaml"):
        load_config(tmp_path / "d.yaml")


def test_defaults_are_those_of_their_source():
    """The sources are stated in the fields' docstrings."""
    ppo, dpo = PPOConfig(), OnlineDPOConfig()
    assert (ppo.gamma, ppo.lam, ppo.loss.clip_low, ppo.loss.clip_high, ppo.value_clip) == (
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
    assert (dpo.loss.beta, dpo.samples, dpo.loss.type, dpo.pairs, dpo.reference.type) == (
        0.1,
        8,
        "sigmoid",
        "best_worst",
        "initial",
    )
    for config in (ppo, dpo):
        assert ALGORITHMS.build(config).samples == config.samples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage follows from learner.zero"),
        ({"bf16": {"enabled": False}}, "bf16 follows from learner.dtype; expected that instead"),
        ({"zero_optimisation": {}}, "is not passed to DeepSpeed; did you mean zero_optimization"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "where DeepSpeed keeps master weights"),
        ({"zero_optimization": 3}, "zero_optimization is 3; expected a mapping"),
    ],
)
def test_deepspeed_settings_do_not_override_other_keys(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(with_(learner={"deepspeed": settings}))
    passed = {"zero_optimization": {"stage3_prefetch_bucket_size": 1000}}
    assert load_config(with_(learner={"deepspeed": passed})).learner.deepspeed == passed
