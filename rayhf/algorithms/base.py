"""What an algorithm answers. The controller knows this and nothing else of it.

explore    one prompt -> what was generated and judged (a coroutine; thousands are in flight)
select     a round's groups -> the examples worth training on, and what was dropped
credit     examples, annotated by reference, critic and learner -> examples with what each token deserves
loss       what the learner minimises
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rayhf.campaign.exchange import Explorer
from rayhf.config.algorithms import ReferenceSchedule
from rayhf.experience import Example, Group, Prompt, Row, Sample, Scored
from rayhf.losses.base import Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a round will train on."""

    examples: tuple[Example, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was kept and dropped, counted."""


class Algorithm(Protocol):
    @property
    def samples(self) -> int:
        """Responses per prompt, for the plan."""
        ...

    @property
    def reference(self) -> ReferenceSchedule | None:
        """Which policy the reference is; None when no frozen log-probs are needed."""
        ...

    @property
    def critic(self) -> bool: ...

    async def explore(self, prompt: Prompt, explorer: Explorer) -> Group: ...

    def select(self, groups: Sequence[Group], *, seed: int) -> Selection: ...

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Rows carry ref_logp where there is a reference, value where there is a critic, and old_logp where the round
        takes more than one optimiser step."""
        ...

    def loss(self) -> Loss: ...

    def critic_loss(self) -> Loss | None: ...

    def trains_policy(self, iteration: int) -> bool:
        """False while only the critic warms up."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hear the round's metrics (adaptive coefficients)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """The answers of an algorithm without critic and memory."""

    critic = False

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


async def sample_and_score(prompt: Prompt, explorer: Explorer, n: int) -> Group:
    """The plain exploration: n completions, judged."""
    completions = await explorer.sample(n)
    outcomes = await explorer.score(completions)
    samples = tuple(Sample(completion=c, outcome=o) for c, o in zip(completions, outcomes, strict=True))
    return Group(prompt=prompt, samples=samples)


def scored(group: Group) -> list[tuple[int, Sample, float]]:
    """(index, sample, score) of the samples that have a score; the others never reach the learner."""
    return [(i, s, s.outcome.value) for i, s in enumerate(group.samples) if isinstance(s.outcome, Scored)]


def make_row(group: Group, index: int, *, score: float) -> Row:
    """The training row of one sample, with its behaviour log-probs."""
    completion = group.samples[index].completion
    return Row(
        prompt_id=group.prompt.prompt_id,
        sample=index,
        prompt_ids=group.prompt.token_ids,
        response_ids=completion.token_ids,
        tokens={"behaviour_logp": np.asarray(completion.logprobs, dtype=np.float32)},
        scalars={"score": score, "truncated": float(completion.finish_reason == "length")},
    )
