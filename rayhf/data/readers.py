"""Sources of prompts: what a source is, and its rows after the changes that its config asks for.

In: the `type` and settings of a source. Out: rows of JSON values, each with the place that error
messages name. `rayhf.data.prompts` makes prompts of them. The sources themselves are files.py,
hub.py and reasoning_gym.py beside this file, or classes of other packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from rayhf.config.registry import SOURCES
from rayhf.config.sources import SourceConfig
from rayhf.data.columns import Columns, PlacedRow, Row
from rayhf.errors import ConfigError

__all__ = ["Row", "Source", "named_rows", "open_source", "read_rows", "row_name"]


class Source(Protocol):
    """Rows of prompts, from wherever they come.

    A source is built as `Source(config, base=directory)`: `config` is an instance of its `Config`,
    relative paths in it start at `base`. Errors in the settings or the data are ConfigErrors.
    """

    Config: ClassVar[type[SourceConfig]]

    @property
    def label(self) -> str:
        """Name of the source in error messages, for example the path of its file."""
        ...

    def rows(self) -> Iterator[Row]:
        """Yield the rows in an order that is the same for every call.

        A row has `prompt` (string or messages) or `messages` (list of {"role", "content"}),
        optionally `answer`, the reference answer, and any further columns.
        """
        ...


@runtime_checkable
class PlacesRows(Protocol):
    """A source of several files: it knows where each row comes from."""

    def placed_rows(self) -> Iterator[PlacedRow]:
        """Yield the rows, each after its place, for example "data/a.jsonl row 3"."""
        ...


@runtime_checkable
class PinsCommit(Protocol):
    """A source whose content may change under the same name."""

    def pin(self, commits: MutableMapping[str, str]) -> None:
        """Read the commit that `commits` has for its name, or add the present one.

        Raises ConfigError where the name cannot be resolved.
        """
        ...


class ShapedSource:
    """Sources with the changes of their configs (columns, filter, limit, template), one by one."""

    Config: ClassVar[type[SourceConfig]] = SourceConfig

    def __init__(self, *parts: tuple[Source, Columns]) -> None:
        self._parts = parts

    @property
    def label(self) -> str:
        """Names of the sources in error messages."""
        return ", ".join(source.label for source, _ in self._parts)

    def rows(self) -> Iterator[Row]:
        """Yield the changed rows."""
        for _, row in self.placed_rows():
            yield row

    def placed_rows(self) -> Iterator[PlacedRow]:
        """Yield the changed rows, each after its place."""
        for source, columns in self._parts:
            yield from columns.apply(_placed(source))


def _placed(source: Source) -> Iterator[PlacedRow]:
    if isinstance(source, PlacesRows):
        yield from source.placed_rows()
        return
    for number, row in enumerate(source.rows(), start=1):
        place = row_name(source.label, number)
        if not isinstance(row, Mapping):
            raise ConfigError(f"{place}: expected a mapping, got {type(row).__name__}")
        yield place, row


def open_source(
    *configs: SourceConfig,
    base: Path,
    key: str,
    commits: MutableMapping[str, str] | None = None,
) -> Source:
    """Return the source of a config, or the sources of several, one after the other.

    Args:
        configs: settings; rows have the changes that these ask for.
        base: start of relative paths in them.
        key: the config key to name in errors.
        commits: commits of hub data sets by name; those that are missing are added.

    Raises ConfigError for any error of a source.
    """
    parts: list[tuple[Source, Columns]] = []
    for number, config in enumerate(configs):
        own = f"{key}[{number}]" if len(configs) > 1 else key
        with _named_errors(own, config.type):
            source: Source = SOURCES.build(config, base=base)
            if isinstance(source, PinsCommit):
                source.pin({} if commits is None else commits)
            parts.append((source, Columns(config)))
    return ShapedSource(*parts)


def named_rows(source: Source, *, key: str) -> Iterator[PlacedRow]:
    """Yield (where, row) for each row; error messages about a row begin with `where`.

    Raises ConfigError, which names the config key `key`, for any error of the source.
    """
    if not isinstance(source, ShapedSource):
        source = ShapedSource((source, Columns(SourceConfig())))
    with _named_errors(key, source.label):
        for place, row in source.placed_rows():
            yield f"{key}: {place}", row


def read_rows(path: Path, *, key: str) -> Iterator[PlacedRow]:
    """Yield (where, row) for each record of a file, a directory or a glob, as `named_rows`."""
    from rayhf.data.files import FileSource, FileSourceConfig

    return named_rows(FileSource(FileSourceConfig(path=path), base=Path()), key=key)


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
