"""Base config of evaluations; the config of each evaluation is beside its code."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt

from rayhf.config.base import PluginConfig
from rayhf.config.scorers import ScorerEntryConfig


class EvaluationConfig(PluginConfig):
    """A further evaluation with its own task name."""

    generates: ClassVar[bool] = True
    """Whether it needs the rollout engines; False where log-probs of given texts are enough."""
    compares: ClassVar[bool] = False
    """Whether its scorers compare completions with each other: pairwise scorers are allowed."""

    plays_episodes: ClassVar[bool] = False
    """Whether it completes prompts by EvaluationContext.complete, which plays episodes."""

    every: NonNegativeInt | None = None
    """Iterations between evaluations; also before the first and after the last iteration. Default:
    run.eval_every."""

    @property
    def scorers(self) -> tuple[ScorerEntryConfig, ...]:
        """Its own scorers, for which the launcher starts another scorer actor."""
        return ()
