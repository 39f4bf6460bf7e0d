"""Prompts and labels that people submit while a campaign runs.

inbox/prompts.jsonl, inbox/labels.jsonl   appended by submitters, one complete line per row
inbox/taken/labels-000012.json            what iteration 12 took, written before it is used

A row is taken by one iteration, once; an iteration that is repeated takes what it took before.
Submitting needs no lock on the run directory: the campaign may be paused, or not running at all.
Anyone who may write to the files may have written them by hand: a line that is no row is skipped
and named, and no line can stop a campaign.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import stat
import threading
import uuid
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from rayhf.errors import ConfigError, QuotaError
from rayhf.run_dir.files import Check, checksum, read_bytes, storage_errors, write_json
from rayhf.run_dir.names import check_links, numbered
from rayhf.types import JsonObject

logger = logging.getLogger(__name__)

RowType = Literal["prompts", "labels"]
VERDICTS = {"pair_id": ("first", "second", "tie"), "completion_id": ("up", "down")}
"""Verdicts on a pair and on a single completion, by the key of the label that names it."""
LABEL_KEYS = (*VERDICTS, "verdict")
"""What a submitter gives."""
MAX_ROW_BYTES = 1 << 20
"""Longest row, as JSON."""
MAX_FILE_BYTES = 64 << 20
"""Most that a campaign accepts of one type of row, in all."""
_MAX_LINE = MAX_ROW_BYTES + 4096
_MAX_NAME = 300
"""Characters of an id, a source and the id of a pair."""
_KEPT_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A symbolic link is not followed, and a pipe in the file's place blocks nobody."""


class RowFile:
    """Rows of one inbox file, each read once: a read continues where the last one ended."""

    def __init__(self, run: Path, row_type: RowType) -> None:
        self.path = run / "inbox" / f"{row_type}.jsonl"
        self._row_type = row_type
        self._offset = 0
        self._lines = 0
        self._ids: set[str] = set()

    def read(self) -> tuple[list[JsonObject], list[str]]:
        """Return the new rows, and what is wrong with each new line that is none.

        A last line without its end is left for the next read: it may be being written.
        """
        rows: list[JsonObject] = []
        problems: list[str] = []
        try:
            with self._open() as file:
                file.seek(self._offset)
                for line in self._complete_lines(file):
                    self._lines += 1
                    place = f"inbox/{self.path.name} row {self._lines}"
                    try:
                        rows.append(self._row(line, place))
                    except ValueError as error:
                        problems.append(f"{place}: {error}")
                    except ConfigError as error:
                        problems.append(str(error))
                if os.fstat(file.fileno()).st_size > self._offset >= MAX_FILE_BYTES:
                    problems.append(f"inbox/{self.path.name}: all after {MAX_FILE_BYTES:,} bytes")
        except FileNotFoundError:
            return [], []
        except OSError as error:
            problems.append(f"inbox/{self.path.name} cannot be read ({error.strerror or error})")
        return rows, problems

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with open(os.open(self.path, os.O_RDONLY | _KEPT_OPEN), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is no regular file")
            yield file

    def _complete_lines(self, file: BinaryIO) -> Iterator[bytes | None]:
        """Yield the complete lines up to the limit on the file; None for one that is too long."""
        while self._offset < MAX_FILE_BYTES:
            line = file.readline(_MAX_LINE)
            size = len(line)
            is_long = False
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE)
                is_long = True
                size += len(line)
            if not line:
                return
            self._offset += size
            yield None if is_long else line

    def _row(self, line: bytes | None, place: str) -> JsonObject:
        """Return a line's row. Raises ValueError or ConfigError, which names the place."""
        if line is None:
            raise ValueError(f"longer than {_MAX_LINE:,} bytes")
        row = _parse(line)
        if row["id"] in self._ids:
            raise ValueError(f"the id {row['id']!r:.80} stands in an earlier row")
        _CHECKS[self._row_type](row, place)
        self._ids.add(str(row["id"]))
        return {**row, "place": place}


def _parse(line: bytes) -> JsonObject:
    """Return the JSON object of a line with id and source. Raises ValueError or ConfigError."""
    from rayhf.data.columns import json_row

    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for name in ("id", "source"):
        _check_name(row, name)
    try:
        return json_row(row)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_name(row: Mapping[str, object], name: str) -> None:
    value = row.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise ValueError(f"`{name}` must be text of 1 to {_MAX_NAME} characters, got {value!r:.60}")


