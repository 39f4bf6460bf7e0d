"""The learning rate over a campaign's optimizer steps."""

from __future__ import annotations

import math
from typing import Literal


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup: float,
    kind: Literal["constant", "linear", "cosine"],
    min_lr: float,
) -> float:
    """Return the fraction of the peak learning rate at optimizer step `step`, counted from 0.

    Rises linearly over the first `warmup` fraction of `total_steps`, never zero; then stays, or
    falls to `min_lr` (a fraction of the peak) at the last step, and remains there afterwards.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (1.0 - min_lr) * progress
    return min_lr + (1.0 - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
