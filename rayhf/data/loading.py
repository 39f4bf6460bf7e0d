"""From the sources of a config to its prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayhf.config.sources import SourceConfig, source_names
from rayhf.data.prompts import NamedSource, PromptReader, PromptSet, load_prompts
from rayhf.data.readers import open_source
from rayhf.data.template import check_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLoader:
    """Loads prompts for one policy; see `load`."""

    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    max_prompt_tokens: int
    """Longest prompt."""
    embeddings: int | None = None
    """Number of tokens that the model has embeddings for; None where it is not known."""
    base: Path
    """Start of relative paths."""
    commits: MutableMapping[str, str]
    """Commits of hub data sets by name; those that are missing are added."""
    tools: Callable[[str], Sequence[Mapping[str, Any]] | None] = lambda source: None
    """Returns the functions that a source's prompts are rendered with, besides rows that have their
    own."""

    def open(self, sources: Sequence[SourceConfig], key: str) -> list[NamedSource]:
        """Open the sources of the config key `key`. Raises ConfigError."""
        opened = []
        for number, (name, config) in enumerate(
            zip(source_names(tuple(sources)), sources, strict=True)
        ):
            own = f"{key}[{number}]" if len(sources) > 1 else key
            source = open_source(config, base=self.base, key=own, commits=self.commits)
            opened.append((name, source, config))
        return opened

    def load(
        self, sources: Sequence[SourceConfig], *, key: str, scorers: Collection[str]
    ) -> PromptSet:
        """Open the sources of the config key `key` and read their prompts.

        `scorers` are the names that rows may give. Raises ConfigError.
        """
        opened = self.open(sources, key)
        reader = PromptReader(
            tokenizer=self.tokenizer,
            max_prompt_tokens=self.max_prompt_tokens,
            scorers=scorers,
            tools=self.tools,
        )
        prompts = load_prompts(opened, reader, key=key)
        check_embeddings(prompts.prompts, self.tokenizer, self.embeddings, where=key)
        return prompts
