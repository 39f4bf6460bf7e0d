"""A running mean and standard deviation of scores, for scorers whose scale nobody knows. Welford
1962.

In: finite scores, in the order of requests and their completions. Out: (score - mean) / std. The
state is three numbers that go into every checkpoint, so that a continued campaign normalizes
exactly as the one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rayhf.errors import CheckpointError

_SMALLEST_SPREAD = 1e-8
"""Relative to max(1, |mean|): scores that differ by less are rounding, and dividing by their spread
would make noise of it."""


class RunningNormalizer:
    """Statistics of everything `update` has seen. Population variance; one value is normalized to
    0."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 1 until the values differ."""
        spread = math.sqrt(self._squares / self.count) if self.count else 0.0
        return spread if spread > _SMALLEST_SPREAD * max(1.0, abs(self.mean)) else 1.0

    def update(self, values: Iterable[float]) -> None:
        for value in values:
            count = self.count + 1
            mean = self.mean + (value - self.mean) / count
            squares = self._squares + (value - self.mean) * (value - mean)
            if math.isfinite(squares) and math.isfinite(
                mean
            ):  # a score near the end of float would spoil every later one
                self.count, self.mean, self._squares = count, mean, squares

    def __call__(self, value: float) -> float:
        return (value - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for anything that state_dict did not write."""
        try:
            count, mean, squares = (
                int(state["count"]),
                float(state["mean"]),
                float(state["squares"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"a normalizer's state must have count, mean and squares, got {state!r:.80}"
            ) from error
        if count < 0 or squares < 0 or not (math.isfinite(mean) and math.isfinite(squares)):
            raise CheckpointError(
                f"a normalizer's state has count {count}, mean {mean}, squares {squares}; expected finite ones"
            )
        self.count, self.mean, self._squares = count, mean, squares
