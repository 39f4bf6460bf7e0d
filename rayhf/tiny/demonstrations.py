"""Source of demonstrations for the arithmetic task: its prompts with worked answers.

In: the path of arithmetic prompts. Out: rows with `prompt` and `completion`. The tiny policy is
trained on demonstrations with slips; these have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rayhf.config.sources import SourceConfig
from rayhf.data.readers import read_rows
from rayhf.errors import ConfigError
from rayhf.tiny.arithmetic import Chain

_TERM = re.compile(r"[+-]?[0-9]+")


class WorkedAnswersConfig(SourceConfig):
    """Which prompts."""

    type: str = "rayhf.tiny.demonstrations:WorkedAnswers"
    path: Path
    """Prompts of the arithmetic task, as `rayhf tiny` writes them."""


class WorkedAnswers:
    """Arithmetic prompts, each with its worked answer."""

    Config = WorkedAnswersConfig

    def __init__(self, config: WorkedAnswersConfig, *, base: Path) -> None:
        self._path = base / config.path

    @property
    def label(self) -> str:
        """Path of the prompts."""
        return str(self._path)

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield each prompt with its worked answer. Raises ConfigError for another task's."""
        for where, row in read_rows(self._path, key="path"):
            prompt = str(row.get("prompt"))
            chain = Chain(tuple(int(term) for term in _TERM.findall(prompt)))
            if len(chain.terms) < 2 or chain.prompt != prompt:
                raise ConfigError(f"{where}: {prompt!r:.60} is no prompt of the arithmetic task")
            yield {"prompt": prompt, "completion": chain.worked([0] * (len(chain.terms) - 1))}
