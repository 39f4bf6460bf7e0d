"""The source `reasoning_gym`: prompts of a procedural task, with the scorer of the same name.

A row has `prompt`, `answer`, `task`, and in `reasoning_gym` what generates it again: the scorer
(rayhf/scorer/reasoning_gym.py) scores with the task's own function on the task's own entry.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from rayhf.config.sources import SourceConfig
from rayhf.data.columns import Row
from rayhf.errors import ConfigError, nearest


class GymSourceConfig(SourceConfig):
    """Settings of a reasoning-gym task."""

    type: str = "reasoning_gym"
    task: str
    """Name of the task, for example chain_sum."""
    size: PositiveInt = 500
    """Number of prompts."""
    seed: NonNegativeInt = 0
    """Seed of the task's generator; another one for held-out prompts gives other prompts."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The task's own settings, for example {min_terms: 2, max_terms: 3}."""

    @property
    def default_name(self) -> str:
        """The task."""
        return self.task


class GymSource:
    """Prompts of a reasoning-gym task."""

    Config: ClassVar[type[SourceConfig]] = GymSourceConfig

    def __init__(self, config: GymSourceConfig, *, base: Path) -> None:
        """Raise ConfigError for an unknown task or settings that it does not take."""
        self._config = config
        self._entries = generate(config.task, config.size, config.seed, config.settings)

    @property
    def label(self) -> str:
        """The task."""
        return f"reasoning_gym {self._config.task}"

    def rows(self) -> Iterator[Row]:
        """Yield the task's prompts."""
        origin = {
            "task": self._config.task,
            "size": self._config.size,
            "seed": self._config.seed,
            "settings": self._config.settings,
        }
        for index in range(self._config.size):
            entry = self._entries[index]
            answer = entry["answer"]
            yield {
                "prompt": entry["question"],
                "answer": None if answer is None else str(answer),
                "task": self._config.task,
                "reasoning_gym": {**origin, "index": index},
            }


def generate(task: str, size: int, seed: int, settings: Mapping[str, Any]) -> Any:
    """Return a task's entries, {"question", "answer", "metadata"}, as reasoning-gym generates them.

    Raises ConfigError for an unknown task, for settings that it does not take, and where
    reasoning-gym is not installed.
    """
    return _generate(task, size, seed, json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=64)
def _generate(task: str, size: int, seed: int, settings: str) -> Any:
    create, tasks = import_package()
    if task not in tasks:
        raise ConfigError(f"reasoning_gym has no task {task!r}{nearest(task, sorted(tasks))}")
    try:
        return create(task, size=size, seed=seed, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym task {task}: {error}") from None


def import_package() -> tuple[Any, Mapping[str, Any]]:
    """Import reasoning-gym, which takes seconds; return its factory and its tasks by name.

    Raises ConfigError where it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it imports
            from reasoning_gym import create_dataset
            from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a source of type reasoning_gym needs the package reasoning-gym ({error}): "
            'pip install "rayhf[reasoning-gym]"'
        ) from None
    return create_dataset, DATASETS
