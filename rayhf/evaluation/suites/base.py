"""What a suite is: public rows, the functions that score completions, and how answers are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import TypeAdapter

from rayhf.config.scorers import ScorerEntries, ScorerEntryConfig
from rayhf.config.sources import PromptSources, SourceConfig
from rayhf.config.suites import SuiteConfig
from rayhf.errors import ConfigError
from rayhf.types import Prompt

_TIMEOUT_S = 30.0
"""Limit on scoring one completion."""
WORKERS = 2


class Suite:
    """Base of suites whose completions are generated and scored.

    Scores come from rule functions, which run in processes of their own as a campaign's rules do:
    a completion that cannot be scored has no score.
    """

    Config: ClassVar[type[SuiteConfig]]
    dataset: ClassVar[Mapping[str, Any] | None] = None
    """The public data set as a source; None where the config must name rows."""
    columns: ClassVar[Mapping[str, Any]] = {}
    """Settings of the source, such as `rename` and `template`, that every source of rows gets."""
    functions: ClassVar[Mapping[str, str]] = {}
    """Metric -> rule function, the main metric first."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config

    def sources(self, key: str) -> tuple[SourceConfig, ...]:
        """Return the sources of rows. Raises ConfigError where there is none."""
        if self.config.prompts is not None:
            given = [source.model_dump(exclude_unset=True) for source in self.config.prompts]
            given = [
                {**self.columns, **row, "type": source.type}
                for row, source in zip(given, self.config.prompts, strict=True)
            ]
        elif self.dataset is not None:
            given = [{**self.columns, **self.dataset}]
        else:
            raise ConfigError(
                f"{key}.prompts is missing; the suite {self.config.type} has no public data set, "
                "expected a file of rows or another source"
            )
        if self.config.limit is not None:
            given = [{"limit": self.config.limit, **source} for source in given]
        return TypeAdapter(PromptSources).validate_python(given)

    def scorers(self) -> tuple[ScorerEntryConfig, ...]:
        """Return the scorers; each is a metric under its name."""
        entries = [
            {
                "type": "rule",
                "name": name,
                "function": function,
                "timeout_s": _TIMEOUT_S,
                "workers": WORKERS,
            }
            for name, function in self.functions.items()
        ]
        return TypeAdapter(ScorerEntries).validate_python(entries)

    def check(self, prompts: Sequence[Prompt], key: str) -> None:
        """Refuse prompts that cannot be scored, before anything starts. Raises ConfigError."""

    def answer(self, text: str) -> str | None:
        """Return the answer in a completion, for majority votes; None where there is none."""
        return None

    @property
    def votes(self) -> bool:
        """Whether the suite reads answers."""
        return type(self).answer is not Suite.answer

    def weight(self, metric: str, prompt: Prompt) -> float:
        """Return how much a prompt counts in the mean of a metric."""
        return 1.0
