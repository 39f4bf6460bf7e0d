"""How the journal stores responses: for many of one type, a JSON value and arrays.

An iteration has millions of responses, so each type is stored column by column. `encode` turns
responses into columns, `decode` yields a raw response for each, and `restore` makes the response
again, from its request and the raw response.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from rayhf.episodes import StepRequest
from rayhf.types import (
    Compared,
    Comparison,
    Completion,
    GenerateRequest,
    Invalid,
    JudgeReply,
    Outcome,
    Scored,
    ScoreRequest,
    Skipped,
    TokenArray,
    float_array,
    token_array,
)

RequestT = TypeVar("RequestT", bound=GenerateRequest | ScoreRequest | StepRequest)
ResponseT = TypeVar("ResponseT")
Buffer = bytes | memoryview
Encoded = tuple[object, list[Buffer]]
"""A JSON value, and the bytes of arrays, which are not copied."""


class Codec(ABC, Generic[RequestT, ResponseT]):
    """Stores the responses of one type of request."""

    request_type: str
    """Name in the journal's file."""

    @abstractmethod
    def encode(self, responses: Sequence[ResponseT]) -> Encoded:
        """Return the responses as columns."""

    @abstractmethod
    def decode(self, columns: Any, data: bytes) -> Iterator[Any]:
        """Yield the raw responses; `columns` is parsed JSON, `data` the arrays end to end."""

    @abstractmethod
    def restore(self, request: RequestT, raw: Any) -> ResponseT:
        """Return the response to `request` from a raw one."""


class _Generate(Codec[GenerateRequest, tuple[Completion, ...]]):
    """Completions: reasons and counts as JSON, tokens, log-probs and the bytes of texts as arrays.

    As JSON, the texts of a wave would be in memory twice more.
    """

    request_type = "generate"

    def encode(self, responses: Sequence[tuple[Completion, ...]]) -> Encoded:
        completions = list(chain.from_iterable(responses))
        texts = [c.text.encode(errors="surrogatepass") for c in completions]
        columns = {
            "counts": [len(response) for response in responses],
            "text_bytes": list(map(len, texts)),
            "lengths": [len(c.token_ids) for c in completions],
            "reasons": [c.finish_reason for c in completions],
            "thinking": [c.thinking for c in completions],
            "thinking_tokens": [c.thinking_tokens for c in completions],
            "versions": [c.policy_version for c in completions],
            "runs": [_runs(c.token_versions) for c in completions],
        }
        arrays: list[Buffer] = []
        arrays += (c.token_ids.astype("<i4", copy=False).view(np.uint8).data for c in completions)
        arrays += (c.logprobs.astype("<f4", copy=False).view(np.uint8).data for c in completions)
        return columns, arrays + texts

    def decode(self, columns: Any, data: bytes) -> Iterator[Any]:
        size = 4 * sum(columns["lengths"])
        tokens = np.frombuffer(data[:size], dtype="<i4")
        logprobs = np.frombuffer(data[size : 2 * size], dtype="<f4")
        names = ("reasons", "versions", "runs", "thinking", "thinking_tokens")
        start = 0
        text_start = 2 * size
        rows = []
        for length, text_bytes, *values in zip(
            columns["lengths"],
            columns["text_bytes"],
            *(columns[name] for name in names),
            strict=True,
        ):
            end = start + length
            text_end = text_start + text_bytes
            text = data[text_start:text_end].decode(errors="surrogatepass")
            rows.append((text, *values, tokens[start:end], logprobs[start:end]))
            start = end
            text_start = text_end
        remaining = iter(rows)
        return ([next(remaining) for _ in range(count)] for count in columns["counts"])

    def restore(self, request: GenerateRequest, raw: Any) -> tuple[Completion, ...]:
        return tuple(
            Completion(
                prompt_id=request.prompt_id,
                index=index,
                seed=request.seeds[index],
                text=text,
                token_ids=token_array(token_ids),
                logprobs=float_array(logprobs),
                finish_reason=finish_reason,
                policy_version=version,
                token_versions=_from_runs(runs),
                thinking=thinking,
                thinking_tokens=thinking_tokens,
            )
            for index, (
                text,
                finish_reason,
                version,
                runs,
                thinking,
                thinking_tokens,
                token_ids,
                logprobs,
            ) in enumerate(raw)
        )


