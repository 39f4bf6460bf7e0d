"""Protocols of algorithms: four methods, declared facts, and optional capabilities.

explore    one prompt -> its completions and scores (a coroutine; thousands are in flight)
select     an iteration's groups -> the examples to train on, and counts of what was dropped
credit     examples with log-probs and values from reference, critic and learner -> the same with
           an advantage per token
loss       the function that the learner minimizes

The controller and the planner know an algorithm by these protocols only. A new one subclasses
`AlgorithmBase`, implements the capabilities it has, and names its config class in `Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import AlgorithmConfig, PopulationConfig, ReferenceSchedule
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig
from rayhf.data.chat import Chat
from rayhf.data.examples import EncodedExample
from rayhf.data.readers import Row as DataRow
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
    """The examples that an iteration trains on."""

    examples: tuple[Example, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts of what was kept and dropped."""
    no_signal: float | None = None
    """Share of the groups or pairs without signal, because all their completions score alike; the
    guard `no_signal` checks it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionContext:
    """Inputs of a selection besides the groups."""

    iteration: int
    """Number of the iteration, from 1."""
    seed: int
    """Seed for random selections."""
    sampling: Sampling
    """Sampling parameters of the completions."""
    earlier: Callable[[int], Sequence[Example]] = lambda iteration: ()
    """Returns the policy's examples of an earlier iteration, as they were selected then; none for
    an iteration before the first."""
    labels: Sequence[Example] = ()
    """(chosen, rejected) pairs labeled by people since the previous iteration; only for an
    algorithm that TakesLabels."""
    thumbs: Sequence[Example] = ()
    """Completions to which people gave a thumb since then, with the scalar `desirable`, 1 or 0;
    only for an algorithm that TakesThumbs."""
    unanswered: Callable[[int], Sequence[Example]] = lambda iteration: ()
    """Returns the examples of an earlier iteration with the objective PEOPLE, without those that
    people have judged since."""


class Algorithm(Protocol):
    """The core that every algorithm has."""

    Config: ClassVar[type[AlgorithmConfig]]

    @property
    def samples(self) -> int:
        """Number of completions per prompt, for the plan."""
        ...

    @property
    def reference(self) -> ReferenceSchedule | None:
        """Schedule of the reference; None where no frozen log-probs are needed."""
        ...

    @property
    def needs_old_logp(self) -> bool:
        """Whether the loss reads log-probs from before the iteration's first optimizer step.

        Where an iteration has several steps, the controller adds old_logp in any case.
        """
        ...

    @property
    def needs_scorer(self) -> bool:
        """Whether the completions that it trains on are scored or compared."""
        ...

    @property
    def muted_guards(self) -> frozenset[str]:
        """Guards that do not apply, by their keys in the config."""
        ...

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Generate and score completions of one prompt."""
        ...

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the examples to train on.

        Depends on its arguments alone and keeps nothing: it may also be called with some of an
        iteration's groups, while others are still explored.
        """
        ...

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Assign credit to each token. Returns examples and metrics.

        Rows carry ref_logp where there is a reference, value where there is a critic, and old_logp
        where the iteration has more than one optimizer step.
        """
        ...

    def loss(self, objective: str = "policy") -> Loss:
        """Return the loss over the examples of `objective`."""
        ...


class AlgorithmBase:
    """Base class of algorithms that train on their selected examples without further credit."""

    reference: ReferenceSchedule | None = None
    needs_old_logp = False
    needs_scorer = True
    muted_guards: frozenset[str] = frozenset()

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Return the examples as they are."""
        return list(examples), {}


# --- optional capabilities ----------------------------------------------------------------------


@runtime_checkable
class TrainsCritic(Protocol):
    """Trains a critic beside the policy; rows then carry its `value`."""

    def critic_loss(self) -> Loss:
        """Return the critic's loss."""
        ...

    def trains_policy(self, iteration: int) -> bool:
        """Whether the policy is trained too; False while only the critic warms up."""
        ...


@runtime_checkable
class TrainsOnRows(Protocol):
    """Trains on the rows of prompts.train as they are: it generates and scores nothing.

    A campaign then has rollout engines only where an evaluation generates completions.
    """

    def encode(self, row: DataRow, where: str, chat: Chat) -> Sequence[EncodedExample]:
        """Return the training examples of a row, encoded for the policy.

        Raises ConfigError, beginning with `where`, for a row that it cannot train on.
        """
        ...

    def set_examples(self, examples: Sequence[EncodedExample]) -> None:
        """Receive all examples; the prompts of an iteration have their ids."""
        ...


@runtime_checkable
class TakesOfflinePairs(Protocol):
    """Trains on preference pairs from a file."""

    @property
    def pair_file(self) -> Path | None:
        """File of pairs; None where the config names none."""
        ...

    def set_pairs(self, pairs: Sequence[Example]) -> None:
        """Receive the pairs of `pair_file`, encoded for the policy."""
        ...


@runtime_checkable
class TakesLabels(Protocol):
    """Trains on (chosen, rejected) pairs that people labeled."""

    takes_labels: ClassVar[Literal[True]]


@runtime_checkable
class TakesThumbs(TakesLabels, Protocol):
    """Trains on single completions to which people gave a thumb up or down, too."""

    takes_thumbs: ClassVar[Literal[True]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSchedule:
    """Optimizer steps of an objective other than "policy"."""

    epochs: int
    examples_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPolicy:
    """Initial model and learning rate of a policy other than "policy"."""

    model: ModelName | None
    """Initial model; None: policy.model."""
    lr: float
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises to `lr`. It then stays: how many steps the policy
    takes depends on what the campaign generates."""

    def learner_settings(self, learner: LearnerConfig) -> tuple[LearnerConfig, int]:
        """Return the learner's settings with this schedule, and its length in optimizer steps."""
        schedule = {"schedule": "constant", "warmup": 1.0 if self.warmup_steps else 0.0}
        return learner.model_copy(update=schedule), max(self.warmup_steps, 1)


@runtime_checkable
class TrainsSeveralPolicies(Protocol):
    """Has further objectives, and possibly further policies."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies; the first is "policy", the campaign's result."""
        ...

    def trained_policy(self, objective: str) -> str:
        """Return the policy that an objective's examples train."""
        ...

    def train_schedule(self, objective: str) -> TrainSchedule:
        """Return the schedule of an objective other than "policy" (which has the learner's)."""
        ...

    def other_policy(self, name: str) -> OtherPolicy:
        """Return the settings of a policy other than "policy"."""
        ...


@runtime_checkable
class SamplesFrozenPolicies(Protocol):
    """Also samples from frozen copies of the initial policy, with engines and without a learner."""

    @property
    def frozen_policies(self) -> tuple[str, ...]:
        """Names of the frozen policies, as ExplorationContext.sample takes them."""
        ...


@runtime_checkable
class ReadsPastPolicies(Protocol):
    """Reads log-probs of policies of earlier iterations, which the run directory keeps.

    Rows then carry past_logp_1 (of the newest that is not the current policy), past_logp_2, ... and
    old_logp. Needs a reference role, whose actors compute them.
    """

    @property
    def population(self) -> PopulationConfig:
        """Which policies."""
        ...


@runtime_checkable
class ReadsTopLogprobs(Protocol):
    """Reads the reference's likeliest tokens; rows then carry its `reference_top`."""

    @property
    def reference_top_k(self) -> int:
        """How many tokens at each position; 0: none."""
        ...


@runtime_checkable
class RefillsPrompts(Protocol):
    """Wants further prompts in place of those whose groups teach nothing."""

    @property
    def refill_budget(self) -> float:
        """Prompts that an iteration may explore, as a multiple of prompts.batch; 1 is off."""
        ...

    def has_signal(self, group: Group) -> bool:
        """Whether `select` keeps examples of a group.

        A function of the group only: a resumed iteration asks again.
        """
        ...


@runtime_checkable
class RendersConversations(Protocol):
    """Renders conversations and answers of its own, which not every chat template can."""

    def check_chat(self, chat: Chat, prompt: Prompt) -> None:
        """Render an example of each for `prompt`, before anything starts.

        Raises ConfigError.
        """
        ...


@runtime_checkable
class WorksAtTestTime(Protocol):
    """Improves held-out completions, which are then scored as eval/<task>/refined."""

    @property
    def at_test_time(self) -> bool:
        """Whether the config turns it on."""
        ...

    async def improve(
        self, prompt: Prompt, completion: Completion, context: ExplorationContext
    ) -> Completion:
        """Return a better completion, or the same."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """Has state that changes from iteration to iteration and that checkpoints must hold."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Update the state from the iteration's metrics (adaptive coefficients)."""
        ...

    def state_dict(self) -> JsonObject:
        """Return the state as JSON values."""
        ...

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore what `state_dict` returned."""
        ...


def policies_of(algorithm: Algorithm) -> tuple[str, ...]:
    """Return the names of the policies that are trained; the first is "policy"."""
    return algorithm.policies if isinstance(algorithm, TrainsSeveralPolicies) else ("policy",)


def frozen_policies(algorithm: Algorithm) -> tuple[str, ...]:
    """Return the names of the policies that generate and are not trained."""
    return algorithm.frozen_policies if isinstance(algorithm, SamplesFrozenPolicies) else ()


def population_of(algorithm: Algorithm) -> PopulationConfig:
    """Return which past policies the algorithm reads; its size is 0 where it reads none."""
    if isinstance(algorithm, ReadsPastPolicies):
        return algorithm.population
    return PopulationConfig(size=0)


def trained_policy(algorithm: Algorithm, objective: str) -> str:
    """Return the policy that an objective's examples train."""
    if isinstance(algorithm, TrainsSeveralPolicies):
        return algorithm.trained_policy(objective)
    return "policy"


def state_of(algorithm: Algorithm) -> JsonObject:
    """Return the algorithm's state; empty where it has none."""
    return algorithm.state_dict() if isinstance(algorithm, KeepsState) else {}


def load_state(algorithm: Algorithm, state: JsonObject) -> None:
    """Restore what `state_of` returned. Raises ValueError where the algorithm has no state."""
    if isinstance(algorithm, KeepsState):
        algorithm.load_state_dict(state)
    elif state:
        raise ValueError(f"{type(algorithm).__name__} has no state, got {sorted(state)}")


def reference_top_k(algorithm: Algorithm) -> int:
    """Return how many of the reference's likeliest tokens the algorithm reads; 0: none."""
    return algorithm.reference_top_k if isinstance(algorithm, ReadsTopLogprobs) else 0


def most_prompts(algorithm: Algorithm, batch: int) -> int:
    """Return how many prompts an iteration of `batch` prompts may explore."""
    budget = algorithm.refill_budget if isinstance(algorithm, RefillsPrompts) else 1.0
    return int(budget * batch + 1e-6)  # 1.15 * 100 is 114.99...


def generates(algorithm: Algorithm) -> bool:
    """Whether the algorithm trains on completions that the policy generates."""
    return not isinstance(algorithm, TrainsOnRows)


def needs_frozen_reference(algorithm: Algorithm) -> bool:
    """Whether the algorithm needs a reference role."""
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
    """Draw n completions and compare each with every other; see `compare_all`."""
    completions = await context.sample(n)
    return await compare_all(prompt, context, [("answer", c) for c in completions])


async def compare_all(
    prompt: Prompt, context: ExplorationContext, answers: Sequence[tuple[str, Completion]]
) -> Group:
    """Compare each of (kind, completion) with every other; a score is a win rate against all.

    Equal completions tie, whatever the scorer says of them, and have one win rate. Where the scorer
    could not compare them, every sample's outcome is the reason.
    """
    completions = [completion for _, completion in answers]
    comparison = await context.compare(completions)
    outcomes: list[Outcome]
    if isinstance(comparison, Compared):
        win = with_ties(comparison.win, [c.token_ids.tolist() for c in completions])
        rates = win_rates(win, include_self=True)
        missing = Invalid(reason="the scorer had no verdict on it")
        outcomes = [Scored(value=float(rate)) if np.isfinite(rate) else missing for rate in rates]
    else:
        outcomes = [comparison for _ in completions]
    compared = comparison if isinstance(comparison, Compared) else None
    pointwise = compared is not None and compared.source == "pointwise"
    return Group(
        prompt=prompt,
        samples=tuple(
            Sample(completion=completion, outcome=outcome, kind=kind)
            for (kind, completion), outcome in zip(answers, outcomes, strict=True)
        ),
        compared=compared,
        metrics={"scorer/pointwise": float(pointwise)},
    )


def with_ties(
    win: npt.NDArray[np.float64], completions: Sequence[Sequence[int]]
) -> npt.NDArray[np.float64]:
    """Return the win matrix in which equal completions tie and win alike: (K, K) -> (K, K).

    An entry becomes the mean over the known entries of all copies of its two completions.
    """
    keys = [tuple(token_ids) for token_ids in completions]
    copies: dict[tuple[int, ...], list[int]] = {}
    for index, key in enumerate(keys):
        copies.setdefault(key, []).append(index)
    if len(copies) == len(keys):
        return win
    out = np.array(win, dtype=np.float64)
    for first, rows in copies.items():
        for second, columns in copies.items():
            block = win[np.ix_(rows, columns)]
            known = block[np.isfinite(block)]
            tied = 0.5 if first == second else known.mean() if known.size else np.nan
            out[np.ix_(rows, columns)] = tied
    return out


def scored(group: Group) -> list[tuple[int, Sample, float]]:
    """Return (index, sample, score) of every sample that has a score."""
    return [
        (i, s, s.outcome.value)
        for i, s in enumerate(group.samples)
        if isinstance(s.outcome, Scored)
    ]


def tie_share(kept: float, ties: float) -> float | None:
    """Return the share of ties among pairs, for `Selection.no_signal`."""
    return ties / (kept + ties) if kept + ties > 0 else None
