"""Running mean and standard deviation of scores whose scale is unknown. Welford 1962.

In: finite scores, in the order of requests and their completions. Out: (score - mean) / std. The
state is three numbers that are part of every checkpoint, so that a resumed campaign normalizes
exactly as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rayhf.errors import CheckpointError

_SMALLEST_STD = 1e-8
"""Relative to max(1, |mean|): below it, differences are rounding errors, which a division by the
standard deviation would blow up."""


class RunningNormalizer:
    """Statistics of all values given to `update`, with population variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 1 until the values differ."""
        std = math.sqrt(self._squares / self.count) if self.count else 0.0
        return std if std > _SMALLEST_STD * max(1.0, abs(self.mean)) else 1.0

    def update(self, values: Iterable[float]) -> None:
        """Add values, one after the other."""
        for value in values:
            count = self.count + 1
            mean = self.mean + (value - self.mean) / count
            squares = self._squares + (value - self.mean) * (value - mean)
            # A score near the largest float would make all later statistics infinite.
            if math.isfinite(squares) and math.isfinite(mean):
                self.count = count
                self.mean = mean
                self._squares = squares

    def __call__(self, value: float) -> float:
        """Return the normalized value; 0 for the only value so far."""
        return (value - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        """Return count, mean and sum of squared deviations."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what state_dict returned. Raises CheckpointError for anything else."""
        try:
            count = int(state["count"])
            mean = float(state["mean"])
            squares = float(state["squares"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"a normalizer's state must have count, mean and squares, got {state!r:.80}"
            ) from error
        if count < 0 or squares < 0 or not (math.isfinite(mean) and math.isfinite(squares)):
            raise CheckpointError(
                f"a normalizer's state has count {count}, mean {mean}, squares {squares}; "
                "expected finite numbers"
            )
        self.count = count
        self.mean = mean
        self._squares = squares
