"""The verbs: what a loop may ask of each role. An engine behind a Ray actor, a remote service and a
ten-line fake all fit.

Every method is a coroutine that either answers or raises an error of `rayhf.errors`; deadlines are
kept by whoever implements the role, and name the phase and the actor when they pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rayhf.losses.base import Loss
from rayhf.types import (
    Batch,
    Comparison,
    Completion,
    FloatArray,
    GenerateRequest,
    Outcome,
    Row,
    ScoreRequest,
    WeightSnapshot,
)


class Rollout(Protocol):
    """Writes completions with the policy's weights."""

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        """Complete every request, in order. Raises StaleWeightsError where an engine does not hold
        `version`."""
        ...

    async def update(self, snapshot: WeightSnapshot) -> None:
        """Load new weights into every engine. Raises WeightSyncError unless each confirms version,
        checksum and probe."""
        ...


class Scorer(Protocol):
    """Judges completions."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion of each request, in order. Never raises for a completion it
        cannot judge."""
        ...

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """For each request, the win probabilities among its completions. Never raises for
        completions it cannot judge."""
        ...

    async def state_dict(self) -> dict[str, Any]:
        """What the scorer learned on the way (running normalizers), as plain JSON values; part of
        every checkpoint."""
        ...

    async def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Reference(Protocol):
    """Frozen log-probs."""

    async def logprobs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        """Log-probs of each row's response tokens, in nats."""
        ...

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        """reference <- mix * snapshot + (1 - mix) * reference; mix 1 replaces it."""
        ...

    async def save(self, directory: Path) -> None: ...

    async def load(self, directory: Path) -> None: ...


class Learner(Protocol):
    """Trains one model (the policy, or a critic with a value head); knows no algorithm."""

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """One optimizer step over the whole batch. Raises NumericalError on a non-finite loss or
        gradient."""
        ...

    async def outputs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        """Per response token, without gradient: log-probs in nats for a policy, values for a
        critic."""
        ...

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        """The current weights, ready to be sent; `stored`: whole, where a reference can fetch them,
        too."""
        ...

    async def save(self, directory: Path) -> None: ...

    async def load(self, directory: Path) -> None: ...

    async def export(self, directory: Path) -> None:
        """A Hugging Face model directory (safetensors, LoRA merged)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the controller talks to."""

    rollouts: Mapping[str, Rollout]
    """By policy; "policy" is the campaign's result."""
    learners: Mapping[str, Learner]
    """By policy."""
    scorer: Scorer
    evaluator: Scorer | None
    """Scores held-out completions; None means the training scorer does."""
    eval_scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """By task: the scorers of further evaluations."""
    critic: Learner | None
    reference: Reference | None
