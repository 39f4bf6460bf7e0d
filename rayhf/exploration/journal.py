"""What a round's exploration was told, so that it can be told the same again.

Every answer of an engine or a scorer is appended, in a deterministic round before it is passed on.
A campaign that was killed explores its round again from the start: the coroutines ask what they
asked before (all their randomness is derived), whatever is in the journal is answered from it, and
only what is missing goes to the engines. So finished work is never lost, also inside a half-grown
tree; and since a call's answers are recorded as one, the remaining calls are the ones that an
uninterrupted round would have made, with the same batches and the same bits.

A record is length, CRC-32, and the answers of one or more calls: the length of a JSON text, the
text, and the arrays that it speaks of, end to end. Of each kind of question it has the keys and the
answers, column by column, as a round has millions of them. It is complete or it does not count: a
torn or damaged record ends the journal, and what came after is asked again. That is also why
nothing waits for the disk here: a journal saves work, commits save truth.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.run_dir.files import storage_errors
from rayhf.types import (
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
_FORMAT = 4
"""Where checksums start: records of another format do not count either."""
_KEY_BYTES = 16
_JSON = json.JSONEncoder(check_circular=False)
"""What is written refers to nothing that refers to it; to look for that takes longer than to
write."""
Request = GenerateRequest | ScoreRequest


class Journal:
    """The journal of one round. Raises StorageError where its file cannot be read or written.

    `making` names everything that decides how the campaign's weights come about. A journal of
    another making is thrown away: its answers are not those of the weights that are learned now,
    whatever version number they carry.
    """

    def __init__(self, path: Path, *, making: str = "") -> None:
        self.path = path
        self._complete = True
        """No scorer's answer was left out so far: what a scorer learns must come back in the order
        in which it learned."""
        self.scorer_state: Mapping[str, Any] | None = None
        """What the scorer had learned after the last recorded call of it; None where nothing was
        recorded."""
        self._answers: dict[bytes, Any] = {}
        self._noted: dict[str, tuple[list[Request], list[Any]]] = {
            kind: ([], []) for kind in _ENCODERS
        }
        self._learned: Mapping[str, Any] | None = None
        with storage_errors("read", path):
            data = path.read_bytes() if path.exists() else b""
            intact = 0
            for end, record, arrays in _records(data):
                if record["making"] != making:
                    break
                intact = end
                for kind, (told, sizes) in record["answers"].items():
                    keys, columns, arrays = (
                        arrays[: sizes[0]],
                        arrays[sizes[0] : sum(sizes)],
                        arrays[sum(sizes) :],
                    )
                    self._answers |= zip(
                        _cut(keys, _KEY_BYTES), _DECODERS[kind](told, columns), strict=True
                    )
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
        return None if found is None else _TELLERS[kind](request, found)

    def record(
        self,
        kind: str,
        requests: Sequence[Request],
        answers: Sequence[Any],
        scorer_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one call's answers, together."""
        self.note(kind, requests, answers, scorer_state)
        self.flush()

    def note(
        self,
        kind: str,
        requests: Sequence[Request],
        answers: Sequence[Any],
        scorer_state: Mapping[str, Any] | None = None,
    ) -> None:
        """One call's answers, for the next `flush`. A call in which a scorer failed is left out, it
        is to be asked again, and so is every later one of the round."""
        if kind != "generate":
            self._complete = self._complete and not any(_failed(answer) for answer in answers)
            if not self._complete:
                return
        if len(requests) != len(answers):
            raise ValueError(f"{len(answers)} answers to {len(requests)} requests")
        asked, told = self._noted[kind]
        asked += requests
        told += answers
        self._learned = self._learned if scorer_state is None else dict(scorer_state)

    def flush(self) -> None:
        """Append what was noted since the last time, as one record."""
        noted = {kind: both for kind, both in self._noted.items() if both[0]}
        if not noted:
            return
        record: dict[str, Any] = {"making": self._making, "answers": {}}
        arrays: list[bytes] = []
        for kind, (requests, answers) in noted.items():
            told, columns = _ENCODERS[kind](answers)
            keys = [_key(kind, request) for request in requests]
            record["answers"][kind] = told, (_KEY_BYTES * len(keys), sum(map(len, columns)))
            arrays += keys
            arrays += columns
            self._noted[kind] = [], []
        if self._learned is not None:
            record["scorer"] = self._learned
        self._learned = None
        text = _JSON.encode(record).encode()
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


def _key(kind: str, request: Request) -> bytes:
    """Of everything that an answer depends on but the weights, whose version an answer names
    itself."""
    if isinstance(request, GenerateRequest):
        told = (
            f"{kind} {request.number} {len(request.prompt_id)} {request.prompt_id} {request.seeds}"
        )
        data = b"".join(
            (
                told.encode(),
                _settings(request.policy, request.sampling),
                array("q", request.token_ids),
            )
        )
    else:
        prompt = request.prompt.prompt_id
        told = f"{kind} {request.number} {len(prompt)} {prompt}"
        for c in request.completions:
            told += f" {c.finish_reason} {len(c.token_ids)} {len(c.text)} {c.text}"
        data = told.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()


