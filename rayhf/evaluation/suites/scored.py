"""Any prompts with any scorers."""

from __future__ import annotations

from rayhf.config.scorers import ScorerEntries, ScorerEntryConfig
from rayhf.config.suites import SuiteConfig
from rayhf.evaluation.suites.base import Suite


class ScoredConfig(SuiteConfig):
    """Prompts and scorers, like prompts.heldout and scorer.evaluate of a campaign."""

    type: str = "scored"
    scorer: ScorerEntries | None = None
    """Scorers; each one's mean score is a metric. Default: none, for win rates alone."""


class Scored(Suite):
    """Any prompts with any scorers: the mean of each scorer's scores."""

    Config = ScoredConfig
    config: ScoredConfig

    def scorers(self) -> tuple[ScorerEntryConfig, ...]:
        """Return the config's scorers."""
        return self.config.scorer or ()
