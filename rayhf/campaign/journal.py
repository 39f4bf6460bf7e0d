"""What a round's exploration was told, so that it can be told the same again.

Every answer of an engine or a scorer is appended, in a deterministic round before it is passed on. A campaign that was killed
explores its round again from the start: the coroutines ask what they asked before (all their randomness is derived), whatever
is in the journal is answered from it, and only what is missing goes to the engines. So finished work is never lost, also inside
a half-grown tree; and since a call's answers are recorded as one, the remaining calls are the ones that an uninterrupted round
would have made, with the same batches and the same bits.

A record is length, CRC-32, and the answers of one or more calls: the length of a JSON text, the text, and the arrays that it
speaks of, end to end. It is complete or it does not count: a torn or damaged record ends the journal, and what came after is
asked again. That is also why nothing waits for the disk here: a journal saves work, commits save truth.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.campaign.files import storage_errors
from rayhf.experience import (
    Compared,
    Comparison,
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Outcome,
    Sampling,
    Scored,
    ScoreRequest,
)

_HEADER = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_FORMAT = 3
"""Where checksums start: records of another format do not count either."""
Request = GenerateRequest | ScoreRequest


class Journal:
    """The journal of one round. Raises StorageError where its file cannot be read or written.

    `making` names everything that decides how the campaign's weights come about. A journal of another making is thrown away: its
    answers are not those of the weights that are learned now, whatever version number they carry.
    """

    def __init__(self, path: Path, *, making: str = "") -> None:
        self.path = path
        self._complete = True
        """No scorer's answer was left out so far: what a scorer learns must come back in the order in which it learned."""
        self.scorer_state: Mapping[str, Any] | None = None
        """What the scorer had learned after the last recorded call of it; None where nothing was recorded."""
        self._answers: dict[str, tuple[Any, bytes]] = {}
        self._noted: list[tuple[str, Request, Any]] = []
        self._learned: Mapping[str, Any] | None = None
        with storage_errors("read", path):
            data = path.read_bytes() if path.exists() else b""
            intact = 0
            for end, record, arrays in _records(data):
                if record["making"] != making:
                    break
                intact = end
                place = 0
                for key, (row, size) in zip(record["keys"], record["answers"], strict=True):
                    self._answers[key] = row, arrays[place : place + size]
                    place += size
                self.scorer_state = record.get("scorer", self.scorer_state)
            self._making = making
            self._file = path.open("ab")
            self._file.truncate(intact)

    def __len__(self) -> int:
        """Answers that can be recalled."""
        return len(self._answers)

    def recall(self, kind: str, request: Request) -> Any:
        """The recorded answer to an equal request, once; None where there is none."""
        if not self._answers:
            return None
        found = self._answers.pop(_key(kind, request), None)
        return None if found is None else _DECODERS[kind](request, *found)

    def record(
        self, kind: str, requests: Sequence[Request], answers: Sequence[Any], scorer_state: Mapping[str, Any] | None = None
    ) -> None:
        """Append one call's answers, together."""
        self.note(kind, requests, answers, scorer_state)
        self.flush()

    def note(
        self, kind: str, requests: Sequence[Request], answers: Sequence[Any], scorer_state: Mapping[str, Any] | None = None
    ) -> None:
        """One call's answers, for the next `flush`. A call in which a scorer failed is left out, it is to be asked again, and so
        is every later one of the round."""
        if kind != "generate":
            self._complete = self._complete and not any(_failed(answer) for answer in answers)
            if not self._complete:
                return
        self._noted += [(kind, request, answer) for request, answer in zip(requests, answers, strict=True)]
        self._learned = self._learned if scorer_state is None else dict(scorer_state)

    def flush(self) -> None:
        """Append what was noted since the last time, as one record."""
        if not self._noted:
            return
        record: dict[str, Any] = {"making": self._making, "keys": [], "answers": []}
        arrays: list[bytes] = []
        for kind, request, answer in self._noted:
            row, own = _ENCODERS[kind](answer)
            record["keys"].append(_key(kind, request))
            record["answers"].append([row, sum(map(len, own))])
            arrays += own
        if self._learned is not None:
            record["scorer"] = self._learned
        self._noted, self._learned = [], None
        text = json.dumps(record).encode()
        body = b"".join([_SIZE.pack(len(text)), text, *arrays])
        with storage_errors("write", self.path):
            self._file.write(_HEADER.pack(len(body), zlib.crc32(body, _FORMAT)) + body)
            self._file.flush()

    def close(self) -> None:
        """Appends what was noted."""
        try:
            self.flush()
        finally:
            self._file.close()


