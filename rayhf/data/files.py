"""The source `file`: a data file, a directory of them, or a glob.

JSON Lines, JSON, CSV and TSV are read by Python's own parsers, row by row: values stay exactly what
the file holds (no type is inferred, an integer may have any size), and an error names the row.
Parquet and Arrow files are read in batches by pyarrow. A file may be compressed (.gz, .zst).
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from rayhf.config.sources import SourceConfig
from rayhf.data.columns import PlacedRow, Row
from rayhf.data.readers import row_name
from rayhf.errors import ConfigError
from rayhf.models.source import missing_hint

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst), .parquet, .arrow"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BATCH = 1024
"""Rows of a Parquet or Arrow file that are converted at once."""


class FileSourceConfig(SourceConfig):
    """Settings of prompts in files."""

    type: str = "file"
    path: Path
    """A data file, a directory (its data files and those below it, by name), or a glob such as
    data/*.jsonl."""

    @property
    def default_name(self) -> str:
        """Name of the file without endings, or of the directory."""
        return self.path.name.partition(".")[0]


class FileSource:
    """Prompts in files: JSON Lines, JSON, CSV, TSV, Parquet or Arrow; a directory or a glob."""

    Config: ClassVar[type[SourceConfig]] = FileSourceConfig

    def __init__(self, config: FileSourceConfig, *, base: Path) -> None:
        self._path = base / config.path

    @property
    def label(self) -> str:
        """The path."""
        return str(self._path)

    def rows(self) -> Iterator[Row]:
        """Yield the records of all files. Raises ConfigError; see `placed_rows`."""
        for _, row in self.placed_rows():
            yield row

    def placed_rows(self) -> Iterator[PlacedRow]:
        """Yield (file and row, record) for all files; blank lines are skipped and not counted.

        Raises ConfigError for a file that cannot be read and for a malformed row.
        """
        for file in data_files(self._path):
            yield from _read(file)


def data_files(path: Path) -> list[Path]:
    """Return the files that a path names: itself, those of a directory, or those of a glob.

    Raises ConfigError where there are none.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return _directory(path)
    if glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ConfigError(f"no file matches {path}")
        return files
    raise ConfigError(
        f"no such file or directory {path}; expected a data file ({FORMATS}){missing_hint(path)}"
    )


def _directory(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ConfigError(
            f"{path} holds several splits; expected the directory of one: "
            + ", ".join(str(path / split) for split in splits)
        )
    saved = (path / "dataset_info.json").is_file()  # by datasets' save_to_disk
    files = sorted(
        file
        for file in path.rglob("*.arrow" if saved else "*")
        if _reader(file) is not None
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise ConfigError(f"{path} has no data file; expected {FORMATS}")
    return files


Reader = Callable[[Path], Iterator[PlacedRow]]


def _reader(path: Path) -> Reader | None:
    ending = path.suffix.lower()
    if ending in _COMPRESSIONS:
        return _TEXT_READERS.get(path.with_suffix("").suffix.lower())
    return _TEXT_READERS.get(ending) or _ARROW_READERS.get(ending)


def _read(path: Path) -> Iterator[PlacedRow]:
    reader = _reader(path)
    if reader is None:
        raise ConfigError(f"{path} has ending {path.suffix!r}; expected {FORMATS}")
    try:
        yield from reader(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow as pa

    # pyarrow notices a file that is cut off, in either format.
    return io.BufferedReader(pa.input_stream(os.fspath(path), compression=compression))


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    with _open(path) as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines, start=1):
            place = row_name(str(path), number)
            yield place, _record(_parse(line, place), place)


def _json(path: Path) -> Iterator[PlacedRow]:
    """Read one JSON array of objects, or JSON Lines under the name .json."""
    with _open(path) as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(path)
        return
    with _open(path) as file:
        records = _parse(file.read(), str(path))
    for number, record in enumerate(records, start=1):
        place = row_name(str(path), number)
        yield place, _record(record, place)


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ConfigError(
            f"{place}: not valid JSON ({error.msg} at {line}column {error.colno})"
        ) from None
    except RecursionError:
        raise ConfigError(f"{place}: nested too deep") from None
    except ValueError:  # the only other one: Python's limit on the digits of an integer
        limit = sys.get_int_max_str_digits()
        raise ConfigError(f"{place}: an integer of more than {limit:,} digits") from None


def _record(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: expected an object, got {type(value).__name__}")
    return value


def _separated(path: Path) -> Iterator[PlacedRow]:
    """Read CSV or TSV: the first row names the columns, values are text, an empty one is None."""
    separator = "\t" if ".tsv" in path.suffixes[-2:] else ","
    csv.field_size_limit(1 << 30)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        rows = enumerate(csv.reader(file, delimiter=separator, strict=True))
        names: list[str] = []
        while True:
            place = str(path)
            try:
                number, cells = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError:
                raise ConfigError(f"{path}: not valid UTF-8") from None
            except csv.Error as error:
                raise ConfigError(f"{path}: not valid CSV ({error})") from None
            if not names:
                names = _header(cells, place)
                continue
            if not cells:
                continue
            place = row_name(str(path), number)
            if len(cells) != len(names):
                raise ConfigError(f"{place}: {len(cells)} cells; the header has {len(names)}")
            yield place, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise ConfigError(f"{place}: expected names of columns in the first row")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{place}: two columns are named {name!r}")
    return names


def _parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from batch_rows(file.iter_batches(batch_size=_BATCH), str(path))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file ({_first_line(error)})") from None


def _arrow(path: Path) -> Iterator[PlacedRow]:
    """Read an Arrow file (Feather 2), or a stream, as `datasets` writes it."""
    import pyarrow as pa

    try:
        with pa.memory_map(os.fspath(path)) as file:
            try:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            yield from batch_rows(batches, str(path))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not an Arrow file ({_first_line(error)})") from None


def batch_rows(batches: Iterator[pa.RecordBatch], label: str) -> Iterator[PlacedRow]:
    """Yield (place, row) for the rows of Arrow batches or tables.

    Raises ConfigError for a row whose text is not valid UTF-8.
    """
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:
                rows = _row_by_row(part, label, number)
            for row in rows:
                number += 1
                yield row_name(label, number), row


def _row_by_row(part: pa.RecordBatch, label: str, before: int) -> list[Row]:
    rows: list[Row] = []
    for index in range(part.num_rows):
        try:
            rows += part.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            place = row_name(label, before + index + 1)
            raise ConfigError(f"{place}: not valid UTF-8") from None
    return rows


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


_TEXT_READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
}
_ARROW_READERS: dict[str, Reader] = {".parquet": _parquet, ".arrow": _arrow}
