"""GRPO examples of a further objective: advantages are known when the examples are selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from rayhf.algorithms.advantages import centered, grpo
from rayhf.types import Example, Group, make_row


def gradient_examples(
    group: Group,
    rewards: Mapping[int, float],
    *,
    objective: str,
    scale: Literal["group", "none"] = "group",
) -> list[Example]:
    """Return one example per rewarded sample, with its advantage on every token.

    The rewarded samples are one group: they continue the same context. Equal rewards, and a single
    one, carry no signal: no examples.

    Args:
        group: has the samples.
        rewards: by index of the sample.
        objective: of the examples.
        scale: what the distance from the mean is divided by, as for GRPO.
    """
    if len(set(rewards.values())) < 2:
        return []
    estimate = grpo if scale == "group" else centered
    (advantages,) = estimate([list(rewards.values())])
    examples = []
    for (index, reward), advantage in zip(rewards.items(), advantages, strict=True):
        row = make_row(group, index, score=reward)
        values = np.full(len(row.response_ids), advantage, dtype=np.float32)
        examples.append(Example(rows=(row.with_tokens(advantage=values),), objective=objective))
    return examples