def _check_prompt(row: Mapping[str, object], place: str) -> None:
    from rayhf.data.prompts import check_row

    check_row(row, place)


def _check_label(row: Mapping[str, object], place: str) -> None:
    keys = [key for key in VERDICTS if key in row]
    if len(keys) != 1:
        raise ValueError(
            f"expected one of {' and '.join(VERDICTS)}, got {'both' if keys else 'neither'}"
        )
    _check_name(row, keys[0])
    if row.get("verdict") not in VERDICTS[keys[0]]:
        raise ValueError(
            f"the verdict is {row.get('verdict')!r:.40}; expected {', '.join(VERDICTS[keys[0]])}"
        )


def label_id(label: Mapping[str, object]) -> str:
    """Return what a label judges: iteration/prompt/first/second, or iteration/prompt/sample."""
    return str(label["pair_id"] if "pair_id" in label else label["completion_id"])


_CHECKS: Mapping[RowType, Callable[[Mapping[str, object], str], None]] = {
    "prompts": _check_prompt,
    "labels": _check_label,
}


def check_submission(row: Mapping[str, object], row_type: RowType, where: str) -> JsonObject:
    """Return a row as it will be stored. Raises ConfigError, beginning with `where`, otherwise.

    Refused are a row that is no prompt or label, NaN, infinity, text that UTF-8 does not have, and
    a row above MAX_ROW_BYTES.
    """
    from rayhf.data.columns import json_row

    try:
        text = json.dumps(dict(row), allow_nan=False)
        if len(text) > MAX_ROW_BYTES:
            raise ConfigError(f"{len(text):,} bytes; expected at most {MAX_ROW_BYTES:,}")
        checked = json_row(row)
        _CHECKS[row_type](checked, where)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    return checked


