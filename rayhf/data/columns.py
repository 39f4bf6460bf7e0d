"""Columns of rows: JSON values, and the changes that a source's config asks for.

In: rows as a reader yields them. Out: rows of JSON values, with columns dropped, renamed, filtered,
and the user message of a template. Error messages name the column; callers add the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rayhf.config.sources import SourceConfig
from rayhf.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rayhf.data.jinja_sandbox import Kind

Row = Mapping[str, object]
PlacedRow = tuple[str, Row]
"""A row, after how error messages name it."""

MAX_DEPTH = 64
"""Levels of lists and mappings in a column."""
MAX_TEXT = 1 << 20
"""Characters of a rendered template."""
_MAX_DIGITS = 4300
"""Digits of an integer: Python's own limit on reading and writing one as text."""
_LARGEST_INT = 10**_MAX_DIGITS


def json_row(row: Row, *, drop: Iterable[str] = ()) -> dict[str, Any]:
    """Return the row with JSON values only, without the columns of `drop`.

    NaN becomes None; dates and times become ISO strings; scalars and arrays of numpy and Arrow
    become numbers and lists. Raises ConfigError, naming the column, for anything else: bytes,
    infinity, text that UTF-8 does not have, an integer of more than 4,300 digits, deep nesting.
    """
    left_out = set(drop)
    plain = {}
    for name, value in row.items():
        if name in left_out:
            continue
        if not isinstance(name, str):
            raise ConfigError(f"column {name!r:.40} is a {type(name).__name__}; expected text")
        try:
            _text(name)
        except ValueError as error:
            raise ConfigError(f"a column's name {error}") from None
        try:
            plain[name] = _plain(value, MAX_DEPTH)
        except ValueError as error:
            raise ConfigError(
                f"column `{name}` {error}; leave it out with `drop` where no scorer needs it"
            ) from None
    return plain


def _plain(value: Any, depth: int) -> Any:
    """Return a JSON value. Raises ValueError with the end of a sentence about the column."""
    kind = type(value)
    if kind is str:
        return _text(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        if not -_LARGEST_INT < value < _LARGEST_INT:
            raise ValueError(f"has an integer of more than {_MAX_DIGITS:,} digits")
        return value
    if kind is float:
        if math.isinf(value):
            raise ValueError("is infinite; expected a finite number")
        return None if math.isnan(value) else value
    if depth == 0:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    if kind is dict or isinstance(value, Mapping):
        return {_key(key): _plain(item, depth - 1) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return [_plain(item, depth - 1) for item in value]
    return _plain(_converted(value), depth - 1)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"has a mapping with the key {key!r:.40}; expected text")
    return _text(key)


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"has the lone surrogate \\u{ord(value[error.start]):04x} at character "
                f"{error.start + 1}, which is no valid Unicode text"
            ) from None
    return value


def _converted(value: Any) -> Any:
    """Return a value of another library's type as one of Python's own."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("holds bytes (an image, audio, a file?); only text and numbers are read")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral() else float(value)
    if isinstance(value, str):  # a subclass, for example numpy's
        return str(value)
    for method in ("tolist", "item", "as_py"):  # numpy arrays and scalars, torch, Arrow
        if callable(convert := getattr(value, method, None)):
            return convert()
    raise ValueError(f"is a {type(value).__name__}; expected text, a number, a list or a mapping")


class Columns:
    """The changes of one source's config, applied to its rows.

    Raises ConfigError for a filter or a template that is not valid jinja.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._seen: set[str] = set()
        """Columns of all rows so far, before renaming."""
        self._found: set[str] = set()
        """Keys of `rename` and `drop` that some row has."""
        if config.filter is not None:
            self._evaluate("filter", "expression", config.filter, None)
        if config.template is not None:
            self._evaluate("template", "text", config.template, None)

    def apply(self, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
        """Yield the rows to take, at most `limit`, changed.

        Raises ConfigError, beginning with the row's place, for a row that cannot be changed so; at
        the end, for a column of `rename` or `drop` that no row had.
        """
        left = self._config.limit
        for place, row in rows:
            try:
                changed = self._change(row)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
            if changed is None:
                continue
            yield place, changed
            if left is not None:
                left -= 1
                if left == 0:
                    break
        self._check_columns()

    def _change(self, row: Row) -> dict[str, Any] | None:
        """Return the changed row; None where the filter leaves it out."""
        self._seen.update(name for name in row if isinstance(name, str))
        self._found.update(name for name in self._config.drop if name in row)
        columns = self._rename(json_row(row, drop=self._config.drop))
        if self._config.filter is not None and not self._passes(columns):
            return None
        if self._config.template is not None:
            text = self._render(columns)
            columns.pop("messages", None)
            columns["prompt"] = text
        return columns

    def _rename(self, columns: dict[str, Any]) -> dict[str, Any]:
        targets = {}
        for path, target in self._config.rename.items():
            if path in columns:
                targets[target] = columns.pop(path)
            else:
                value: Any = columns
                for part in path.split("."):
                    value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
                if value is _MISSING:
                    continue
                targets[target] = value
            self._found.add(path)
        for target in targets:
            if columns.get(target) is not None:
                raise ConfigError(
                    f"rename makes a column `{target}`, but there is one already; rename or drop "
                    "that too"
                )
        return columns | targets

    def _passes(self, columns: dict[str, Any]) -> bool:
        passes = self._evaluate("filter", "expression", self._config.filter, columns)
        if not isinstance(passes, bool):
            raise ConfigError(f"filter gives {passes!r:.40}; expected true or false")
        return passes

    def _render(self, columns: dict[str, Any]) -> str:
        return str(self._evaluate("template", "text", self._config.template, columns))

    @staticmethod
    def _evaluate(key: str, kind: Kind, source: str | None, columns: dict[str, Any] | None) -> Any:
        """Return a template's text or an expression's value; without columns, only compile it."""
        from rayhf.data.jinja_sandbox import TemplateFailedError, evaluate

        items = [] if columns is None else [_variables(columns)]
        try:
            results = list(evaluate(kind, str(source), items, limit=MAX_TEXT))
        except TemplateFailedError as problem:
            raise ConfigError(f"{key} is not valid jinja ({problem.message})") from None
        if results and isinstance(results[0], TemplateFailedError):
            raise ConfigError(f"{key}: {results[0]}")
        return results[0] if results else None

    def _check_columns(self) -> None:
        for key, names in (("rename", self._config.rename), ("drop", self._config.drop)):
            for name in names:
                if name not in self._found and self._seen:
                    hint = nearest(name, sorted(self._seen)[:20])
                    raise ConfigError(f"{key}: no row has a column {name!r}{hint}")


_MISSING: Any = object()


def _variables(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a filter or a template: the columns, and all of them as `row`."""
    return {**columns, "row": columns}
