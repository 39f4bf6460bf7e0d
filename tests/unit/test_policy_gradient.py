"""Scores to advantages through select and credit of the policy-gradient family."""

import json

import numpy as np
import pytest

from rayhf.algorithms.base import SelectionContext
from rayhf.config.registry import ALGORITHMS
from rayhf.types import (
    Completion,
    Group,
    Prompt,
    Sample,
    Sampling,
    Scored,
    float_array,
    token_array,
)

CONTEXT = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=9))


def group_of(scores, *, name="p", tokens=2, truncated=()):
    samples = tuple(
        Sample(
            completion=Completion(
                prompt_id=name,
                index=index,
                seed=index,
                text=str(index),
                token_ids=token_array([7] * tokens),
                logprobs=float_array([-1.0] * tokens),
                finish_reason="length" if index in truncated else "stop",
                policy_version=0,
            ),
            outcome=Scored(value=score),
        )
        for index, score in enumerate(scores)
    )
    prompt = Prompt(prompt_id=name, messages=({"role": "user", "content": "q"},), token_ids=(1,))
    return Group(prompt=prompt, samples=samples)


def build(**settings):
    return ALGORITHMS.build(ALGORITHMS.config_type(settings["type"])(**settings))


def credited(scores, **settings):
    algorithm = build(**settings)
    selection = algorithm.select([group_of(scores)], CONTEXT)
    examples, metrics = algorithm.credit(selection.examples)
    advantages = [float(e.rows[0].tokens["advantage"][0]) for e in examples]
    return advantages, {**selection.metrics, **metrics}


@pytest.mark.parametrize(
    ("limit", "expected", "share"),
    [
        (10.0, [-28 / 3, -16 / 3, -4 / 3, 10.0], 0.25),
        (None, [-28 / 3, -16 / 3, -4 / 3, 16.0], None),
    ],
)
def test_reward_clip_bounds_advantages_after_the_group_baseline(limit, expected, share):
    advantages, metrics = credited([12.0, 15.0, 18.0, 31.0], type="rloo", reward_clip=limit)
    assert advantages == pytest.approx(expected)
    assert metrics.get("ppo/reward_clipped") == share and metrics["ppo/groups_uniform"] == 0.0


def test_reward_clip_bounds_scores_without_a_baseline():
    advantages, metrics = credited([-50.0, 5.0], type="reinforce++", reward_clip=10.0)
    # Two responses of two tokens: mean -2.5, standard deviation 7.5.
    assert advantages == pytest.approx([-1.0, 1.0], abs=1e-6)
    assert metrics["ppo/reward_clipped"] == 0.5


def test_grpo_normalizes_by_the_groups_deviation():
    scores = [1.0, 2.0, 4.0]
    advantages, _ = credited(scores, type="grpo")
    expected = (np.array(scores) - 7 / 3) / np.sqrt(7 / 3)
    assert advantages == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo"])
def test_grpos_variants_have_its_advantages(name):
    advantages, metrics = credited([1.0, 2.0, 4.0], type=name, overlong_buffer=0)
    assert advantages == credited([1.0, 2.0, 4.0], type="grpo")[0]
    assert "ppo/kl_coef" not in metrics  # no KL penalty


def test_dr_grpo_only_subtracts_the_mean():
    advantages, _ = credited([1.0, 2.0, 4.0], type="dr_grpo")
    assert advantages == pytest.approx([-4 / 3, -1 / 3, 5 / 3])  # Liu et al. 2025
    algorithm = build(type="dr_grpo")
    algorithm.select([group_of([1.0, 2.0])], CONTEXT)
    loss = algorithm.loss()
    assert (loss.config.aggregate, loss.max_tokens) == ("constant_length", 9)


def test_reinforce_with_baseline_normalizes_over_the_iteration():
    algorithm = build(type="reinforce++_baseline")
    groups = [
        group_of([1.0, 2.0, 6.0], name="a", tokens=1),
        group_of([0.0, 4.0], name="b", tokens=3),
    ]
    examples, _ = algorithm.credit(algorithm.select(groups, CONTEXT).examples)
    ours = np.concatenate([e.rows[0].tokens["advantage"] for e in examples])
    of_rows = np.array([-2.0, -1.0, 3.0, -2.0, 2.0])  # scores minus their group's mean
    tokens = np.repeat(of_rows, [1, 1, 1, 3, 3])
    assert ours == pytest.approx((tokens - tokens.mean()) / tokens.std(), rel=1e-5)
    loss = algorithm.loss()
    assert (loss.kl.estimator, loss.kl.coef, loss.kl.unbiased) == ("k2", 0.01, False)


