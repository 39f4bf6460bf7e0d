"""Preference pairs that measure a reward model: RewardBench, and files of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import TypeAdapter

from rayhf.config.sources import PromptSources, SourceConfig
from rayhf.config.suites import SuiteConfig
from rayhf.data.columns import Row
from rayhf.data.responses import pair_of
from rayhf.errors import ConfigError
from rayhf.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedPair:
    """A pair of completions of one prompt, its category and its annotations."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    category: str
    agreement: float | None
    """Share of annotators who prefer the chosen completion; None where the row has no such list."""


class PreferencesConfig(SuiteConfig):
    """Rows with `prompt`, `chosen` and `rejected`."""

    type: str = "preferences"
    category: str = "category"
    """Column with the category of a pair; a row without it has the category "all"."""
    annotations: str = "annotations"
    """Column with the verdicts of several annotators: a list of numbers from 0 to 1, where 1
    prefers the chosen completion."""


class Preferences:
    """Preference pairs of your own: accuracy by category, calibration, length and format bias."""

    Config: ClassVar[type[PreferencesConfig]] = PreferencesConfig
    dataset: ClassVar[Mapping[str, Any] | None] = None
    sections: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Section -> its categories, for the weighted mean of `counts`."""
    counts: ClassVar[Mapping[str, int]] = {}

    def __init__(self, config: PreferencesConfig) -> None:
        self.config = config

    def sources(self, key: str) -> tuple[SourceConfig, ...]:
        """Return the sources of rows. Raises ConfigError where there is none."""
        given = self.config.prompts
        if given is None and self.dataset is None:
            raise ConfigError(f"{key}.prompts is missing; expected a file of pairs")
        sources = given or TypeAdapter(PromptSources).validate_python([self.dataset])
        if self.config.limit is None:
            return sources
        return tuple(
            source.model_copy(update={"limit": source.limit or self.config.limit})
            for source in sources
        )

    def parse(self, row: Row, where: str) -> AnnotatedPair:
        """Return the pair of a row. Raises ConfigError, beginning with `where`."""
        messages, chosen, rejected = pair_of(row, where)
        category = row.get(self.config.category)
        return AnnotatedPair(
            messages=messages,
            chosen=chosen,
            rejected=rejected,
            category="all" if category is None else str(category),
            agreement=_agreement(row.get(self.config.annotations), self.config.annotations, where),
        )


def _agreement(votes: object, column: str, where: str) -> float | None:
    """Return the mean of several annotations; None without them or with only one."""
    if votes is None:
        return None
    if not isinstance(votes, list) or not all(
        isinstance(vote, int | float) and 0 <= vote <= 1 for vote in votes
    ):
        raise ConfigError(
            f"{where}: `{column}` must be a list of numbers from 0 to 1 (1 prefers the chosen "
            f"completion), got {votes!r:.60}"
        )
    return float(sum(votes)) / len(votes) if len(votes) > 1 else None


class RewardBenchConfig(PreferencesConfig):
    """Rows of RewardBench."""

    type: str = "rewardbench"
    category: str = "subset"
    """Column with the category of a pair."""


class RewardBench(Preferences):
    """RewardBench (Lambert et al. 2024): accuracy by subset, section and in total."""

    Config = RewardBenchConfig
    dataset: ClassVar[Mapping[str, Any] | None] = {
        "type": "hub",
        "dataset": "allenai/reward-bench",
        "split": "filtered",
    }
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Chat": (
            "alpacaeval-easy",
            "alpacaeval-length",
            "alpacaeval-hard",
            "mt-bench-easy",
            "mt-bench-med",
        ),
        "Chat Hard": (
            "mt-bench-hard",
            "llmbar-natural",
            "llmbar-adver-neighbor",
            "llmbar-adver-GPTInst",
            "llmbar-adver-GPTOut",
            "llmbar-adver-manual",
        ),
        "Safety": (
            "refusals-dangerous",
            "refusals-offensive",
            "xstest-should-refuse",
            "xstest-should-respond",
            "donotanswer",
        ),
        "Reasoning": (
            "math-prm",
            "hep-cpp",
            "hep-go",
            "hep-java",
            "hep-js",
            "hep-python",
            "hep-rust",
        ),
    }
    counts: ClassVar[Mapping[str, int]] = {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    }
    """The benchmark's own weights: math-prm counts as much as all subsets of code together."""
