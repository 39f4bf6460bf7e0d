"""What an algorithm is: four questions, declared facts, and optional capabilities.

explore    one prompt -> what was generated and judged (a coroutine; thousands are in flight)
select     an iteration's groups -> the examples worth training on, and what was dropped
credit     examples, annotated by reference, critic and learner -> examples with what each token
           deserves
loss       what the learner minimizes

The controller and the planner know an algorithm by these protocols only. A new one subclasses
`AlgorithmBase`, adds the capabilities it has, and brings its config in `Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import AlgorithmConfig, ReferenceSchedule
from rayhf.losses.base import Loss
from rayhf.types import (
    Compared,
    Completion,
    Example,
    Group,
    Invalid,
    JsonObject,
    Outcome,
    Prompt,
    Sample,
    Sampling,
    Scored,
    win_rates,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What an iteration will train on."""

    examples: tuple[Example, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was kept and dropped, counted."""
    no_signal: float | None = None
    """Share of the groups or pairs that teach nothing because all their completions score alike;
    the guard `no_signal` watches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionContext:
    """Which iteration is being selected for."""

    iteration: int
    """From 1."""
    seed: int
    """For whatever a selection draws."""
    sampling: Sampling
    """How the completions were drawn."""
    earlier: Callable[[int], Sequence[Example]] = lambda iteration: ()
    """The policy's examples of an earlier iteration, as they were selected then; none for an
    iteration before the first."""
    labels: Sequence[Example] = ()
    """(preferred, other) pairs labeled by people since the iteration before; only for an algorithm
    that TakesLabels."""


class Algorithm(Protocol):
    """The core that every algorithm has."""

    Config: ClassVar[type[AlgorithmConfig]]

    @property
    def samples(self) -> int:
        """Completions per prompt, for the plan."""
        ...

    @property
    def reference(self) -> ReferenceSchedule | None:
        """Which policy the reference is; None when no frozen log-probs are needed."""
        ...

    @property
    def needs_old_logp(self) -> bool:
        """Whether the loss reads the policy as it was before the iteration's first step.

        The controller adds old_logp in any case where an iteration has several optimizer steps.
        """
        ...

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Generate and judge completions of one prompt."""
        ...

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Choose the examples worth training on."""
        ...

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Say what each token deserves. Returns examples and metrics.

        Rows carry ref_logp where there is a reference, value where there is a critic, and old_logp
        where the iteration takes more than one optimizer step.
        """
        ...

    def loss(self, objective: str = "policy") -> Loss:
        """Return what the learner minimizes over the examples of `objective`."""
        ...


class AlgorithmBase:
    """Defaults of an algorithm that trains on its samples as they are selected."""

    reference: ReferenceSchedule | None = None
    needs_old_logp = False

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Return the examples as they are."""
        return list(examples), {}


# --- optional capabilities ----------------------------------------------------------------------


@runtime_checkable
class TrainsCritic(Protocol):
    """Trains a learner with a value head beside the policy; rows then carry its `value`."""

    def critic_loss(self) -> Loss:
        """Return what the critic minimizes."""
        ...

    def trains_policy(self, iteration: int) -> bool:
        """Whether the policy is trained too; False while only the critic warms up."""
        ...


@runtime_checkable
class TakesOfflinePairs(Protocol):
    """Trains on given preference pairs."""

    @property
    def pair_file(self) -> Path | None:
        """File of pairs; None where the config names none."""
        ...

    def set_pairs(self, pairs: Sequence[Example]) -> None:
        """Receive the pairs of `pair_file`, encoded for the policy."""
        ...


@runtime_checkable
class TakesLabels(Protocol):
    """Trains on pairs that people judged: chosen over rejected, whatever "better" means."""

    takes_labels: ClassVar[Literal[True]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSchedule:
    """How an objective other than "policy" goes over its examples; its logits are at temperature 1."""

    epochs: int
    examples_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPolicy:
    """A policy besides the campaign's own."""

    model: Path | None
    """None: it starts from policy.model."""
    lr: float


@runtime_checkable
class TrainsSeveralPolicies(Protocol):
    """Has further objectives, and perhaps further policies that generate and learn."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies; the first is "policy", the campaign's result."""
        ...

    def trained_policy(self, objective: str) -> str:
        """Return the policy that an objective's examples train."""
        ...

    def train_schedule(self, objective: str) -> TrainSchedule:
        """Return the schedule of every objective but "policy", which follows the learner section."""
        ...

    def other_policy(self, name: str) -> OtherPolicy:
        """Return the start of every policy but "policy"."""
        ...


@runtime_checkable
class WorksAtTestTime(Protocol):
    """Improves held-out completions before they count as eval/<task>/refined."""

    @property
    def at_test_time(self) -> bool:
        """Whether the config asks for it."""
        ...

    async def improve(
        self, prompt: Prompt, completion: Completion, context: ExplorationContext
    ) -> Completion:
        """Return a better completion, or the same."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """Learns something from iteration to iteration that a checkpoint must hold."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in the iteration's metrics (adaptive coefficients)."""
        ...

    def state_dict(self) -> JsonObject:
        """Return the state as JSON values."""
        ...

    def load_state_dict(self, state: JsonObject) -> None:
        """Put a state back."""
        ...


def policies_of(algorithm: Algorithm) -> tuple[str, ...]:
    """Return the names of the policies that generate and learn; the first is "policy"."""
    return algorithm.policies if isinstance(algorithm, TrainsSeveralPolicies) else ("policy",)


def trained_policy(algorithm: Algorithm, objective: str) -> str:
    """Return the policy that an objective's examples train."""
    if isinstance(algorithm, TrainsSeveralPolicies):
        return algorithm.trained_policy(objective)
    return "policy"


def state_of(algorithm: Algorithm) -> JsonObject:
    """Return the algorithm's state; empty where it keeps none."""
    return algorithm.state_dict() if isinstance(algorithm, KeepsState) else {}


def load_state(algorithm: Algorithm, state: JsonObject) -> None:
    """Put back what `state_of` returned. Raises ValueError for a state nobody can take."""
    if isinstance(algorithm, KeepsState):
        algorithm.load_state_dict(state)
    elif state:
        raise ValueError(f"{type(algorithm).__name__} keeps no state, got {sorted(state)}")


def needs_frozen_reference(algorithm: Algorithm) -> bool:
    """Whether the campaign has a reference role."""
    return algorithm.reference is not None and not algorithm.reference.is_learner


# --- explorations that many algorithms share ----------------------------------------------------


async def sample_and_score(prompt: Prompt, context: ExplorationContext, n: int) -> Group:
    """Draw n completions and score them."""
    completions = await context.sample(n)
    outcomes = await context.score(completions)
    samples = tuple(
        Sample(completion=c, outcome=o) for c, o in zip(completions, outcomes, strict=True)
    )
    return Group(prompt=prompt, samples=samples)


async def sample_and_compare(prompt: Prompt, context: ExplorationContext, n: int) -> Group:
    """Draw n completions and compare each with every other; a score is a win rate against all.

    Where the scorer could not compare, every sample carries its reason.
    """
    completions = await context.sample(n)
    comparison = await context.compare(completions)
    outcomes: list[Outcome]
    if isinstance(comparison, Compared):
        rates = win_rates(comparison.win, include_self=True)
        missing = Invalid(reason="the scorer had no verdict on it")
        outcomes = [Scored(value=float(rate)) if np.isfinite(rate) else missing for rate in rates]
    else:
        outcomes = [comparison for _ in completions]
    return Group(
        prompt=prompt,
        samples=tuple(
            Sample(completion=c, outcome=o) for c, o in zip(completions, outcomes, strict=True)
        ),
        compared=comparison if isinstance(comparison, Compared) else None,
        metrics={
            "scorer/pointwise": float(
                isinstance(comparison, Compared) and comparison.source == "pointwise"
            )
        },
    )


def scored(group: Group) -> list[tuple[int, Sample, float]]:
    """Return (index, sample, score) of the samples with a score; no others reach the learner."""
    return [
        (i, s, s.outcome.value)
        for i, s in enumerate(group.samples)
        if isinstance(s.outcome, Scored)
    ]


def tie_share(kept: float, ties: float) -> float | None:
    """Return the share of ties among pairs, as `Selection.no_signal`."""
    return ties / (kept + ties) if kept + ties > 0 else None