def _records(data: bytes) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """(where it ends, record, its arrays) of every intact record before the first damaged one."""
    place = 0
    while place + _HEADER.size <= len(data):
        size, checksum = _HEADER.unpack_from(data, place)
        body = data[place + _HEADER.size : place + _HEADER.size + size]
        if len(body) < size or zlib.crc32(body, _FORMAT) != checksum:
            return
        place += _HEADER.size + size
        end = _SIZE.size + _SIZE.unpack_from(body)[0]
        yield place, json.loads(body[_SIZE.size : end]), body[end:]


def _key(kind: str, request: Request) -> str:
    """Of everything that an answer depends on but the weights, whose version an answer names itself."""
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(request, GenerateRequest):
        digest.update(_settings(request.policy, request.sampling) + repr(request.seeds).encode())
        digest.update(array("q", request.token_ids))
    else:
        for completion in request.completions:
            told = f"{completion.finish_reason} {len(completion.token_ids)} {len(completion.text)} {completion.text}"
            digest.update(told.encode(errors="surrogatepass"))
    prompt = request.prompt_id if isinstance(request, GenerateRequest) else request.prompt.prompt_id
    return f"{kind} {prompt} {request.number} {digest.hexdigest()}"


@lru_cache(maxsize=64)
def _settings(policy: str, sampling: Sampling) -> bytes:
    """Of the few that a round has."""
    return repr((policy, sampling)).encode()


def _failed(answer: Any) -> bool:
    return any(isinstance(each, Failed) for each in (answer if isinstance(answer, tuple) else (answer,)))


# ------------------------------------------------------------------------------------- answers as JSON, and arrays beside it

Encoded = tuple[Any, list[bytes]]


def _encode_completions(completions: Sequence[Completion]) -> Encoded:
    """Log-probs in four bytes each where that loses nothing, which is what engines give."""
    rows: list[Any] = []
    arrays: list[bytes] = []
    for c in completions:
        logprobs = array("f", c.logprobs)
        if tuple(logprobs) != c.logprobs:
            logprobs = array("d", c.logprobs)
        rows.append([c.text, len(c.token_ids), logprobs.typecode, c.finish_reason, c.policy_version])
        arrays += [array("i", c.token_ids).tobytes(), logprobs.tobytes()]
    return rows, arrays


def _decode_completions(request: GenerateRequest, rows: list[Any], data: bytes) -> tuple[Completion, ...]:
    found = []
    for index, (text, length, typecode, finish_reason, version) in enumerate(rows):
        token_ids, logprobs = array("i"), array(typecode)
        for values in (token_ids, logprobs):
            size = length * values.itemsize
            values.frombytes(data[:size])
            data = data[size:]
        found.append(
            Completion(
                prompt_id=request.prompt_id,
                index=index,
                seed=request.seeds[index],
                text=text,
                token_ids=tuple(token_ids),
                logprobs=tuple(logprobs),
                finish_reason=finish_reason,
                policy_version=version,
            )
        )
    return tuple(found)


def _encode_outcomes(outcomes: Sequence[Outcome]) -> Encoded:
    rows = [[o.value, dict(o.parts)] if isinstance(o, Scored) else [o.reason] for o in outcomes]
    return rows, []


def _decode_outcomes(request: ScoreRequest, rows: list[Any], data: bytes) -> tuple[Outcome, ...]:
    return tuple(Scored(value=row[0], parts=row[1]) if len(row) == 2 else Invalid(reason=row[0]) for row in rows)


def _encode_comparison(comparison: Comparison) -> Encoded:
    if not isinstance(comparison, Compared):
        return [comparison.reason], []
    return ["", comparison.source], [comparison.win.astype("<f8").tobytes()]


def _decode_comparison(request: ScoreRequest, row: list[Any], data: bytes) -> Comparison:
    if len(row) == 1:
        return Invalid(reason=row[0])
    size = len(request.completions)
    return Compared(win=np.frombuffer(data, dtype="<f8").reshape(size, size), source=row[1])


_ENCODERS: Mapping[str, Any] = {"generate": _encode_completions, "score": _encode_outcomes, "compare": _encode_comparison}
_DECODERS: Mapping[str, Any] = {"generate": _decode_completions, "score": _decode_outcomes, "compare": _decode_comparison}
