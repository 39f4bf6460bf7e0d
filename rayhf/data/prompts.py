"""Prompts: rows of sources, checked and rendered with the policy's chat template.

In: sources of rows (readers.py). Out: a `PromptSet`, and the batch of each iteration: a pure
function of (seed, iteration), so that the loader has no state to save. Error messages name the
source and the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from rayhf.config.sources import SourceConfig
from rayhf.data.chat import Chat, Conversation, encode_prompts, render_prompts
from rayhf.data.columns import PlacedRow, Row
from rayhf.data.conversations import parse_answer, parse_messages, parse_tools, prompt_messages
from rayhf.data.mixing import Schedule, iteration_batch, mixed_batch, shared_out
from rayhf.data.readers import Source, named_rows
from rayhf.errors import ConfigError, nearest
from rayhf.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptSet", "check_row", "iteration_batch", "load_prompts", "parse_messages"]

_CHUNK = 1024
"""Prompts that are tokenized at once."""


CHARACTERS_PER_TOKEN = 16
"""A submitted prompt with more, on average, is refused before it costs seconds of tokenizing."""


def check_row(row: Row, where: str) -> None:
    """Raise ConfigError, beginning with `where`, for a row that is not a prompt."""
    prompt_messages(row, where)
    parse_answer(row, where)


def row_id(row: Row) -> str:
    """Return the id of the prompt in a checked row. Raises ConfigError."""
    return prompt_id(parse_messages(row, "prompt"), parse_answer(row, "prompt"))


def prompt_id(
    messages: Sequence[Message], answer: str | None, *, further: Mapping[str, object] | None = None
) -> str:
    """Return 16 hex digits that depend on the content only.

    `further` is what policy and scorers see besides: the row's other columns, its scorers.
    """
    content: list[Any] = [list(map(dict, messages)), answer]
    if further:
        content.append(further)
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return _digest(text, 8)


def _digest(text: str, size: int) -> str:
    """Return a hash of `size` bytes as hex digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of one source or several, source by source in their order, without repetitions."""

    prompts: tuple[Prompt, ...]
    duplicates: int
    """Rows left out because they repeat an earlier one of their source in all columns."""
    label: str
    """Name of the source or the sources in messages."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By the name of a source; empty where there is only one."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when any prompt, its columns, the order or the mixing changes."""
        text = "".join(p.prompt_id for p in self.prompts)
        if self.weights:
            sizes = {name: len(own) for name, own in self.by_source.items()}
            text += json.dumps([dict(self.weights), sizes])
        return _digest(text, 16)

    @property
    def summary(self) -> str:
        """One line about what was read, for `rayhf check`."""
        parts = [f"{len(self.prompts):,} prompts of {self.label}"]
        if self.weights:
            total = sum(self.weights.values())
            parts = [
                f"{len(own):,} prompts of {name} ({self.weights[name] / total:.0%})"
                for name, own in self.by_source.items()
            ]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} repeated rows left out")
        return ", ".join(parts)

    @cached_property
    def by_source(self) -> dict[str, tuple[Prompt, ...]]:
        """The prompts by the name of their source, in the order of the config."""
        if not self.weights:
            return {"": self.prompts}
        groups: dict[str, list[Prompt]] = {name: [] for name in self.weights}
        for prompt in self.prompts:
            groups[prompt.source].append(prompt)
        return {name: tuple(group) for name, group in groups.items()}

    def batch(self, *, batch: int, iteration: int, seed: int) -> list[Prompt]:
        """Return the prompts of `iteration` (from 1), by the weights of the sources."""
        schedule = self._schedules.get(batch)
        if schedule is None:
            schedule = self._schedules[batch] = self._schedule(batch)
        return mixed_batch(self.by_source, schedule, iteration=iteration, seed=seed)

    def check_batches(self, *, batch: int, iterations: int, key: str) -> None:
        """Raise ConfigError where a source has fewer prompts than some iteration takes of it."""
        try:
            schedule = self._schedule(batch)
            schedule.of(min(iterations, schedule.period))
        except ValueError as error:
            if not self.weights:
                raise ConfigError(
                    f"prompts.batch is {batch}, but {self.label} has only {len(self.prompts)} "
                    f"different prompts; expected at most {len(self.prompts)}"
                ) from None
            raise ConfigError(f"{key}: {error}; lower its weight or prompts.batch") from None

    def first(self, limit: int | None) -> tuple[Prompt, ...]:
        """Return at most `limit` prompts, by the weights of the sources; None is all."""
        if limit is None:
            return self.prompts
        return tuple(shared_out(self.by_source, self._weights, limit))

    @property
    def _weights(self) -> Mapping[str, float]:
        return self.weights or {"": 1.0}

    @cached_property
    def _schedules(self) -> dict[int, Schedule]:
        return {}

    def _schedule(self, batch: int) -> Schedule:
        sizes = {name: len(own) for name, own in self.by_source.items()}
        return Schedule(self._weights, sizes, batch=batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """Makes prompts of rows.

    Args:
        tokenizer: the policy's.
        max_prompt_tokens: longest prompt.
        scorers: names that a row or a source may give as its scorers; None: any.
        tools: returns the functions of a source whose rows have none, by its name.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    scorers: Collection[str] | None = None
    tools: Callable[[str], Sequence[Mapping[str, Any]] | None] = lambda source: None

    def read(
        self, source: Source, config: SourceConfig, *, name: str, key: str
    ) -> tuple[list[Prompt], int]:
        """Return the prompts of one source, and the number of repeated rows.

        Raises ConfigError for a malformed row, for a prompt that is too long, and for an empty
        source.
        """
        prompts: dict[str, Prompt] = {}
        repeated = 0
        shared: dict[int, int] = {}  # one object for each token: a third of the memory
        for chunk in _chunks(named_rows(source, key=key)):
            parsed = {}
            for where, row in chunk:
                prompt, conversation = self._parse(row, config, name=name, where=where)
                if prompt.prompt_id in prompts or prompt.prompt_id in parsed:
                    repeated += 1
                else:
                    parsed[prompt.prompt_id] = (where, prompt, conversation)
            texts = render_prompts(self.tokenizer, [row for _, _, row in parsed.values()])
            places = [where for where, _, _ in parsed.values()]
            encoded = encode_prompts(self.tokenizer, list(zip(places, texts, strict=True)))
            for (where, prompt, _), token_ids in zip(parsed.values(), encoded, strict=True):
                self._check_length(len(token_ids), where)
                ids = tuple(shared.setdefault(token, token) for token in token_ids)
                prompts[prompt.prompt_id] = replace(prompt, token_ids=ids)
        if not prompts:
            raise ConfigError(
                f"{key}: {source.label} is empty; expected at least one row with `prompt` or "
                "`messages`"
            )
        return list(prompts.values()), repeated

    def _parse(
        self, row: Row, config: SourceConfig, *, name: str, where: str
    ) -> tuple[Prompt, Conversation]:
        """Return the row's prompt without tokens, and the conversation to render."""
        cut = config.drop_last_assistant
        messages = prompt_messages(row, where, drop_last_assistant=cut)
        answer = parse_answer(row, where)
        scorers = self._scorers(row, config, where)
        further = {k: v for k, v in row.items() if k not in ("prompt", "messages", "answer")}
        if scorers is not None:
            further["scorers"] = list(scorers)
        prompt = Prompt(
            prompt_id=prompt_id(messages, answer, further=further),
            messages=messages,
            token_ids=(),
            reference_answer=answer,
            row=row,
            source=name,
            scorers=scorers,
        )
        return prompt, (where, messages, parse_tools(row, where) or self.tools(name))

    def _check_length(self, tokens: int, where: str) -> None:
        if tokens > self.max_prompt_tokens:
            raise ConfigError(
                f"{where}: the prompt has {tokens} tokens, but the model's length minus "
                f"rollout.max_tokens leaves {self.max_prompt_tokens}; shorten it, or lower "
                "rollout.max_tokens"
            )

    def _scorers(self, row: Row, config: SourceConfig, where: str) -> tuple[str, ...] | None:
        """Return the names of the row's scorers: its column `scorers`, else those of the source."""
        names = row.get("scorers")
        if names is None:
            names = config.scorers
        if names is None:
            return None
        listed = names if isinstance(names, list | tuple) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise ConfigError(
                f"{where}: `scorers` must be a scorer's name or a list of names, got {names!r:.60}"
            )
        chosen = tuple(dict.fromkeys(listed))
        for name in chosen:
            if self.scorers is not None and name not in self.scorers:
                raise ConfigError(
                    f"{where}: `scorers` has {name!r}, which is not the name of a scorer"
                    f"{nearest(name, sorted(self.scorers))}"
                )
        return chosen