# ---------------------------------------------------------------------------------- submitters


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What became of a submission."""

    new: int
    """Rows that were written."""
    repeated: int = 0
    """Rows that the inbox had before."""
    replaced: int = 0
    """Verdicts that replace an earlier one of the same annotator."""


class Submissions:
    """The submitters' side of one inbox file. Calls may come from many threads.

    A submission that is sent again adds nothing: a prompt is known by its content, a label by its
    pair or completion and its annotator, whose last verdict counts.
    """

    def __init__(self, run: Path, row_type: RowType) -> None:
        self._run = run
        self._row_type = row_type
        self._rows = RowFile(run, row_type)
        self._last: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def last(self) -> dict[tuple[str, str], str]:
        """Return the last value of each identity: of labels, by (`label_id`, annotator)."""
        with self._lock:
            self._catch_up()
            return dict(self._last)

    def submit(self, rows: Sequence[Mapping[str, object]], *, source: str) -> Submitted:
        """Append the rows that are new; returns once they are on the disk.

        Raises QuotaError where the inbox is full, ConfigError where the run directory has links.
        """
        path = self._rows.path
        check_links(self._run)
        with self._lock, storage_errors("write", path):
            path.parent.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _KEPT_OPEN
            with open(os.open(path, flags, 0o666), "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up()
                new, submitted = self._new(rows, source)
                self._append(file, new, source)
        return submitted

    def _catch_up(self) -> None:
        for row in self._rows.read()[0]:
            key, value = _identity(self._row_type, row, str(row["source"]))
            self._last[key] = value

    def _new(
        self, rows: Sequence[Mapping[str, object]], source: str
    ) -> tuple[list[Mapping[str, object]], Submitted]:
        last: MutableMapping[tuple[str, str], str] = ChainMap({}, self._last)
        new = []
        replaced = 0
        for row in rows:
            key, value = _identity(self._row_type, row, source)
            if last.get(key) == value:
                continue
            replaced += key in last
            last[key] = value
            new.append(row)
        repeated = len(rows) - len(new)
        return new, Submitted(new=len(new), repeated=repeated, replaced=replaced)

    def _append(self, file: BinaryIO, rows: Sequence[Mapping[str, object]], source: str) -> None:
        if not rows:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [
            json.dumps({"id": uuid.uuid4().hex, "time": now, "source": source, **row})
            for row in rows
        ]
        data = "".join(f"{line}\n" for line in lines).encode()
        size = file.seek(0, os.SEEK_END)
        if size and not _ends_with_newline(file):  # an earlier submitter crashed
            data = b"\n" + data
        if size + len(data) > MAX_FILE_BYTES:
            raise QuotaError(
                f"{self._rows.path} has {size / 2**20:,.1f} MiB, and this adds "
                f"{len(data) / 2**20:,.1f}; a campaign accepts {MAX_FILE_BYTES >> 20} MiB of "
                f"{self._row_type} in all"
            )
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _identity(
    row_type: RowType, row: Mapping[str, object], source: str
) -> tuple[tuple[str, str], str]:
    """Return what a row is about, and what it says about that."""
    if row_type == "labels":
        return (label_id(row), source), f"{row['verdict']} {row.get('completions', '')}"
    from rayhf.data.prompts import row_id

    return (row_id(row), ""), ""


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


# ------------------------------------------------------------------------------------ campaign


class Inbox:
    """The campaign's side of the inbox: the only one that takes rows.

    Args:
        run: its run directory.
        check: called before anything is written.
    """

    def __init__(self, run: Path, *, check: Check = lambda: None) -> None:
        self._run = run
        self._check = check
        self._sides: dict[RowType, _Side] = {}

    def take(
        self,
        row_type: RowType,
        iteration: int,
        *,
        limit: int | None = None,
        is_due: Callable[[JsonObject], bool] = lambda row: True,
        warn: Callable[[str], object] = logger.warning,
    ) -> list[JsonObject]:
        """Return the rows of an iteration, each with its `place` in the inbox.

        These are the ones it took before; otherwise those that no iteration has taken and that are
        due, at most `limit`. Where the record of what it took is damaged, it takes them again.
        `warn` gets a line about each line that is no row, and about each damaged record.
        """
        own = self._taken_file(row_type, iteration)
        folder = own.parent
        if own.exists():
            rows, _ = _read(own, warn)
            if rows is not None:
                return rows
        side = self._sides.get(row_type)
        if side is None:
            side = _Side(self._run, row_type)
            for number, file in numbered(folder, f"{row_type}-", ".json").items():
                if number != iteration:
                    side.remove(_read(file, warn)[1])
            self._sides[row_type] = side
        waiting = side.waiting(is_due, warn)[:limit]
        if waiting:
            with storage_errors("write", folder):
                folder.mkdir(exist_ok=True)
            write_json(own, {"rows": waiting, "checksum": checksum({"rows": waiting})}, self._check)
            side.remove({str(row["id"]) for row in waiting})
        return waiting

    def taken(
        self,
        row_type: RowType,
        iterations: Iterable[int],
        *,
        warn: Callable[[str], object] = logger.warning,
    ) -> list[JsonObject]:
        """Return the rows that these iterations took; none of a damaged record."""
        rows: list[JsonObject] = []
        for iteration in iterations:
            file = self._taken_file(row_type, iteration)
            if file.exists():
                rows += _read(file, warn)[0] or []
        return rows

    def _taken_file(self, row_type: RowType, iteration: int) -> Path:
        return self._run / "inbox" / "taken" / f"{row_type}-{iteration:06d}.json"


class _Side:
    """Rows of one type that no iteration has taken."""

    def __init__(self, run: Path, row_type: RowType) -> None:
        self._file = RowFile(run, row_type)
        self._taken: set[str] = set()
        self._waiting: dict[str, JsonObject] = {}

    def waiting(
        self, is_due: Callable[[JsonObject], bool], warn: Callable[[str], object]
    ) -> list[JsonObject]:
        """Return the rows that are due, oldest first."""
        rows, problems = self._file.read()
        for problem in problems:
            warn(f"skipped: {problem}")
        self._waiting |= {str(row["id"]): row for row in rows if row["id"] not in self._taken}
        return [row for row in self._waiting.values() if is_due(row)]

    def remove(self, ids: Set[str]) -> None:
        """Forget rows that an iteration has taken."""
        self._taken |= ids
        for row_id in ids & self._waiting.keys():
            del self._waiting[row_id]


def _read(file: Path, warn: Callable[[str], object]) -> tuple[list[JsonObject] | None, set[str]]:
    """Return the rows in a record, None where it is damaged, and the ids that can be read."""
    with storage_errors("read", file):
        data = read_bytes(file)
    try:
        content = json.loads(data)
        own = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        own = None
    if own is None or own != checksum(content):
        warn(f"inbox/taken/{file.name} is damaged")
        return None, set(re.findall('"id": "([0-9a-f]{32})"', data.decode(errors="replace")))
    rows: list[JsonObject] = content["rows"]
    return rows, {str(row["id"]) for row in rows}
