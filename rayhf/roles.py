"""Protocols of the roles: rollout, scorer, reference, learner.

An engine behind a Ray actor, a remote service and a ten-line fake all implement them. Every method
is a coroutine that returns or raises an error of `rayhf.errors`. Timeouts belong to the
implementation: its error names the phase and the actor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rayhf.episodes import StepRequest, StepResult
from rayhf.losses.base import Loss
from rayhf.types import (
    Batch,
    Comparison,
    Completion,
    Failed,
    FloatArray,
    GenerateRequest,
    Invalid,
    Outcome,
    Probe,
    Row,
    ScoreRequest,
    TopLogprobs,
    WeightSnapshot,
)

Progress = Callable[[int, int], None]
"""Receives how many chunks of a call are done, and how many it has."""


def no_progress(done: int, total: int) -> None:
    """Ignore a call's progress."""


class Rollout(Protocol):
    """Generates completions with one policy's weights."""

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        """Return the completions of every request, in order.

        Raises StaleWeightsError where an engine does not hold `version`; with in-flight updates,
        where it holds older weights.
        """
        ...

    async def verify(self, probe: Probe) -> None:
        """Check that every engine computes the learner's log-probs.

        Raises WeightSyncError where one does not.
        """
        ...

    async def update(self, snapshot: WeightSnapshot) -> None:
        """Load new weights into every engine.

        Raises WeightSyncError unless each confirms version, checksum and probe.
        """
        ...


@runtime_checkable
class TimesUpdates(Protocol):
    """Capability of a rollout: it measures how long its engines stand still for an update."""

    @property
    def paused_s(self) -> float:
        """Longest time that an engine did not generate for the last update, in seconds."""
        ...


class Scorer(Protocol):
    """Scores and compares completions."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion of each request, in order.

        A completion that cannot be scored has an outcome too: nothing is raised for it.
        """
        ...

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities among each request's completions, in order.

        Completions that cannot be compared have an outcome too: nothing is raised for them.
        """
        ...

    async def state_dict(self) -> dict[str, Any]:
        """Return the scorer's running state (normalizers) as JSON values, for the checkpoint."""
        ...

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@runtime_checkable
class FollowsPolicy(Protocol):
    """Capability of a scorer: its scores depend on what the policy did in earlier iterations."""

    async def observe(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an iteration; scores of the next ones may differ."""
        ...


@runtime_checkable
class CountsCalls(Protocol):
    """Capability of a scorer or a reference: it counts what was asked for."""

    async def take_counts(self) -> dict[str, float]:
        """Return counts since the last call.

        Of a scorer, as "<scorer>/<count>", empty without a service; of a reference, as metrics.
        """
        ...


class Environments(Protocol):
    """Answer the policy in episodes of several turns."""

    async def step(self, requests: Sequence[StepRequest]) -> list[StepResult | Invalid | Failed]:
        """Return what the environments answer, in order; messages are a tuple of mappings.

        Invalid where an environment raised an error, Failed where its process was lost or took too
        long: the episode is over then.
        """
        ...


class Reference(Protocol):
    """Computes log-probs under a frozen model."""

    async def logprobs(
        self, rows: Sequence[Row], *, temperature: float, model: Path | None = None
    ) -> list[FloatArray]:
        """Return the log-probs of each row's response tokens, in nats.

        Under its own weights, or under those of another model directory (a past policy).
        """
        ...

    async def top_logprobs(
        self, rows: Sequence[Row], *, temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        """Return the same, and the top_k likeliest tokens at each position."""
        ...

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        """Set the reference to mix * snapshot + (1 - mix) * reference; mix 1 replaces it."""
        ...

    async def save(self, directory: Path) -> None:
        """Write the weights to `directory`."""
        ...

    async def load(self, directory: Path) -> None:
        """Read the weights from `directory`."""
        ...


class Learner(Protocol):
    """Trains one model (the policy, or a critic with a value head) under any algorithm."""

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """Take one optimizer step over the whole batch and return its metrics.

        Raises NumericalError on a non-finite loss or gradient.
        """
        ...

    async def outputs(
        self, rows: Sequence[Row], *, temperature: float, progress: Progress = no_progress
    ) -> list[FloatArray]:
        """Return one value per response token, computed without gradient.

        Log-probs in nats for a policy, values for a critic.
        """
        ...

    async def probe(self) -> Probe:
        """Return the current weights' log-probs of a fixed token sequence."""
        ...

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        """Return the current weights, ready to be sent.

        With `stored`, all of their bytes are also kept where the reference can fetch them.
        """
        ...

    async def sync_metrics(self) -> dict[str, float]:
        """Return what the last sync changed in the engines and what rounding lost (`sync/...`)."""
        ...

    async def save(self, directory: Path) -> None:
        """Write model, optimizer and random state to `directory`."""
        ...

    async def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        ...

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face model directory (safetensors, LoRA merged)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The roles of one campaign."""

    rollouts: Mapping[str, Rollout]
    """By policy; "policy" is the campaign's result."""
    learners: Mapping[str, Learner]
    """By policy."""
    scorer: Scorer
    evaluator: Scorer | None
    """Scorer of held-out completions; None: the training scorer."""
    eval_scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """Scorers of further evaluations, by task."""
    critic: Learner | None
    reference: Reference | None
    environments: Environments | None = None
