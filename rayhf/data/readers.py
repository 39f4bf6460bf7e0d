"""Sources of prompts, and the reader of JSONL and Parquet files.

In: the `type` and settings of a source. Out: rows, which `rayhf.data.prompts` checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

from rayhf.config.base import PluginConfig
from rayhf.config.registry import SOURCES
from rayhf.errors import ConfigError
from rayhf.models.source import tiny_hint

Row = Mapping[str, object]


class Source(Protocol):
    """Rows of prompts, from wherever they come.

    A source is built as `Source(config, base=directory)`: `config` is an instance of its `Config`,
    relative paths in it start at `base`. Errors in the settings or the data are ConfigErrors.
    """

    Config: ClassVar[type[PluginConfig]]

    @property
    def label(self) -> str:
        """Name of the source in error messages, for example the path of its file."""
        ...

    def rows(self) -> Iterator[Row]:
        """Yield the rows in an order that is the same for every call.

        A row has `prompt` (string) or `messages` (list of {"role", "content"}), and optionally
        `answer`, the reference answer.
        """
        ...


class FileSourceConfig(PluginConfig):
    """Settings of a file of prompts."""

    type: str = "file"
    path: Path
    """JSONL or Parquet with `prompt` (string) or `messages` (list of role/content), optional
    `answer`."""


class FileSource:
    """JSONL or Parquet file of prompts."""

    Config: ClassVar[type[PluginConfig]] = FileSourceConfig

    def __init__(self, config: FileSourceConfig, *, base: Path) -> None:
        self._path = base / config.path

    @property
    def label(self) -> str:
        """Path of the file."""
        return str(self._path)

    def rows(self) -> Iterator[Row]:
        """Yield the records of the file; blank lines are skipped and not counted.

        Raises ConfigError for a file that cannot be read and for a malformed row.
        """
        path = self._path
        if not path.is_file():
            raise ConfigError(
                f"no such file {path}; expected a .jsonl or .parquet file{tiny_hint(path)}"
            )
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix in (".jsonl", ".json"):
            return _read_jsonl(path)
        raise ConfigError(f"{path} has ending {path.suffix!r}; expected .jsonl or .parquet")


def open_source(config: PluginConfig, *, base: Path, key: str) -> Source:
    """Return the source of `config`; relative paths in it start at `base`.

    Raises ConfigError, which names the config key `key`, for any error of the source.
    """
    source: Source
    with _named_errors(key, config.type):
        source = SOURCES.build(config, base=base)
    return source


def named_rows(source: Source, *, key: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row; error messages about a row begin with `where`.

    Raises ConfigError, which names the config key `key`, for any error of the source.
    """
    for number, row in enumerate(_checked(source, key), start=1):
        where = f"{key}: {row_name(source.label, number)}"
        if not isinstance(row, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {type(row).__name__}")
        yield where, row


def read_rows(path: Path, *, key: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each record of a JSONL or Parquet file, as `named_rows`."""
    return named_rows(FileSource(FileSourceConfig(path=path), base=Path()), key=key)


def _checked(source: Source, key: str) -> Iterator[Row]:
    with _named_errors(key, source.label):
        yield from source.rows()


@contextmanager
def _named_errors(key: str, label: str) -> Iterator[None]:
    """Turn anything that the source `label` raises into a ConfigError that names `key`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{key}: {label}: {type(error).__name__}: {error}") from error


def row_name(label: str, number: int) -> str:
    """Return how error messages name row `number` (from 1) of a source."""
    return f"{label} row {number}"


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines, start=1):
            where = row_name(str(path), number)
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise ConfigError(f"{where}: not valid UTF-8") from None
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: expected an object, got {type(row).__name__}")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    yield from table.to_pylist()
