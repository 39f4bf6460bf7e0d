"""User files in, `Prompt`s out: reads JSONL or Parquet, renders the policy's chat template, and
deals prompts to rounds.

A row has `prompt` (string) or `messages` (list of {"role", "content"}), and optionally `answer`.
Every refused row is named by file and row. The loader is a pure function of (seed, iteration), so
its cursor needs no state beyond the iteration number.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rayhf.errors import ConfigError
from rayhf.types import Message, Prompt, derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Item = TypeVar("Item")


def read_rows(path: Path, *, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for each record; `key` is the config key that named the file."""
    if not path.is_file():
        raise ConfigError(f"{key}: no such file {path}; expected a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path, key=key)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{key}: {path} has ending {path.suffix!r}; expected .jsonl or .parquet")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} row {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise ConfigError(f"{key}: {where}: not valid UTF-8") from None
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{key}: {where}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None
            if not isinstance(row, dict):
                raise ConfigError(f"{key}: {where}: expected an object, got {type(row).__name__}")
            yield where, row


def _read_parquet(path: Path, *, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"{key}: {path}: not a Parquet file ({str(error).splitlines()[0]})"
        ) from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def parse_messages(row: dict[str, Any], where: str, key: str) -> tuple[Message, ...]:
    """The conversation of a row: `prompt` as one user message, or `messages`. Raises ConfigError
    naming the row."""
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        got = ", ".join(sorted(row)) or "nothing"
        raise ConfigError(
            f"{key}: {where}: expected either `prompt` (string) or `messages` (list), got keys {got}"
        )
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(
                f"{key}: {where}: `prompt` must be a non-empty string, got {prompt!r:.60}"
            )
        return ({"role": "user", "content": prompt},)
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f"{key}: {where}: `messages` must be a non-empty list, got {messages!r:.60}"
        )
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ConfigError(
                f"{key}: {where}: a message must have string `role` and `content`, got {message!r:.60}"
            )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _parse_answer(row: dict[str, Any], where: str, key: str) -> str | None:
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise ConfigError(
            f"{key}: {where}: `answer` must be a string or a number, got {answer!r:.60}"
        )
    return str(answer)


def check_row(row: dict[str, Any], where: str, key: str) -> None:
    """Raises ConfigError for a row that is no prompt."""
    parse_messages(row, where, key)
    _parse_answer(row, where, key)