def test_defaults_are_those_of_the_papers():
    dapo = build(type="dapo").config  # Yu et al. 2025, sections 3 and 4.1
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.aggregate) == (
        0.2,
        0.28,
        "token_mean",
    )
    assert dapo.samples == 16 and dapo.kl.coef == 0 and dapo.drops_uniform
    grpo = build(type="grpo").config  # Shao et al. 2024, eq. 3 and section 4.2
    assert (grpo.kl.coef, grpo.kl.estimator, grpo.loss.aggregate) == (0.04, "k3", "sequence_mean")
    assert build(type="gspo").config.loss.type == "gspo"
    assert build(type="cispo").config.loss.type == "cispo"
    assert build(type="ppo").config.loss.aggregate == "token_mean"


def test_a_partial_loss_keeps_the_algorithms_own_defaults():
    config = ALGORITHMS.config_type("dapo")(loss={"clip_low": 0.1})
    assert (config.loss.clip_low, config.loss.clip_high) == (0.1, 0.28)
    assert ALGORITHMS.config_type("gspo")(loss={"clip_low": 0.1}).loss.clip_high == 4e-4
    other = ALGORITHMS.config_type("gspo")(loss={"type": "clipped"}).loss
    assert (other.clip_high, other.aggregate) == (0.2, "token_mean")


def test_dapos_length_penalty_grows_over_the_last_fifth():
    """Yu et al. 2025, eq. 13, with 20 tokens at most, of which 4 are the buffer."""
    context = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=20))
    for tokens, penalty in ((16, 0.0), (17, 0.25), (19, 0.75), (20, 1.0)):
        group = group_of([1.0, -1.0], tokens=tokens)
        examples = build(type="dapo").select([group], context).examples
        scores = [e.rows[0].scalars["score"] for e in examples]
        assert scores == pytest.approx([1.0 - penalty, -1.0 - penalty])


def test_truncated_completions_count_in_the_baseline_but_do_not_train():
    group = group_of([0.0, 3.0, 6.0], truncated=(2,))
    algorithm = build(type="rloo", drop_truncated=True)
    examples, metrics = algorithm.credit(algorithm.select([group], CONTEXT).examples)
    assert [float(e.rows[0].tokens["advantage"][0]) for e in examples] == pytest.approx([-4.5, 0.0])
    assert metrics["ppo/truncated_dropped"] == 1.0


@pytest.mark.parametrize(
    ("scores", "expected"), [([1.0, 1.0], False), ([1.0, 2.0], True), ([1.0], False), ([], False)]
)
def test_signal_of_a_group(scores, expected):
    assert build(type="grpo").has_signal(group_of(scores)) is expected


def test_penalties_on_length_are_no_signal():
    """Completions that are all wrong and differ in length (Yu et al. 2025, eq. 11)."""
    group = group_of([0.0, 0.0], truncated=(0,))
    algorithm = build(type="dapo", missing_eos_penalty=0.5)
    assert not algorithm.has_signal(group)
    selection = algorithm.select([group], CONTEXT)
    assert (selection.examples, selection.no_signal) == ((), 1.0)


def test_adaptive_entropy_follows_its_rule():
    """He et al. 2025: it moves by a step, and counts while the entropy is at most the target."""
    algorithm = build(type="grpo", entropy={"target": 0.5, "step": 0.01, "largest": 0.025})
    applied = []
    for entropy in (0.4, 0.4, 0.4, 0.6, 0.5, 0.45):
        algorithm.observe({"policy/entropy": entropy})
        applied.append(algorithm.loss().entropy_coef)
    assert applied == pytest.approx([0.01, 0.02, 0.025, 0.0, 0.015, 0.025])
    assert algorithm.loss().entropy == "loss"
    other = build(type="grpo", entropy={"target": 0.5, "step": 0.01, "largest": 0.025})
    assert other.loss().entropy == "metric"
    other.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert other.loss().entropy_coef == algorithm.loss().entropy_coef
    _, metrics = other.credit([])
    assert metrics["ppo/entropy_coef"] == pytest.approx(0.025)


def test_both_adaptive_coefficients_are_saved():
    settings = {"kl": {"target": 3.0}, "entropy": {"target": 0.5}}
    algorithm = build(type="grpo", **settings)
    algorithm.select([group_of([1.0, 2.0])], CONTEXT)
    algorithm.observe({"policy/entropy": 0.1, "reference/kl": 9.0})
    other = build(type="grpo", **settings)
    other.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert other.kl_coef == algorithm.kl_coef > 0.04
    assert other.loss().entropy_coef == 1e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kl": {"estimator": "k1"}}, "k1 has no useful gradient as a loss"),
        ({"kl": {"where": "reward", "estimator": "k1", "unbiased": True}}, "where: loss"),
        ({"entropy": {"target": 0.5}, "loss": {"entropy_coef": 0.1}}, "expected one of them"),
        ({"refill": {"budget": 0.5}}, "greater than or equal to 1"),
    ],
)
def test_contradicting_settings_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build(type="grpo", **settings)


def test_k1_in_the_loss_needs_the_ratio():
    term = build(type="grpo", kl={"estimator": "k1", "unbiased": True}).loss().kl
    assert (term.estimator, term.unbiased) == ("k1", True)
