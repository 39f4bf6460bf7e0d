"""Scores to advantages through select and credit of the policy-gradient family."""

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


def group_of(scores):
    samples = tuple(
        Sample(
            completion=Completion(
                prompt_id="p",
                index=index,
                seed=index,
                text=str(index),
                token_ids=token_array((7, 8)),
                logprobs=float_array((-1.0, -1.0)),
                finish_reason="stop",
                policy_version=0,
            ),
            outcome=Scored(value=score),
        )
        for index, score in enumerate(scores)
    )
    prompt = Prompt(prompt_id="p", messages=({"role": "user", "content": "q"},), token_ids=(1,))
    return Group(prompt=prompt, samples=samples)


def credited(scores, **settings):
    algorithm = ALGORITHMS.build(ALGORITHMS.config_type(settings["type"])(**settings))
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
