"""The scorer of a campaign that has none: nothing is generated for training.

Only its empty state is ever read; a request is an error of the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayhf.errors import ConfigError
from rayhf.types import Comparison, Outcome, ScoreRequest


class NoScorer:
    """Scorer role without scorers."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Raise ConfigError."""
        raise ConfigError("scorer.train: completions are to be scored, and there is no scorer")

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Raise ConfigError."""
        raise ConfigError("scorer.train: completions are to be compared, and there is no scorer")

    async def state_dict(self) -> dict[str, Any]:
        """Return the empty state."""
        return {}

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept what `state_dict` returned."""
