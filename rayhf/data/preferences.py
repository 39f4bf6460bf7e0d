"""Preference pairs from a file: read, checked, and encoded as training examples.

A row has `prompt` (string) or `messages` (list), `chosen` and `rejected` (different texts), and
optionally `margin` (how much better, 0 or more), `score_chosen` and `score_rejected` (ratings).
Every refused row is named by file and row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayhf.data.prompts import Chat, deal, parse_messages, prompt_id, read_rows
from rayhf.errors import ConfigError
from rayhf.types import Example, Message, given_row

_DEALING_SEED = 20240503
"""Any number: it fixes the order in which given pairs are dealt."""
_OPTIONAL = ("margin", "score_chosen", "score_rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """Two answers to one prompt, the better one first."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    """How much better, 0 or more."""
    score_chosen: float | None = None
    score_rejected: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """The pairs of one file, in file order."""

    pairs: tuple[TextPair, ...]
    identical: int
    """Rows left out because both answers are the same text: no preference."""

    @property
    def fingerprint(self) -> str:
        """Changes when any pair or the order changes."""
        return hashlib.blake2b(
            repr(self.pairs).encode("utf-8", "surrogatepass"), digest_size=16
        ).hexdigest()


def load_pairs(path: Path, *, key: str) -> PairSet:
    """Read and check every pair. Raises ConfigError for a bad row, or where no usable pair is
    left."""
    pairs: list[TextPair] = []
    identical = 0
    for where, row in read_rows(path, key=key):
        messages = parse_messages(row, where, key)
        for field in ("chosen", "rejected"):
            if not isinstance(row.get(field), str):
                raise ConfigError(
                    f"{key}: {where}: expected `{field}` (string), got keys {', '.join(sorted(row))}"
                )
        numbers = {field: _number(row.get(field), field, f"{key}: {where}") for field in _OPTIONAL}
        if numbers["margin"] is not None and numbers["margin"] < 0:
            raise ConfigError(
                f"{key}: {where}: `margin` is {numbers['margin']:g}; expected 0 or more"
            )
        if row["chosen"] == row["rejected"]:
            identical += 1
            continue
        pairs.append(
            TextPair(messages=messages, chosen=row["chosen"], rejected=row["rejected"], **numbers)
        )
    if not pairs:
        why = f"all {identical} rows have equal answers" if identical else "it is empty"
        raise ConfigError(
            f"{key}: {path} has no usable pair ({why}); expected rows with `prompt`, `chosen` and `rejected`"
        )
    return PairSet(pairs=tuple(pairs), identical=identical)


def _number(value: Any, field: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: `{field}` must be a finite number, got {value!r:.40}")
    return float(value)


def encode_pairs(pairs: Sequence[TextPair], chat: Chat, *, key: str) -> tuple[Example, ...]:
    """(chosen, rejected) examples for the policy. Raises ConfigError for a pair that is longer than
    the model's sequences."""
    examples = []
    for number, pair in enumerate(pairs, start=1):
        # No answer: a pair file has none, and the id of a prompt with one differs all the same.
        identity, prompt = prompt_id(pair.messages, None), chat.render(pair.messages)
        rows = tuple(
            given_row(identity, prompt, chat.answer(pair.messages, text))
            for text in (pair.chosen, pair.rejected)
        )
        longest = max(len(row) for row in rows)
        if longest > chat.max_length:
            raise ConfigError(
                f"{key}: pair {number} has {longest} tokens, the model takes {chat.max_length}; leave it out"
            )
        examples.append(
            Example(rows=rows, scalars={} if pair.margin is None else {"margin": pair.margin})
        )
    return tuple(examples)


def deal_pairs(
    pairs: Sequence[Example], *, share: float, prompts: int, iteration: int
) -> list[Example]:
    """A round's part of the given pairs, `share` per prompt: consecutive slices of a permutation,
    one permutation per pass.

    Seeded by nothing but the file's order: no pair comes again before all came once.
    """
    count = min(round(share * prompts), len(pairs))
    return deal(pairs, batch=count, iteration=iteration, seed=_DEALING_SEED) if count else []
