"""The interface of a scorer: for the built-in ones, and for those of other packages.

A scorer is one class and its settings. This one scores short completions high; its config entry is
`{type: "my_package.scorers:Brevity", limit: 200}`:

    class BrevityConfig(PointwiseEntryConfig):
        type: str = "my_package.scorers:Brevity"
        limit: int = 100

    class Brevity(PointwiseScorer[BrevityConfig]):
        Config = BrevityConfig

        def score(self, requests):
            return [tuple(self._one(c.text) for c in r.completions) for r in requests]

        def _one(self, text):
            return Scored(value=1.0 - len(text) / self.config.limit)

A scorer that compares completions derives from PairwiseScorer, its settings from
PairwiseEntryConfig, and it defines `compare`. Both run in the scorer's actor, or behind
`rayhf serve-scorer`, with one caller at a time unless the settings declare `is_concurrent`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rayhf.config.scorers import ScorerEntryConfig
from rayhf.scorer.comparisons import check_comparisons, compare_scores, mean_wins
from rayhf.types import Comparison, Outcome, Prompt, ScoreRequest

C = TypeVar("C", bound=ScorerEntryConfig)


class ScorerEngine(Protocol):
    """A scorer in this process."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion of each request, in order.

        Higher is better, and a score beyond outcomes.MAX_SCORE becomes Invalid; a pairwise scorer
        returns mean win probabilities.
        Never raises for a completion that cannot be scored: that is Invalid (the scorer responded,
        but not with a number) or Failed (it did not respond).
        """
        ...

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return, for each request, the win probabilities among its K completions.

        Compared.win has shape (K, K) and values from 0 to 1, with win[i, j] + win[j, i] = 1 and 1/2
        on the diagonal; NaN where there is no verdict on a pair.
        """
        ...

    def close(self) -> None:
        """Release processes and memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSetup:
    """Environment of a scorer: where it runs, and where relative paths start."""

    base: Path
    """The campaign's directory: start of relative paths, and last on the import path of rules."""
    device: str = "cpu"
    """torch device of models, "cpu" or "cuda"."""
    threads: int | None = None
    """torch CPU threads of this process; None leaves them unchanged."""


class BaseScorer(ABC, Generic[C]):
    """Base class of every scorer that a config entry can name."""

    Config: type[C]

    def __init__(self, config: C, setup: ScorerSetup) -> None:
        self.config = config
        self.setup = setup

    @classmethod
    def check(cls, config: C, base: Path) -> None:
        """Refuse settings that cannot work, before anything starts; load no weights.

        Relative paths start at `base`. Raises ConfigError, or UnreachableError for services that do
        not respond.
        """

    @classmethod
    def check_prompts(cls, config: C, base: Path, prompts: Sequence[Prompt]) -> str | None:
        """Refuse settings or prompts that cannot work, before anything starts.

        `prompts` are those that the scorer judges; none where they are not known. Returns what
        `rayhf check` prints of it, if anything. Raises as `check`.
        """
        cls.check(config, base)
        return None

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion of each request, in order."""

    @abstractmethod
    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return, for each request, the win probabilities among its completions."""

    def take_counts(self) -> dict[str, float]:
        """Return what was used since the last call, by name: requests, tokens ...

        They become the metrics scorer/<name>/<count> of an iteration.
        """
        return {}

    def close(self) -> None:
        """Release processes and memory."""


class PointwiseScorer(BaseScorer[C]):
    """Base of a scorer that scores each completion by itself: define `score`."""

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return sigmoids of score differences."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]


class PairwiseScorer(BaseScorer[C]):
    """Base of a scorer that compares the completions of one prompt: define `compare`."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return each completion's mean win probability against the prompt's others."""
        comparisons = check_comparisons(self.compare(requests), requests)
        return [
            mean_wins(comparison, len(request.completions))
            for comparison, request in zip(comparisons, requests, strict=True)
        ]
