"""Prompts: rows of a source, checked and rendered with the policy's chat template.

In: a source of rows with `prompt` (string) or `messages` (list of {"role", "content"}), and
optionally `answer`, the reference answer. Out: a `PromptSet`, and the batch of each iteration: a
pure function of (seed, iteration), so that the loader has no state to save. Error messages name the
source and the row.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rayhf.data.chat import Chat, render
from rayhf.data.readers import Row, Source, named_rows
from rayhf.errors import ConfigError
from rayhf.types import Message, Prompt, derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Item = TypeVar("Item")


def parse_messages(row: Row, where: str) -> tuple[Message, ...]:
    """Return the conversation of a row: `prompt` as one user message, or `messages`.

    Raises ConfigError, beginning with `where`, for a row that has neither or a malformed one.
    """
    prompt = row.get("prompt")
    messages = row.get("messages")
    if (prompt is None) == (messages is None):
        keys = ", ".join(sorted(row)) or "nothing"
        raise ConfigError(
            f"{where}: expected either `prompt` (string) or `messages` (list), got keys {keys}"
        )
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"{where}: `prompt` must be a non-empty string, got {prompt!r:.60}")
        return ({"role": "user", "content": prompt},)
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: `messages` must be a non-empty list, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ConfigError(
                f"{where}: a message must have string `role` and `content`, got {message!r:.60}"
            )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _parse_answer(row: Row, where: str) -> str | None:
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise ConfigError(f"{where}: `answer` must be a string or a number, got {answer!r:.60}")
    return str(answer)


def check_row(row: Row, where: str) -> None:
    """Raise ConfigError, beginning with `where`, for a row that is not a prompt."""
    parse_messages(row, where)
    _parse_answer(row, where)


def prompt_id(messages: Sequence[Message], answer: str | None) -> str:
    """Return 16 hex digits that depend on the content only."""
    text = json.dumps([list(map(dict, messages)), answer], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts of one source in its order, without exact repetitions."""

    prompts: tuple[Prompt, ...]
    duplicates: int
    """Rows left out because they repeat an earlier one."""
    label: str
    """Name of the source in messages."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when any prompt, its reference answer, or the order changes."""
        return hashlib.blake2b(
            "".join(p.prompt_id for p in self.prompts).encode(), digest_size=16
        ).hexdigest()


def load_prompts(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, key: str, max_prompt_tokens: int
) -> PromptSet:
    """Read, check and render every prompt of `source`, which the config key `key` names.

    Raises ConfigError for a malformed row, for a prompt that is too long, and for an empty source.
    """
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for where, row in named_rows(source, key=key):
        messages = parse_messages(row, where)
        answer = _parse_answer(row, where)
        identity = prompt_id(messages, answer)
        if identity in prompts:
            duplicates += 1
            continue
        token_ids = render(tokenizer, messages, where=where)
        if len(token_ids) > max_prompt_tokens:
            raise ConfigError(
                f"{where}: the prompt has {len(token_ids)} tokens, but the model's length minus "
                f"rollout.max_tokens leaves {max_prompt_tokens}; shorten it, or lower "
                "rollout.max_tokens"
            )
        prompts[identity] = Prompt(
            prompt_id=identity, messages=messages, token_ids=token_ids, reference_answer=answer
        )
    if not prompts:
        raise ConfigError(
            f"{key}: {source.label} is empty; expected at least one row with `prompt` or `messages`"
        )
    return PromptSet(prompts=tuple(prompts.values()), duplicates=duplicates, label=source.label)


def parse_prompt(row: Row, chat: Chat, *, max_prompt_tokens: int) -> Prompt:
    """Return the prompt of a row that was submitted while the campaign runs.

    Its contents are escaped: unlike a source of the config, a submission may come from anywhere.
    Raises ConfigError for a row that is not a prompt and for one that is too long.
    """
    where = f"inbox: submitted by {row['source']}"
    messages = parse_messages(row, where)
    answer = _parse_answer(row, where)
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
    )


def iteration_batch(items: Sequence[Item], *, batch: int, iteration: int, seed: int) -> list[Item]:
    """Return the items of `iteration` (from 1): a slice of the epoch's seeded permutation.

    An epoch has len(items) // batch iterations; the remainder, a different one each epoch, is left
    out.
    """
    epoch, index = divmod(iteration - 1, len(items) // batch)
    order = list(range(len(items)))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return [items[i] for i in order[index * batch : (index + 1) * batch]]
