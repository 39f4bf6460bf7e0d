"""What a round's exploration was told, so that it can be told the same again.

Every answer of an engine or a scorer is appended before it is passed on. A campaign that was killed explores its round again
from the start: the coroutines ask what they asked before (all their randomness is derived), whatever is in the journal is
answered from it, and only what is missing goes to the engines. So finished work is never lost, also inside a half-grown tree;
and since a call's answers are recorded as one, the remaining calls are the ones that an uninterrupted round would have made,
with the same batches and the same bits.

A record is length, CRC-32 and compressed JSON. It is complete or it does not count: a torn or damaged record ends the journal,
and what came after is asked again. That is also why nothing waits for the disk here: a journal saves work, commits save truth.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayhf.campaign.files import storage_errors
from rayhf.experience import (
    Compared,
    Comparison,
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Outcome,
    Scored,
    ScoreRequest,
)

_HEADER = struct.Struct("<II")
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
        self._answers: dict[str, Any] = {}
        with storage_errors("read", path):
            data = path.read_bytes() if path.exists() else b""
            intact = 0
            for end, record in _records(data):
                if record["making"] != making:
                    break
                intact = end
                self._answers |= dict(zip(record["keys"], record["answers"], strict=True))
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
        return None if found is None else _DECODERS[kind](request, found)

    def record(
        self, kind: str, requests: Sequence[Request], answers: Sequence[Any], scorer_state: Mapping[str, Any] | None = None
    ) -> None:
        """One call's answers, together. A call in which a scorer failed is left out, it is to be asked again, and so is every
        later one of the round."""
        if kind != "generate":
            self._complete = self._complete and not any(_failed(answer) for answer in answers)
            if not self._complete:
                return
        record: dict[str, Any] = {
            "making": self._making,
            "keys": [_key(kind, request) for request in requests],
            "answers": [_ENCODERS[kind](answer) for answer in answers],
        }
        if scorer_state is not None:
            record["scorer"] = dict(scorer_state)
        body = zlib.compress(json.dumps(record).encode(), 1)
        with storage_errors("write", self.path):
            self._file.write(_HEADER.pack(len(body), zlib.crc32(body)) + body)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _records(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends, record) of every intact record before the first damaged one."""
    place = 0
    while place + _HEADER.size <= len(data):
        size, checksum = _HEADER.unpack_from(data, place)
        body = data[place + _HEADER.size : place + _HEADER.size + size]
        if len(body) < size or zlib.crc32(body) != checksum:
            return
        place += _HEADER.size + size
        yield place, json.loads(zlib.decompress(body))


def _key(kind: str, request: Request) -> str:
    """Of everything that an answer depends on but the weights, whose version an answer names itself."""
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(request, GenerateRequest):
        digest.update(repr((request.policy, request.sampling, request.seeds)).encode())
        digest.update(np.asarray(request.token_ids, dtype=np.int64).tobytes())
    else:
        for completion in request.completions:
            digest.update(repr((completion.text, completion.finish_reason, len(completion.token_ids))).encode())
    prompt = request.prompt_id if isinstance(request, GenerateRequest) else request.prompt.prompt_id
    return f"{kind} {prompt} {request.number} {digest.hexdigest()}"


def _failed(answer: Any) -> bool:
    return any(isinstance(each, Failed) for each in (answer if isinstance(answer, tuple) else (answer,)))


# ------------------------------------------------------------------------------------------------------- answers as JSON


def _pack(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpack(text: str, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def _pack_logprobs(logprobs: Sequence[float]) -> list[str]:
    """In four bytes each where that loses nothing, which is what engines give."""
    wide = np.asarray(logprobs, dtype="<f8")
    narrow = wide.astype("<f4")
    exact = bool((narrow.astype("<f8") == wide).all())
    return ["<f4", _pack(narrow)] if exact else ["<f8", _pack(wide)]


def _encode_completions(completions: Sequence[Completion]) -> list[Any]:
    return [
        [c.text, _pack(np.asarray(c.token_ids, "<i4")), _pack_logprobs(c.logprobs), c.finish_reason, c.policy_version]
        for c in completions
    ]


def _decode_completions(request: GenerateRequest, rows: list[Any]) -> tuple[Completion, ...]:
    return tuple(
        Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=request.seeds[index],
            text=text,
            token_ids=tuple(_unpack(token_ids, "<i4").tolist()),
            logprobs=tuple(_unpack(logprobs, dtype).tolist()),
            finish_reason=finish_reason,
            policy_version=version,
        )
        for index, (text, token_ids, (dtype, logprobs), finish_reason, version) in enumerate(rows)
    )


def _encode_outcome(outcome: Outcome) -> list[Any]:
    return [outcome.value, dict(outcome.parts)] if isinstance(outcome, Scored) else [outcome.reason]


def _decode_outcome(row: list[Any]) -> Outcome:
    return Scored(value=row[0], parts=row[1]) if len(row) == 2 else Invalid(reason=row[0])


def _encode_comparison(comparison: Comparison) -> list[Any]:
    if not isinstance(comparison, Compared):
        return [comparison.reason]
    return [_pack(comparison.win.astype("<f8")), comparison.source]


def _decode_comparison(request: ScoreRequest, row: list[Any]) -> Comparison:
    if len(row) == 1:
        return Invalid(reason=row[0])
    size = len(request.completions)
    return Compared(win=_unpack(row[0], "<f8").reshape(size, size), source=row[1])


_ENCODERS: Mapping[str, Any] = {
    "generate": _encode_completions,
    "score": lambda outcomes: [_encode_outcome(outcome) for outcome in outcomes],
    "compare": _encode_comparison,
}
_DECODERS: Mapping[str, Any] = {
    "generate": _decode_completions,
    "score": lambda request, rows: tuple(_decode_outcome(row) for row in rows),
    "compare": _decode_comparison,
}
