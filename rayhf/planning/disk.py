"""Disk space of a run directory, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayhf.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes of a run directory."""

    checkpoint: float
    """Bytes of one checkpoint."""
    kept: int
    """Maximum number of checkpoints that stay."""
    policies: float
    """Bytes of the exported models."""
    samples: float
    """Bytes of one iteration's samples before compression: an upper bound."""
    iterations: int
    """Iterations whose samples are kept, those in the journal until a checkpoint included."""
    past: float = 0.0
    """Bytes of the past policies that one checkpoint needs; checkpoints may share them."""

    @property
    def total(self) -> float:
        """Maximum at any moment: while a checkpoint and the exported models are being replaced."""
        return (
            (self.kept + 1) * (self.checkpoint + self.past)
            + 2 * self.policies
            + self.samples * self.iterations
        )


def disk(
    run: RunConfig,
    *,
    trained: Sequence[int],
    reference: float,
    exported: float,
    samples: int,
    tokens: int,
    length: int,
    replies: int = 0,
    past: float = 0.0,
) -> Disk:
    """Return the disk space of a campaign.

    Args:
        run: its `run` section.
        trained: parameters of each learner. A checkpoint has 12 bytes for each: float32 weights and
            two moments.
        reference: bytes of a reference in a checkpoint.
        exported: bytes of the exported models.
        samples: completions of one iteration.
        tokens: maximum of one completion.
        length: maximum of one completion with its prompt, in tokens.
        past: bytes of the past policies that one checkpoint needs.
        replies: maximum of what judges write about one completion, in bytes.
    """
    every = run.checkpoint_every or run.iterations
    written = math.ceil(run.iterations / every)
    kept_for_good = run.iterations // math.lcm(every, run.keep_every) if run.keep_every else 0
    kept = run.keep_checkpoints + kept_for_good + run.keep_best
    # A completion's token is an id, a log-prob and some characters of text; its prompt's an id. The
    # same again for the training examples.
    per_sample = 2 * (12 * tokens + 4 * (length - tokens)) + 200 + replies
    return Disk(
        checkpoint=12.0 * sum(trained) + reference,
        kept=min(kept, written),
        policies=exported,
        past=past,
        samples=float(samples * per_sample),
        iterations=run.iterations + min(every, run.iterations),
    )
