"""The journal of an iteration: every response, so that a killed campaign does not repeat requests.

In a deterministic campaign a response is in the journal's file before a coroutine gets it. A
campaign that was killed explores its iteration again from the start: all randomness is derived, so
the coroutines make the same requests; those in the journal are answered from it, and only the
others are sent. Finished work is never lost, also inside a half-grown tree. Since the responses of
one call are recorded together, the remaining calls are those of an uninterrupted iteration, with
the same batches and the same bits.

A record is its length, its CRC-32, and the responses of one or more calls: the length of a JSON
text, the text, and the arrays that it describes, end to end. For each type of request it has the
keys, then the responses (codecs.py). A torn or damaged record ends the journal: what follows it is
requested again. Nothing waits for the disk here: a lost journal costs time, never correctness.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayhf.blocking import in_thread
from rayhf.episodes import StepRequest
from rayhf.exploration.codecs import CODECS, Buffer, Codec, RequestT, ResponseT
from rayhf.run_dir.files import open_file, read_bytes, storage_errors
from rayhf.types import Failed, GenerateRequest, JsonObject, Sampling, ScoreRequest

_HEADER = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_FORMAT = 10
"""Start value of checksums, so that records of another format do not verify."""
_KEY_BYTES = 16
_JSON = json.JSONEncoder(check_circular=False)
"""Looking for circular references takes longer than writing; there are none."""
_Added = dict[str, tuple[list[bytes], list[Any]]]
"""Keys and responses by request type."""


class Journal:
    """The journal of one iteration. Raises StorageError for a file it cannot read or write.

    `config_hash` identifies everything that decides how the campaign's weights come about. Records
    with another one are dropped: their weights have the same version number but are not the same.
    `functions_hash` identifies the functions that score: scores of others are not recalled.
    """

    def __init__(self, path: Path, *, config_hash: str = "", functions_hash: str = "") -> None:
        self.path = path
        self.scorer_state: JsonObject | None = None
        """The scorer's state after its last recorded call; None where none was recorded."""
        self._config_hash = config_hash
        self._functions_hash = functions_hash
        self._recorded: dict[bytes, Any] = {}
        """Raw responses by key."""
        self._added: _Added = {}
        """Keys and responses for the next record, by request type."""
        self._added_state: JsonObject | None = None
        self._order = asyncio.Lock()
        """Records are written in the order in which they were taken."""
        self._records_scores = True
        with storage_errors("read", path):
            data = read_bytes(path) if path.exists() else b""
            intact = self._read(data)
            self._file = open_file(path, "ab")
            self._file.truncate(intact)

    def _read(self, data: bytes) -> int:
        """Read the records and return where the last intact one ends."""
        intact = 0
        for end, record, arrays in _records(data):
            if record["config_hash"] != self._config_hash:
                break
            intact = end
            for request_type, (columns, key_bytes, column_bytes) in record["responses"].items():
                keys = _cut(arrays[:key_bytes], _KEY_BYTES)
                arrays = arrays[key_bytes:]
                raw = CODECS[request_type].decode(columns, arrays[:column_bytes])
                arrays = arrays[column_bytes:]
                self._recorded |= zip(keys, raw, strict=True)
            if record["functions_hash"] == self._functions_hash:  # else its scores are not recalled
                self.scorer_state = record.get("scorer_state", self.scorer_state)
        return intact

    def __len__(self) -> int:
        """Return the number of responses that can be recalled."""
        return len(self._recorded)

    def recall(self, codec: Codec[RequestT, ResponseT], request: RequestT) -> ResponseT | None:
        """Return the recorded response to an equal request, once; None where there is none."""
        if not self._recorded:
            return None
        raw = self._recorded.pop(self._key(codec.request_type, request), None)
        return None if raw is None else codec.restore(request, raw)

    def add(
        self,
        codec: Codec[RequestT, ResponseT],
        requests: Sequence[RequestT],
        responses: Sequence[ResponseT],
        scorer_state: JsonObject | None = None,
    ) -> None:
        """Add the responses of one call to the next record.

        A call in which a scorer failed is left out, to be repeated, and so is every later one of
        that scorer: it must learn again what it learned, in the same order.
        """
        if len(requests) != len(responses):
            raise ValueError(f"{len(responses)} responses to {len(requests)} requests")
        if requests and isinstance(requests[0], ScoreRequest):
            self._records_scores = self._records_scores and not any(map(_failed, responses))
            if not self._records_scores:
                return
        added_keys, added_responses = self._added.setdefault(codec.request_type, ([], []))
        added_keys += (self._key(codec.request_type, request) for request in requests)
        added_responses += responses
        if scorer_state is not None:
            self._added_state = dict(scorer_state)

    def flush(self) -> None:
        """Write what was added since the last time, as one record."""
        self._write(*self._take())

    async def flush_beside(self) -> None:
        """Do the same in a thread: a wave's responses are the whole iteration's."""
        async with self._order:
            await in_thread(self._write, *self._take())

    def _take(self) -> tuple[_Added, JsonObject | None]:
        """Return what was added since the last time, and the scorer's state."""
        taken = self._added, self._added_state
        self._added = {}
        self._added_state = None
        return taken

    def _write(self, added: _Added, scorer_state: JsonObject | None) -> None:
        if not added:
            return
        described: dict[str, tuple[object, int, int]] = {}
        pieces: list[Buffer] = []
        for request_type, (keys, responses) in added.items():
            columns, data = CODECS[request_type].encode(responses)
            described[request_type] = columns, _KEY_BYTES * len(keys), sum(map(len, data))
            pieces += [*keys, *data]
        record: dict[str, object] = {
            "config_hash": self._config_hash,
            "functions_hash": self._functions_hash,
            "responses": described,
        }
        if scorer_state is not None:
            record["scorer_state"] = scorer_state
        text = _JSON.encode(record).encode()
        # Piece by piece: a wave's responses are the whole iteration's, and are not copied.
        pieces = [_SIZE.pack(len(text)), text, *pieces]
        checksum = _FORMAT
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
        with storage_errors("write", self.path):
            self._file.write(_HEADER.pack(sum(map(len, pieces)), checksum))
            self._file.writelines(pieces)
            self._file.flush()

    def _key(
        self, request_type: str, request: GenerateRequest | ScoreRequest | StepRequest
    ) -> bytes:
        """Hash everything that a response depends on but the weights, whose version it contains."""
        assert not isinstance(request, StepRequest)  # the journal has none
        if isinstance(request, GenerateRequest):
            prompt = request.prompt_id
            text = f"{request_type} {request.number} {len(prompt)} {prompt} {request.seeds}"
            settings = _settings(request.policy, request.sampling)
            data = b"".join((text.encode(), settings, array("q", request.token_ids)))
        else:
            prompt = request.prompt.prompt_id
            text = f"{request_type} {self._functions_hash} {request.number} {len(prompt)} {prompt}"
            for c in request.completions:
                written = (c.thinking or "") + c.text
                text += (
                    f" {c.finish_reason} {len(c.token_ids)} {len(c.text)} {len(written)} {written}"
                )
                if c.episode is not None:
                    text += f" {c.episode.turns} {c.episode.problem}"
            data = text.encode(errors="surrogatepass")
        return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()

    def close(self) -> None:
        """Write what was added, and close the file."""
        try:
            self.flush()
        finally:
            self._file.close()


def _records(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """Yield (end, record, arrays) of every intact record before the first damaged one."""
    start = 0
    while start + _HEADER.size <= len(data):
        size, checksum = _HEADER.unpack_from(data, start)
        body = data[start + _HEADER.size : start + _HEADER.size + size]
        if len(body) < size or zlib.crc32(body, _FORMAT) != checksum:
            return
        start += _HEADER.size + size
        end = _SIZE.size + _SIZE.unpack_from(body)[0]
        yield start, json.loads(body[_SIZE.size : end]), body[end:]


@lru_cache(maxsize=64)
def _settings(policy: str, sampling: Sampling) -> bytes:
    """Return the settings as bytes; an iteration has few different ones."""
    return repr((policy, sampling)).encode()


def _failed(response: object) -> bool:
    outcomes = response if isinstance(response, tuple) else (response,)
    return any(isinstance(outcome, Failed) for outcome in outcomes)


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))