def prompt_id(messages: Sequence[Message], answer: str | None) -> str:
    """16 hex digits that depend only on the content."""
    text = json.dumps([list(map(dict, messages)), answer], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one file, in file order, without exact repetitions."""

    prompts: tuple[Prompt, ...]
    duplicates: int
    """Rows left out because an equal one came before."""

    @property
    def fingerprint(self) -> str:
        """Changes when any prompt, its answer, or the order changes."""
        return hashlib.blake2b(
            "".join(p.prompt_id for p in self.prompts).encode(), digest_size=16
        ).hexdigest()


def load_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, key: str, max_prompt_tokens: int
) -> PromptSet:
    """Read, render and check every prompt. Raises ConfigError for a bad row or too long a
    prompt."""
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for where, row in read_rows(path, key=key):
        messages, answer = parse_messages(row, where, key), _parse_answer(row, where, key)
        identity = prompt_id(messages, answer)
        if identity in prompts:
            duplicates += 1
            continue
        token_ids = render(tokenizer, messages, where=f"{key}: {where}")
        if len(token_ids) > max_prompt_tokens:
            raise ConfigError(
                f"{key}: {where}: the prompt has {len(token_ids)} tokens, but the model's length minus rollout.max_tokens leaves "
                f"{max_prompt_tokens}; shorten it, or lower rollout.max_tokens"
            )
        prompts[identity] = Prompt(
            prompt_id=identity, messages=messages, token_ids=token_ids, answer=answer
        )
    if not prompts:
        raise ConfigError(
            f"{key}: {path} is empty; expected at least one row with `prompt` or `messages`"
        )
    return PromptSet(prompts=tuple(prompts.values()), duplicates=duplicates)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> tuple[int, ...]:
    """Token ids of the chat template with the generation prompt; the template's own special tokens,
    none added twice."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ConfigError(f"{where}: the chat template refuses the messages ({error})") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def parse_prompt(row: dict[str, Any], chat: Chat, *, max_prompt_tokens: int) -> Prompt:
    """A prompt that somebody handed in, contents disarmed: unlike a file of the user's own it may
    come from anybody.

    Raises ConfigError for one that cannot be asked.
    """
    where = f"handed in by {row['source']}"
    messages, answer = parse_messages(row, where, "inbox"), _parse_answer(row, where, "inbox")
    token_ids = tuple(chat.render(messages))
    if len(token_ids) > max_prompt_tokens:
        raise ConfigError(
            f"inbox: {where}: the prompt has {len(token_ids)} tokens; expected at most {max_prompt_tokens}"
        )
    return Prompt(
        prompt_id=prompt_id(messages, answer), messages=messages, token_ids=token_ids, answer=answer
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every special token that a text could spell, longer ones first."""
    found = {
        *tokenizer.all_special_tokens,
        *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special),
    }
    return sorted(
        (token for token in found if len(token) > 1), key=lambda token: (-len(token), token)
    )


def disarming(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that takes every special token in a text apart: what a model wrote cannot end a
    turn in another's prompt."""
    special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)")

    def disarm(text: str) -> str:
        while special.search(text):  # again: tokens may overlap
            text = special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    return disarm


class Chat:
    """The policy's chat template, for what a campaign renders on the way: other conversations than
    the prompts, given answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._tokenizer, self._disarm = tokenizer, disarming(tokenizer)
        self.max_length = max_length
        """Tokens of prompt and response together."""

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """With the generation prompt, contents disarmed. Raises ConfigError where the template
        refuses the messages."""
        tame = [{"role": m["role"], "content": self._disarm(m["content"])} for m in messages]
        return render(self._tokenizer, tame, where="chat template")

    def text(self, token_ids: Sequence[int]) -> str:
        """What an engine calls the text of a completion with these tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def answer(self, messages: Sequence[Message], text: str) -> tuple[int, ...]:
        """Token ids of `text` as the answer to `messages`, with everything the template puts at the
        end of a turn.

        Raises ConfigError where the template does not begin the conversation with answer by the one
        without.
        """
        asked = str(
            self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        )
        whole = [*map(dict, messages), {"role": "assistant", "content": text}]
        told = str(
            self._tokenizer.apply_chat_template(whole, add_generation_prompt=False, tokenize=False)
        )
        if not told.startswith(asked):
            raise ConfigError(
                "policy.model: the chat template renders an answered conversation differently from its prompt "
                f"({asked[-40:]!r} is not how {told[: len(asked)][-40:]!r} ends); given answers cannot be trained on with it"
            )
        # Templates may end a turn with white space after the end-of-turn token, which the model
        # never writes itself.
        ending = self._tokenizer.eos_token
        rest = told[len(asked) :]
        if ending and (end := rest.rfind(ending)) >= 0 and not rest[end + len(ending) :].strip():
            rest = rest[: end + len(ending)]
        return tuple(self._tokenizer(rest, add_special_tokens=False)["input_ids"])


def deal(prompts: Sequence[Item], *, batch: int, iteration: int, seed: int) -> list[Item]:
    """The prompts of round `iteration` (from 1): consecutive slices of a seeded permutation, one
    permutation per epoch.

    An epoch has len(prompts) // batch rounds; the remainder sits out, a different one each epoch.
    """
    epoch, turn = divmod(iteration - 1, len(prompts) // batch)
    order = list(range(len(prompts)))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return [prompts[index] for index in order[turn * batch : (turn + 1) * batch]]
