"""Training examples from a source: what algorithms train on that generate nothing.

In: a source of rows, and a function that encodes one row. Out: a `PromptSet` with one prompt per
example, from which the iterations draw, and the examples themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rayhf.data.chat import Chat
from rayhf.data.prompts import NamedSource, PromptSet, prompt_set
from rayhf.data.readers import Row as DataRow
from rayhf.data.readers import named_rows
from rayhf.errors import ConfigError
from rayhf.types import Example, Prompt, Row, TokenArray, given_row, token_array


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """A prompt and a response in four bytes per token: all rows of a source are in memory."""

    prompt_ids: TokenArray
    response_ids: TokenArray
    mask: npt.NDArray[np.bool_] | None = None
    """Response tokens that are trained on; None: all."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of response tokens that are trained on."""
        return len(self.response_ids) if self.mask is None else int(self.mask.sum())

    def row(self, prompt_id: str) -> Row:
        """Return the training row, with the token value `mask` where there is a mask."""
        row = given_row(prompt_id, self.prompt_ids, self.response_ids)
        return row if self.mask is None else row.with_tokens(mask=self.mask.astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample:
    """Rows that are trained on together."""

    prompt_id: str
    """Hash of the content: prompt, responses and label."""
    rows: tuple[EncodedRow, ...]
    scalars: Mapping[str, float] = field(default_factory=dict)

    def example(self) -> Example:
        """Return the training example."""
        return Example(
            rows=tuple(row.row(self.prompt_id) for row in self.rows), scalars=self.scalars
        )


def encoded_row(
    prompt_ids: Sequence[int], response_ids: Sequence[int], mask: Sequence[bool] | None = None
) -> EncodedRow:
    """Return a row from token ids."""
    return EncodedRow(
        prompt_ids=token_array(prompt_ids),
        response_ids=token_array(response_ids),
        mask=None if mask is None else np.asarray(mask, dtype=np.bool_),
    )


def content_id(*parts: object) -> str:
    """Return 16 hex digits that depend on the content only."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=dict)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def fits(rows: Sequence[EncodedRow], chat: Chat, where: str, *, drop: bool) -> bool:
    """Return whether the model takes all rows of an example.

    Raises ConfigError, beginning with `where`, for one that is too long, unless `drop`.
    """
    longest = max(len(row) for row in rows)
    if longest <= chat.max_length:
        return True
    if drop:
        return False
    raise ConfigError(
        f"{where}: {longest} tokens, but the model takes at most {chat.max_length}; shorten the "
        "row, or set algorithm.too_long: drop"
    )


Encode = Callable[[DataRow, str, Chat], Sequence[EncodedExample]]
"""(row, how error messages name it, chat template) -> its examples."""


def load_examples(
    sources: Sequence[NamedSource], encode: Encode, chat: Chat, *, key: str
) -> tuple[PromptSet, tuple[EncodedExample, ...]]:
    """Encode every row of the config key `key`; exact repeats are left out.

    Raises ConfigError for a row that cannot be encoded, and where a source has no example.
    """
    examples: dict[str, EncodedExample] = {}
    prompts: list[Prompt] = []
    duplicates = 0
    for name, source, _ in sources:
        before = len(examples)
        rows = 0
        for where, row in named_rows(source, key=key):
            rows += 1
            for example in encode(row, where, chat):
                if example.prompt_id in examples:
                    duplicates += 1
                    continue
                examples[example.prompt_id] = example
                prompts.append(
                    Prompt(prompt_id=example.prompt_id, messages=(), token_ids=(), source=name)
                )
        if len(examples) == before:
            raise ConfigError(f"{key}: none of the {rows} rows of {source.label} can be trained on")
    return prompt_set(prompts, sources, duplicates=duplicates), tuple(examples.values())