NamedSource = tuple[str, Source, SourceConfig]
"""(name, source, its settings)."""


def load_prompts(sources: Sequence[NamedSource], reader: PromptReader, *, key: str) -> PromptSet:
    """Read, check and render every prompt of the sources, which the config key `key` names.

    Args:
        sources: in the order of the config.
        reader: makes prompts of rows.
        key: for messages; a source of several is `key[number]`.

    Raises ConfigError; see `PromptReader.read`.
    """
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for number, (name, source, config) in enumerate(sources):
        own = f"{key}[{number}]" if len(sources) > 1 else key
        read, repeated = reader.read(source, config, name=name, key=own)
        duplicates += repeated
        for prompt in read:
            # A batch may have a prompt of each source: their ids must differ.
            if prompt.prompt_id in prompts:
                prompt = replace(prompt, prompt_id=_digest(f"{prompt.prompt_id} {name}", 8))
            prompts[prompt.prompt_id] = prompt
    return prompt_set(prompts.values(), sources, duplicates=duplicates)


def prompt_set(
    prompts: Iterable[Prompt], sources: Sequence[NamedSource], *, duplicates: int
) -> PromptSet:
    """Return the prompts of sources that are mixed by their weights."""
    several = len(sources) > 1
    return PromptSet(
        prompts=tuple(prompts),
        duplicates=duplicates,
        label=", ".join(source.label for _, source, _ in sources),
        weights={name: config.weight for name, _, config in sources} if several else {},
    )


