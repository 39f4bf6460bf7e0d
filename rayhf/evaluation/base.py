"""Protocol of evaluations, and the inputs they receive.

An evaluation is constructed before the campaign starts, where it reads and checks its files
(`EvaluationSetup`), and measures the policy whenever it is due (`EvaluationContext`). It has no
side effects: the next iteration must be the same with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.sources import SourceConfig
from rayhf.data.chat import Chat
from rayhf.data.prompts import NamedSource
from rayhf.evaluation.values import PromptValues
from rayhf.roles import Roles, Scorer
from rayhf.types import Completion, JsonObject, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetup:
    """Inputs of an evaluation's constructor."""

    task: str
    """Its key under `evaluations`, and the name of its metrics."""
    base: Path
    """Directory to which relative paths refer."""
    chat: Chat
    heldout: tuple[Prompt, ...]
    """The campaign's held-out prompts, or its training prompts where there are none."""
    open_sources: Callable[[tuple[SourceConfig, ...], str], Sequence[NamedSource]]
    """(sources, config key) -> the same, open. Raises ConfigError."""
    load_prompts: Callable[[tuple[SourceConfig, ...], str], tuple[Prompt, ...]]
    """(sources, config key) -> rendered prompts, at most run.eval_prompts. Raises ConfigError."""


class Complete(Protocol):
    """Completes each prompt once, with seeds that are the same every time."""

    async def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, policy: str
    ) -> list[Completion]:
        """Return the completions, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationContext:
    """Inputs of one measurement."""

    roles: Roles
    versions: Mapping[str, int]
    """Version of the weights that each policy's engines hold."""
    sampling: Sampling
    seed: int
    """The campaign's seed: the same prompts and seeds every time."""
    scorer: Scorer | None
    """The evaluation's own scorer, where its config names scorers."""
    complete: Complete
    """Completes prompts: by episodes, where an environment serves them."""
    record: Callable[[PromptValues], None]
    """Takes a figure by prompt: the summary and the pages then show it with an interval."""


class Evaluation(Protocol):
    """Measures the policy. Constructor: `Class(config, setup)`; raises ConfigError."""

    Config: ClassVar[type[EvaluationConfig]]
    muted_guards: ClassVar[frozenset[str]]
    """Guards that do not apply to a campaign with this evaluation, by their keys in the config."""

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return metrics by their whole names."""
        ...


@runtime_checkable
class KeepsEvaluationState(Protocol):
    """Accumulates state over the campaign, which checkpoints must hold."""

    def state_dict(self) -> JsonObject:
        """Return the state as JSON values."""
        ...

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore what `state_dict` returned."""
        ...
