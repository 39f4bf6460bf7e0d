"""Samples, examples and metrics of a campaign's iterations, each with its checksum.

samples/, examples/      one Parquet file per iteration
metrics.jsonl            one line per iteration
metrics.rewound.jsonl    lines of iterations that were repeated
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.evaluation.values import PromptValues
from rayhf.run_dir import tables
from rayhf.run_dir.checksums import ChecksumLog
from rayhf.run_dir.files import (
    Check,
    atomic_file,
    open_file,
    read_bytes,
    storage_errors,
    write_atomic,
)
from rayhf.run_dir.names import iteration_name, numbered
from rayhf.run_dir.table_writer import TableWriter, row_groups
from rayhf.types import Example, Group, JsonObject

METRICS = "metrics.jsonl"
TABLES = ("samples", "examples", "credit", "heldout", "evaluations")
"""Directories with a Parquet file per iteration, where it has one."""


class Records:
    """The records of one campaign.

    Args:
        run: its run directory.
        check: called before anything is written or deleted.
        warn: gets a line for each damaged record that is left out.
    """

    def __init__(self, run: Path, *, check: Check, warn: Callable[[str], None]) -> None:
        self.history: list[dict[str, float]] = []
        """The lines of metrics.jsonl, once `rewind` has dropped those after the checkpoint."""
        self._run = run
        self._check = check
        self._warn = warn
        self._checksums = ChecksumLog(run)
        self._writer = TableWriter()

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append an iteration's line. Raises ValueError for NaN and infinity."""
        self._check()
        self.history.append(dict(metrics))
        line = json.dumps(dict(metrics), allow_nan=False).encode()
        file = self._run / METRICS
        with storage_errors("write", file), open_file(file, "ab") as stream:
            stream.write(line + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._checksums.append(int(metrics["iteration"]), line)

    def write_samples(self, iteration: int, groups: Sequence[Group]) -> None:
        """Start writing every completion of an iteration, one row each."""
        parts = row_groups(groups, partial(tables.sample_table, iteration))
        self._writer.start(self._write_table, "samples", iteration, tables.SAMPLES, parts)

    def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Start writing every training example: indices into its prompt's samples."""
        parts = row_groups(examples, partial(tables.example_table, iteration))
        self._writer.start(self._write_table, "examples", iteration, tables.EXAMPLES, parts)

    def write_credit(self, iteration: int, examples: Sequence[Example]) -> None:
        """Start writing the token values that training added to the policy's examples, if any."""
        # The rows of one objective all have the same values.
        if not examples or not examples[0].rows[0].tokens.keys() & set(tables.CREDIT_VALUES):
            return
        parts = row_groups(examples, partial(tables.credit_table, iteration))
        self._writer.start(self._write_table, "credit", iteration, tables.CREDIT, parts)

    def write_heldout(self, iteration: int, groups: Sequence[Group]) -> None:
        """Start writing an evaluation's completions of the held-out prompts."""
        parts = row_groups(groups, partial(tables.sample_table, iteration))
        self._writer.start(self._write_table, "heldout", iteration, tables.SAMPLES, parts)

    def write_evaluations(self, iteration: int, values: Sequence[PromptValues]) -> None:
        """Start writing the figures of an iteration's evaluations by prompt."""
        parts = row_groups(values, partial(tables.evaluation_table, iteration))
        self._writer.start(self._write_table, "evaluations", iteration, tables.EVALUATIONS, parts)

    async def tables_written(self) -> None:
        """Wait until the tables that were started are on the disk. Raises their first error."""
        await self._writer.written()

    def close(self) -> None:
        """Wait for the table in progress."""
        self._writer.close()

    def read_examples(self, iteration: int, *, objective: str = "policy") -> list[Example]:
        """Return an objective's examples of an earlier iteration; none where there was none."""
        file = self._table("examples", iteration)
        with storage_errors("read", file):
            return tables.read_examples(file, objective) if file.exists() else []

    def _table(self, folder: str, iteration: int) -> Path:
        return self._run / folder / f"{iteration_name(iteration)}.parquet"

    def _write_table(
        self, folder: str, iteration: int, schema: pa.Schema, parts: Iterator[pa.Table]
    ) -> None:
        """Write a table atomically; called in a thread, since it takes long."""
        file = self._table(folder, iteration)
        with atomic_file(file, self._check) as stream:
            hashed = _HashedFile(stream)
            # Values rarely repeat: dictionaries would take most of the time and enlarge the file.
            settings = {"compression": "zstd", "use_dictionary": False}
            with pq.ParquetWriter(hashed, schema, **settings) as writer:
                for part in parts:
                    writer.write_table(part)
        self._checksums.note(
            iteration,
            f"{folder}/{file.name}",
            {"bytes": hashed.size, "sha256": hashed.hash.hexdigest()},
        )

    def facts(self) -> JsonObject:
        """Return what a checkpoint's manifest says of the records before it."""
        metrics = self._run / METRICS
        return {
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "checksums": self._checksums.committed(),
        }

    def rewind(self, iteration: int, facts: JsonObject) -> None:
        """Drop the records after `iteration`: those iterations will be repeated.

        Their metrics are kept in metrics.rewound.jsonl. A damaged line of an earlier iteration
        stays as it is.

        Args:
            iteration: that of a checkpoint; -1 for none.
            facts: what its manifest says.
        """
        self._check()
        self._rewind_metrics(iteration, facts)
        checksums = facts.get("checksums")
        size = checksums["bytes"] if isinstance(checksums, dict) else 0
        self._checksums.rewind(int(str(size)))
        for folder in TABLES:
            for number, file in numbered(self._run / folder, "iteration-", ".parquet").items():
                if number > iteration:
                    with storage_errors("delete", file):
                        file.unlink()

    def _rewind_metrics(self, iteration: int, facts: JsonObject) -> None:
        file = self._run / METRICS
        with storage_errors("read", file):
            data = read_bytes(file) if file.exists() else b""
        size = int(str(facts.get("metrics_bytes", 0)))
        if len(data) < size or (size and data[size - 1 : size] != b"\n"):
            self._warn(f"{METRICS} is damaged: it is not as long as it was at the last commit")
            size = _end_of(data, iteration)
        kept = data[:size]
        self.history = []
        for number, line in enumerate(kept.splitlines(), start=1):
            if (metrics := _parse(line)) is None:
                self._warn(f"{METRICS}: line {number} is damaged and left out of what guards see")
            else:
                self.history.append(metrics)
        if kept != data:
            rewound = self._run / "metrics.rewound.jsonl"
            with storage_errors("write", rewound), open_file(rewound, "ab") as stream:
                stream.write(data[size:])
            write_atomic(file, kept, self._check)


class _HashedFile:
    """A file that hashes what is written to it, for PyArrow."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self.size

    def writable(self) -> bool:
        """Return True."""
        return True

    def flush(self) -> None:
        """Flush."""
        self._file.flush()

    def close(self) -> None:
        """Leave the file open: its owner closes it."""


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl, without damaged ones. Raises StorageError."""
    file = run / METRICS
    with storage_errors("read", file):
        lines = read_bytes(file).splitlines() if file.exists() else []
    return [metrics for line in lines if (metrics := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, float] | None:
    """Return a line's metrics; None where it is damaged."""
    try:
        metrics = json.loads(line)
        float(metrics["iteration"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(metrics)


def _end_of(data: bytes, iteration: int) -> int:
    """Return where the last intact line of an iteration up to this one ends."""
    end = 0
    position = 0
    for line in data.splitlines(keepends=True):
        position += len(line)
        metrics = _parse(line)
        if metrics is not None and metrics["iteration"] <= iteration and line.endswith(b"\n"):
            end = position
    return end