def parse_prompt(row: Row, chat: Chat, *, max_prompt_tokens: int) -> Prompt:
    """Return the prompt of a row that was submitted while the campaign runs.

    Its contents are escaped: unlike a source of the config, a submission may come from anywhere.
    Raises ConfigError for a row that is not a prompt and for one that is too long.
    """
    where = f"{row['place']}, submitted by {row['source']}"
    messages = prompt_messages(row, where)
    answer = parse_answer(row, where)
    characters = sum(len(message["content"]) for message in messages)
    if characters > CHARACTERS_PER_TOKEN * max_prompt_tokens:
        raise ConfigError(
            f"{where}: the prompt has {characters:,} characters, too many for "
            f"{max_prompt_tokens:,} tokens; expected at most {CHARACTERS_PER_TOKEN} for each"
        )
    token_ids = tuple(chat.render(messages))
    if len(token_ids) > max_prompt_tokens:
        raise ConfigError(
            f"{where}: the prompt has {len(token_ids)} tokens; expected at most {max_prompt_tokens}"
        )
    return Prompt(
        prompt_id=prompt_id(messages, answer),
        messages=messages,
        token_ids=token_ids,
        reference_answer=answer,
        row={key: row[key] for key in ("prompt", "messages", "answer") if key in row},
        source="inbox",
    )


def _chunks(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk
