"""Settings of algorithms that contradict the campaign's are refused; defaults per algorithm."""

import pytest
from campaigns import make_config

from rayhf.errors import ConfigError
from rayhf.planning.preflight import check_settings

HYPO = {"type": "hypo", "offline": {"path": "p.jsonl"}}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("ppo", 0.7), ("reinforce++", 0.7), ("online_dpo", 1.0), ("sppo", 1.0), ("spar", 1.0)],
)
def test_train_temperature(tmp_path, algorithm, expected):
    config = make_config(tmp_path, algorithm={"type": algorithm}, rollout={"temperature": 0.7})
    assert config.train_temperature == expected


@pytest.mark.parametrize(
    ("algorithm", "sections", "expected"),
    [
        ({"type": "grpo"}, {"rollout": {"temperature": 0.9, "top_p": 0.9}}, "top_p is 0.9 and"),
        ({"type": "ppo"}, {"rollout": {"temperature": 0.9, "top_k": 8}}, "rollout.top_k 8 with"),
        (
            {"type": "spar", "refiner": {"shared": True}},
            {"learner": {"schedule": "linear"}},
            "learner.schedule is linear: with algorithm.refiner.shared",
        ),
        (
            {"type": "online_dpo", "reference": {"type": "ema"}},
            {},
            "every is 512 optimizer steps, and the campaign has 4",
        ),
        (
            {"type": "iterative_dpo"},
            {"reference": {"model": "m2"}},
            "reference.model is m2, but iterative_dpo takes the policy before",
        ),
        ({"type": "grpo", "kl": {"coef": 0}}, {"reference": {"model": "m2"}}, "has no reference"),
        ({"type": "sppo"}, {"run": {"max_staleness": 1}}, "max_staleness is 1, but sppo regresses"),
        ({"type": "inpo"}, {"run": {"max_staleness": 1}}, "max_staleness is 1, but inpo regresses"),
        ({"type": "spar"}, {"run": {"max_staleness": 1}}, "max_staleness is 1, but spar has no"),
        (HYPO, {"rollout": {"temperature": 0.9}}, "hypo estimates the policy's KL"),
        (HYPO, {"rollout": {"top_p": 0.9}}, "hypo estimates the policy's KL"),
    ],
)
def test_refusals(tmp_path, algorithm, sections, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(make_config(tmp_path, algorithm=algorithm, **sections))


@pytest.mark.parametrize(
    ("algorithm", "sections"),
    [
        ({"type": "ppo"}, {"rollout": {"top_p": 0.9}}),
        ({"type": "spar"}, {"rollout": {"temperature": 0.9, "top_p": 0.9}}),
    ],
)
def test_truncated_sampling_is_accepted_where_log_probs_are_raw(tmp_path, algorithm, sections):
    check_settings(make_config(tmp_path, algorithm=algorithm, **sections))


def test_a_pull_is_toward_the_initial_policy(tmp_path):
    with pytest.raises(ConfigError, match=r"pull 0\.1 is toward the initial policy"):
        make_config(tmp_path, algorithm={"type": "sppo", "pull": 0.1})
    settings = {"type": "sppo", "pull": 0.1, "reference": {"type": "initial"}}
    algorithm, _ = check_settings(make_config(tmp_path, algorithm=settings))
    assert algorithm.needs_old_logp and algorithm.loss().pull == 0.1