@lru_cache(maxsize=64)
def _settings(policy: str, sampling: Sampling) -> bytes:
    """Of the few that a round has."""
    return repr((policy, sampling)).encode()


def _failed(answer: Any) -> bool:
    return any(
        isinstance(each, Failed) for each in (answer if isinstance(answer, tuple) else (answer,))
    )


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[place : place + size] for place in range(0, len(data), size))


# ------------------------------------------------ many answers as a JSON text and arrays, what these have for each, and an answer


def _encode_completions(answers: Iterable[Sequence[Completion]]) -> tuple[Any, list[bytes]]:
    """Log-probs in four bytes each where that loses nothing, which is what engines give."""
    found = list(chain.from_iterable(answers))
    columns = {
        "counts": [len(answer) for answer in answers],
        "texts": [c.text for c in found],
        "lengths": [len(c.token_ids) for c in found],
        "reasons": [c.finish_reason for c in found],
        "versions": [c.policy_version for c in found],
    }
    logprobs = np.frombuffer(array("d", list(chain.from_iterable(c.logprobs for c in found))))
    short = logprobs.astype("<f4")
    columns["logprobs"] = "<f4" if (short == logprobs).all() else "<f8"
    tokens = array("i", list(chain.from_iterable(c.token_ids for c in found)))
    return columns, [
        tokens.tobytes(),
        (short if columns["logprobs"] == "<f4" else logprobs).tobytes(),
    ]


def _decode_completions(columns: Any, data: bytes) -> Iterator[Any]:
    size = 4 * sum(columns["lengths"])
    tokens, logprobs = (
        np.frombuffer(data[:size], dtype="<i4"),
        np.frombuffer(data[size:], dtype=columns["logprobs"]),
    )
    place, rows = 0, []
    for row in zip(
        *(columns[name] for name in ("texts", "reasons", "versions", "lengths")), strict=True
    ):
        end = place + row[-1]
        rows.append((*row[:3], tokens[place:end], logprobs[place:end]))
        place = end
    each = iter(rows)
    return ([next(each) for _ in range(count)] for count in columns["counts"])


def _completions(request: GenerateRequest, rows: Any) -> tuple[Completion, ...]:
    return tuple(
        Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=request.seeds[index],
            text=text,
            token_ids=tuple(token_ids.tolist()),
            logprobs=tuple(logprobs.tolist()),
            finish_reason=finish_reason,
            policy_version=version,
        )
        for index, (text, finish_reason, version, token_ids, logprobs) in enumerate(rows)
    )


def _encode_outcomes(answers: Iterable[Sequence[Outcome]]) -> tuple[Any, list[bytes]]:
    """A score without parts is a number, one with them a list, and what is no score a reason."""
    return [[_outcome(outcome) for outcome in outcomes] for outcomes in answers], []


def _outcome(outcome: Outcome) -> Any:
    if not isinstance(outcome, Scored):
        return outcome.reason
    return [outcome.value, dict(outcome.parts)] if outcome.parts else outcome.value


def _outcomes(request: ScoreRequest, row: Any) -> tuple[Outcome, ...]:
    return tuple(
        Invalid(reason=each)
        if isinstance(each, str)
        else Scored(value=each[0], parts=each[1])
        if isinstance(each, list)
        else Scored(value=each)
        for each in row
    )


def _encode_comparisons(answers: Iterable[Comparison]) -> tuple[Any, list[bytes]]:
    told = [
        [each.source, len(each.win)] if isinstance(each, Compared) else each.reason
        for each in answers
    ]
    return told, [
        each.win.astype("<f8").tobytes() for each in answers if isinstance(each, Compared)
    ]


def _decode_comparisons(told: Any, data: bytes) -> Iterator[Any]:
    for row in told:
        if isinstance(row, str):
            yield row
        else:
            source, size = row
            yield source, np.frombuffer(data[: 8 * size * size], dtype="<f8").reshape(size, size)
            data = data[8 * size * size :]


def _comparison(request: ScoreRequest, row: Any) -> Comparison:
    return Invalid(reason=row) if isinstance(row, str) else Compared(win=row[1], source=row[0])


_ENCODERS: Mapping[str, Any] = {
    "generate": _encode_completions,
    "score": _encode_outcomes,
    "compare": _encode_comparisons,
}
_DECODERS: Mapping[str, Any] = {
    "generate": _decode_completions,
    "score": lambda told, data: told,
    "compare": _decode_comparisons,
}
_TELLERS: Mapping[str, Any] = {"generate": _completions, "score": _outcomes, "compare": _comparison}
