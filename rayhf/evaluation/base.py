"""What an evaluation is: the protocol that the controller knows, and what it is given.

An evaluation is built before the campaign starts (`EvaluationSetup`: it reads and checks its files
there) and measures the policy when it is due (`EvaluationContext`). It changes nothing: the next
iteration must be the same as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from rayhf.config.base import PluginConfig
from rayhf.config.evaluations import EvaluationConfig
from rayhf.data.chat import Chat
from rayhf.roles import Roles, Scorer
from rayhf.types import JsonObject, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetup:
    """What an evaluation is built from. Relative paths start at `base`."""

    task: str
    """Its key under `evaluations`, and the name of its metrics."""
    base: Path
    chat: Chat
    heldout: tuple[Prompt, ...]
    """The campaign's held-out prompts, or its training prompts where there are none."""
    load_prompts: Callable[[PluginConfig, str], tuple[Prompt, ...]]
    """(source, config key) -> rendered prompts, at most run.eval_prompts. Raises ConfigError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationContext:
    """What an evaluation may use when it measures."""

    roles: Roles
    versions: Mapping[str, int]
    """Weights that each policy's engines hold."""
    sampling: Sampling
    seed: int
    """The campaign's: the same prompts and seeds every time."""
    scorer: Scorer | None
    """The evaluation's own scorer, where its config names scorers."""


class Evaluation(Protocol):
    """Measures the policy. Constructor: `Class(config, setup)`; raises ConfigError."""

    Config: ClassVar[type[EvaluationConfig]]
    muted_guards: ClassVar[frozenset[str]]
    """Guards that must not judge a campaign with this evaluation, by their keys in the config."""

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return metrics by their whole names."""
        ...


@runtime_checkable
class KeepsEvaluationState(Protocol):
    """Accumulates something over the campaign that a checkpoint must hold."""

    def state_dict(self) -> JsonObject:
        """Return the state as JSON values."""
        ...

    def load_state_dict(self, state: JsonObject) -> None:
        """Put a state back."""
        ...