def _runs(versions: TokenArray | None) -> list[list[int]] | None:
    """Return the versions of runs of tokens, and the runs' lengths."""
    if versions is None:
        return None
    starts = np.flatnonzero(np.diff(versions, prepend=-1))
    lengths = np.diff(starts, append=len(versions))
    return [versions[starts].tolist(), lengths.tolist()]


def _from_runs(runs: list[list[int]] | None) -> TokenArray | None:
    if runs is None:
        return None
    versions, lengths = runs
    return token_array(np.repeat(versions, lengths))


class _Score(Codec[ScoreRequest, tuple[Outcome, ...]]):
    """Outcomes: a score is a number, with parts or replies a list, an Invalid its reason.

    A Skipped has its reason in a list of its own.
    """

    request_type = "score"

    def encode(self, responses: Sequence[tuple[Outcome, ...]]) -> Encoded:
        return [[_encode_outcome(outcome) for outcome in outcomes] for outcomes in responses], []

    def decode(self, columns: Any, data: bytes) -> Iterator[Any]:
        yield from columns

    def restore(self, request: ScoreRequest, raw: Any) -> tuple[Outcome, ...]:
        return tuple(map(_restore_outcome, raw))


def _encode_outcome(outcome: Outcome) -> object:
    if isinstance(outcome, Skipped):
        return [outcome.reason]
    if not isinstance(outcome, Scored):
        return outcome.reason
    if outcome.parts or outcome.replies:
        return [outcome.value, dict(outcome.parts), _encode_replies(outcome.replies)]
    return outcome.value


def _restore_outcome(raw: Any) -> Outcome:
    if isinstance(raw, str):
        return Invalid(reason=raw)
    if isinstance(raw, list) and len(raw) == 1:
        return Skipped(reason=raw[0])
    if isinstance(raw, list):
        value, parts, replies = raw
        return Scored(value=value, parts=parts, replies=_restore_replies(replies))
    return Scored(value=raw)


def _encode_replies(replies: Sequence[JudgeReply]) -> list[object]:
    return [[reply.text, reply.part, reply.against, reply.left_out] for reply in replies]


def _restore_replies(raw: Any) -> tuple[JudgeReply, ...]:
    return tuple(
        JudgeReply(text=text, part=part, against=against, left_out=left_out)
        for text, part, against, left_out in raw
    )


class _Compare(Codec[ScoreRequest, Comparison]):
    """Comparisons: source, size and replies as JSON and the matrix as an array; or a reason."""

    request_type = "compare"

    def encode(self, responses: Sequence[Comparison]) -> Encoded:
        columns = [
            [response.source, len(response.win), list(map(_encode_replies, response.replies))]
            if isinstance(response, Compared)
            else response.reason
            for response in responses
        ]
        matrices: list[Buffer] = [
            response.win.astype("<f8").tobytes()
            for response in responses
            if isinstance(response, Compared)
        ]
        return columns, matrices

    def decode(self, columns: Any, data: bytes) -> Iterator[Any]:
        for row in columns:
            if isinstance(row, str):
                yield row
                continue
            source, size, replies = row
            end = 8 * size * size
            yield source, np.frombuffer(data[:end], dtype="<f8").reshape(size, size), replies
            data = data[end:]

    def restore(self, request: ScoreRequest, raw: Any) -> Comparison:
        if isinstance(raw, str):
            return Invalid(reason=raw)
        source, win, replies = raw
        return Compared(win=win, source=source, replies=tuple(map(_restore_replies, replies)))


GENERATE = _Generate()
SCORE = _Score()
COMPARE = _Compare()
CODECS: dict[str, Codec[Any, Any]] = {
    codec.request_type: codec for codec in (GENERATE, SCORE, COMPARE)
}
