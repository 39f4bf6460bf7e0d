"""Preference pairs from a file: read, checked, and encoded as training examples.

A row has `prompt` or `messages`, `chosen` and `rejected` (texts or messages, see
rayhf/data/responses.py), and optionally `margin` (how much better, 0 or more), `score_chosen`
and `score_rejected` (ratings).
Error messages name the file and the row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayhf.data.chat import Chat
from rayhf.data.columns import Row
from rayhf.data.examples import EncodedExample, EncodedRow, content_id, encoded_row
from rayhf.data.mixing import iteration_batch
from rayhf.data.prompts import prompt_id
from rayhf.data.readers import read_rows
from rayhf.data.responses import completion_of, pair_of, prompt_of
from rayhf.errors import ConfigError
from rayhf.types import Example, Message, given_row

_ORDER_SEED = 20240503
"""An arbitrary number that fixes the order in which given pairs are trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """Two completions of one prompt as text, the better one first."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    """How much better, 0 or more."""
    score_chosen: float | None = None
    score_rejected: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """Pairs of one file, in file order."""

    pairs: tuple[TextPair, ...]
    places: tuple[str, ...]
    """How error messages name the row of each pair."""
    identical: int
    """Rows left out because both texts are the same: no preference."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when any pair or the order changes."""
        return hashlib.blake2b(
            repr(self.pairs).encode("utf-8", "surrogatepass"), digest_size=16
        ).hexdigest()


def load_pairs(path: Path, *, key: str) -> PairSet:
    """Read and check every pair of a file, which the config key `key` names.

    Raises ConfigError for a malformed row, and where no usable pair is left.
    """
    pairs: list[TextPair] = []
    places: list[str] = []
    identical = 0
    for where, row in read_rows(path, key=key):
        pair = parse_pair(row, where)
        if pair.chosen == pair.rejected:
            identical += 1
            continue
        pairs.append(pair)
        places.append(where)
    if not pairs:
        reason = f"all {identical} rows have equal texts" if identical else "it is empty"
        raise ConfigError(
            f"{key}: {path} has no usable pair ({reason}); expected rows with `prompt`, `chosen` "
            "and `rejected`"
        )
    return PairSet(pairs=tuple(pairs), places=tuple(places), identical=identical)


def parse_pair(row: Row, where: str) -> TextPair:
    """Return the pair of a row. Raises ConfigError, beginning with `where`."""
    messages, chosen, rejected = pair_of(row, where)
    margin = _number(row, "margin", where)
    if margin is not None and margin < 0:
        raise ConfigError(f"{where}: `margin` is {margin:g}; expected 0 or more")
    return TextPair(
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        score_chosen=_number(row, "score_chosen", where),
        score_rejected=_number(row, "score_rejected", where),
    )


def _number(row: Row, field: str, where: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: `{field}` must be a finite number, got {value!r:.40}")
    return float(value)


def encode_pairs(pairs: Sequence[TextPair], chat: Chat, *, key: str) -> tuple[Example, ...]:
    """Return each pair as an example of the policy, with the rows (chosen, rejected).

    Raises ConfigError for a pair that is longer than the model's sequences.
    """
    examples = []
    for number, pair in enumerate(pairs, start=1):
        # Without a reference answer: a pair file has none, and the prompt's id depends on it.
        identity = prompt_id(pair.messages, None)
        prompt = chat.render_given(pair.messages)
        rows = tuple(
            given_row(identity, prompt, chat.encode_response(pair.messages, text))
            for text in (pair.chosen, pair.rejected)
        )
        longest = max(len(row) for row in rows)
        if longest > chat.max_length:
            raise ConfigError(
                f"{key}: pair {number} has {longest} tokens, but the model takes at most "
                f"{chat.max_length}; leave it out"
            )
        examples.append(
            Example(rows=rows, scalars={} if pair.margin is None else {"margin": pair.margin})
        )
    return tuple(examples)


def encode_pair(row: Row, where: str, chat: Chat) -> EncodedExample | None:
    """Return a row's pair with the rows (chosen, rejected); None where both texts are the same.

    Raises ConfigError, beginning with `where`, for a malformed row.
    """
    pair = parse_pair(row, where)
    if pair.chosen == pair.rejected:
        return None
    return EncodedExample(
        prompt_id=content_id("pair", pair.messages, pair.chosen, pair.rejected),
        rows=_responses(pair.messages, (pair.chosen, pair.rejected), chat),
        scalars={} if pair.margin is None else {"margin": pair.margin},
    )


def encode_labeled(row: Row, where: str, chat: Chat) -> list[EncodedExample]:
    """Return a row's response with the scalar `desirable`, 1 or 0.

    A row has a prompt, `completion` (or `response`) and `label` (true or false). A pair counts as
    two: `chosen` with true and `rejected` with false. Raises ConfigError, beginning with `where`,
    for a malformed row.
    """
    if row.get("chosen") is not None:
        messages, chosen, rejected = pair_of(row, where)
        labeled = [(chosen, True), (rejected, False)]
    else:
        completion = completion_of(row, prompt_of(row, where), where)
        label = row.get("label")
        if completion is None or label not in (True, False):
            raise ConfigError(
                f"{where}: expected `prompt`, `completion` and `label` (true or false), or a pair "
                f"with `chosen` and `rejected`, got keys {', '.join(sorted(row))}"
                + (f" and label {label!r:.20}" if "label" in row else "")
            )
        messages, text = completion
        labeled = [(text, bool(label))]
    return [
        EncodedExample(
            prompt_id=content_id("labeled", messages, text, label),
            rows=_responses(messages, (text,), chat),
            scalars={"desirable": float(label)},
        )
        for text, label in labeled
    ]


def _responses(
    messages: Sequence[Message], texts: Sequence[str], chat: Chat
) -> tuple[EncodedRow, ...]:
    prompt = chat.render_given(messages)
    return tuple(encoded_row(prompt, chat.encode_response(messages, text)) for text in texts)


def iteration_pairs(
    pairs: Sequence[Example], *, share: float, prompts: int, iteration: int
) -> list[Example]:
    """Return an iteration's part of the given pairs: `share` pairs per prompt.

    The order depends on the file's order only, and no pair comes twice before all came once.
    """
    batch = min(round(share * prompts), len(pairs))
    if not batch:
        return []
    return iteration_batch(pairs, batch=batch, iteration=iteration, seed=_ORDER_SEED)
