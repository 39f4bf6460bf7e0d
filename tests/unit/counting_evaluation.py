"""An evaluation that counts how often it measured, and mutes a guard."""

from __future__ import annotations

from rayhf.config.evaluations import EvaluationConfig
from rayhf.evaluation.base import EvaluationContext
from rayhf.types import JsonObject


class CountingConfig(EvaluationConfig):
    """Nothing to set."""

    type: str = "counting_evaluation:Counting"


class Counting:
    """Number of measurements so far."""

    Config = CountingConfig
    muted_guards = frozenset({"entropy"})

    def __init__(self) -> None:
        self.count = 0

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        self.count += 1
        return {"counting/measured": float(self.count)}

    def state_dict(self) -> JsonObject:
        return {"count": self.count}

    def load_state_dict(self, state: JsonObject) -> None:
        self.count = int(str(state["count"]))
