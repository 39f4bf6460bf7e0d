"""What an algorithm answers. The controller knows this and nothing else of it.

explore    one prompt -> what was generated and judged (a coroutine; thousands are in flight)
select     a round's groups -> the examples worth training on, and what was dropped
credit     examples, annotated by reference, critic and learner -> examples with what each token
           deserves
loss       what the learner minimizes
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import PreviousReference, ReferenceSchedule
from rayhf.losses.base import Loss
from rayhf.types import (
    Compared,
    Completion,
    Example,
    Group,
    Invalid,
    Outcome,
    Prompt,
    Sample,
    Scored,
    win_rates,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a round will train on."""

    examples: tuple[Example, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was kept and dropped, counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionContext:
    """Which round is being selected for."""

    iteration: int
    """From 1."""
    seed: int
    """For whatever a selection draws."""
    earlier: Callable[[int], Sequence[Example]] = lambda iteration: ()
    """The policy's examples of an earlier round, as they were selected then; none for a round
    before the first."""
    labels: Sequence[Example] = ()
    """(preferred, other) of what people said since the round before; only for an algorithm that
    takes labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSchedule:
    """How an objective other than "policy" goes over its examples each round; its logits are at
    temperature 1."""

    epochs: int
    examples_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPolicy:
    """A policy besides the campaign's own."""

    model: Path | None
    """None: it starts from policy.model."""
    lr: float


class Algorithm(Protocol):
    @property
    def samples(self) -> int:
        """Responses per prompt, for the plan."""
        ...

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that write and learn; the first is "policy", the campaign's
        result."""
        ...

    @property
    def reference(self) -> ReferenceSchedule | None:
        """Which policy the reference is; None when no frozen log-probs are needed."""
        ...

    @property
    def needs_old_logp(self) -> bool:
        """Whether the loss reads the policy as it was at the round's start even where the round has
        one optimizer step."""
        ...

    @property
    def critic(self) -> bool: ...

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group: ...

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection: ...

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Rows carry ref_logp where there is a reference, value where there is a critic, and
        old_logp where the round takes more than one optimizer step."""
        ...

    def loss(self, objective: str = "policy") -> Loss: ...

    def trainee(self, objective: str) -> str:
        """The policy that an objective's examples train."""
        ...

    def train_schedule(self, objective: str) -> TrainSchedule:
        """For every objective but "policy", which goes by the config's learner section."""
        ...

    def other_policy(self, name: str) -> OtherPolicy:
        """For every name in `policies` but "policy"."""
        ...

    def critic_loss(self) -> Loss | None: ...

    def trains_policy(self, iteration: int) -> bool:
        """False while only the critic warms up."""
        ...

    @property
    def pair_file(self) -> Path | None:
        """A file of preference pairs that the algorithm trains on as given."""
        ...

    def give(self, pairs: Sequence[Example]) -> None:
        """Receive the pairs of `pair_file`, encoded."""
        ...

    @property
    def at_test_time(
        self,
    ) -> Callable[[Prompt, Completion, ExplorationContext], Awaitable[Completion]] | None:
        """What is done to a held-out answer before it counts as eval/<task>/refined; None: there is
        no such figure."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hear the round's metrics (adaptive coefficients)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """The answers of an algorithm without critic and memory."""

    critic = False
    needs_old_logp = False
    policies: tuple[str, ...] = ("policy",)
    pair_file: Path | None = None
    at_test_time: (
        Callable[[Prompt, Completion, ExplorationContext], Awaitable[Completion]] | None
    ) = None

    def give(self, pairs: Sequence[Example]) -> None:
        raise ValueError(f"{type(self).__name__} takes no given pairs")

    def trainee(self, objective: str) -> str:
        return "policy"

    def train_schedule(self, objective: str) -> TrainSchedule:
        raise KeyError(f"{type(self).__name__} has no objective {objective!r}")

    def other_policy(self, name: str) -> OtherPolicy:
        raise KeyError(f"{type(self).__name__} has no policy {name!r}")

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        return list(examples), {}

    def critic_loss(self) -> Loss | None:
        return None

    def trains_policy(self, iteration: int) -> bool:
        return True

    def observe(self, metrics: Mapping[str, float]) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


async def sample_and_score(prompt: Prompt, context: ExplorationContext, n: int) -> Group:
    """The plain exploration: n completions, judged."""
    completions = await context.sample(n)
    outcomes = await context.score(completions)
    samples = tuple(
        Sample(completion=c, outcome=o) for c, o in zip(completions, outcomes, strict=True)
    )
    return Group(prompt=prompt, samples=samples)


async def sample_and_compare(prompt: Prompt, context: ExplorationContext, n: int) -> Group:
    """n completions, every one compared with every other; an answer's score is its win rate against
    all of them.

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
    """(index, sample, score) of the samples that have a score; the others never reach the
    learner."""
    return [
        (i, s, s.outcome.value)
        for i, s in enumerate(group.samples)
        if isinstance(s.outcome, Scored)
    ]


def learner_is_reference(schedule: ReferenceSchedule | None) -> bool:
    """A reference that is refreshed every round is the learner itself before its first step: no
    frozen copy is needed."""
    return isinstance(schedule, PreviousReference) and schedule.every == 1


def needs_frozen_reference(algorithm: Algorithm) -> bool:
    """Whether the campaign has a reference role."""
    return algorithm.reference is not None and not learner_is_reference(algorithm.reference)
