"""What the configs of evaluations share; the config of one evaluation stands beside its code."""

from __future__ import annotations

from pydantic import NonNegativeInt

from rayhf.config.base import PluginConfig
from rayhf.config.scorers import ScorerEntry


class EvaluationConfig(PluginConfig):
    """A further evaluation, under its own task name."""

    every: NonNegativeInt | None = None
    """Iterations between evaluations; also before the first and after the last iteration. Default:
    run.eval_every."""

    @property
    def scorers(self) -> tuple[ScorerEntry, ...]:
        """Scorers of its own, which the launcher starts as one more scorer actor."""
        return ()
