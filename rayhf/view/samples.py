"""Lists of samples, training pairs and prompts, a page at a time.

In: a Query and the Parquet files of a run. Out: JSON rows, newest iteration first, and a cursor for
the next page. Files are read one after the other and only as far as the page needs; a filter is
applied to its own columns first.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayhf.data.conversations import parse_answer
from rayhf.errors import ConfigError
from rayhf.view.run import Run

PAGE = 50
"""Rows of a page."""
SEARCH_S = 1.5
"""Seconds after which a search returns what it found, with a cursor that continues it."""
_TEXT = 400
"""Characters of a text in a list."""
_SHOWN = (
    "iteration",
    "prompt_id",
    "sample",
    "source",
    "kind",
    "messages",
    "row",
    "text",
    "score",
    "outcome",
    "reason",
    "finish_reason",
    "policy_version",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which samples to list; None and "" do not filter."""

    first: int | None = None
    """Lowest iteration."""
    last: int | None = None
    """Highest iteration."""
    source: str = ""
    kind: str = ""
    outcome: str = ""
    """Scored, Invalid, Skipped, Failed, or "none" for a sample that was not scored."""
    minimum: float | None = None
    """Lowest score."""
    maximum: float | None = None
    """Highest score."""
    truncated: bool = False
    """Only truncated ones."""
    labeled: bool = False
    """Only those that people labeled."""
    replied: bool = False
    """Only those about which judges wrote something; the rows have it."""
    text: str = ""
    """Text that occurs in the completion or in the prompt, in any case."""
    has: str = ""
    """For lists of prompts: "tree" or "wins"."""
    iteration: int | None = None
    """Cursor: the iteration to continue in."""
    row: int = 0
    """Cursor: rows of that iteration to skip."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of rows, ready for JSON."""

    rows: list[dict[str, Any]]
    next: tuple[int, int] | None
    """(iteration, row) that continue the list; None at its end."""
    reached: int | None
    """The iteration that was read last."""
    total: int
    """Rows of all files, whatever the filter."""

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "next": self.next,
            "reached": self.reached,
            "total": self.total,
        }


def list_samples(run: Run, query: Query) -> Page:
    """Return a page of samples."""
    labels = run.labeled()
    shown = [*_SHOWN, "replies"] if query.replied else list(_SHOWN)
    page = _list(
        run,
        "samples",
        query,
        lambda file: _matching(file, query, labels),
        partial(_sample_rows, columns=shown),
    )
    for row in page.rows:
        row["labeled"] = labels.get((row["iteration"], row["prompt_id"], row["sample"]), "")
    return page


def list_prompts(run: Run, query: Query) -> Page:
    """Return a page of prompts of iterations; `query.has` keeps those with a tree or win rates."""
    return _list(run, "samples", query, lambda file: _first_samples(file, query), _prompt_rows)


def list_examples(run: Run, query: Query) -> Page:
    """Return a page of training examples with two rows: pairs of chosen and rejected."""
    return _list(run, "examples", query, _pairs, _example_rows)


def read_columns(file: Path, columns: list[str]) -> pa.Table:
    """Read columns of a table; one that the file lacks is null. Raises OSError."""
    schema = pq.read_schema(file)
    present = [name for name in columns if name in schema.names]
    table = pq.read_table(file, columns=present)
    for name in columns:
        if name not in present:
            table = table.append_column(name, pa.nulls(len(table)))
    return table


def question(messages: list[Mapping[str, str]] | None) -> str:
    """Return the last message of a prompt."""
    return str(messages[-1]["content"] or "") if messages else ""


def row_columns(text: str | None) -> dict[str, Any]:
    """Return the columns of a prompt's row, from the column `row` of samples."""
    try:
        row = json.loads(text or "{}")
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def reference_answer(row: str | None) -> str:
    """Return the reference answer of a prompt's row, as its scorers got it; empty without one."""
    try:
        return parse_answer(row_columns(row), "row") or ""
    except ConfigError:
        return ""


def cut(text: str | None) -> str:
    """Return the beginning of a text, for lists."""
    text = text or ""
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"


# ------------------------------------------------------------------------------------------ paging


def _list(run: Run, folder: str, query: Query, matching: Any, rows_of: Any) -> Page:
    """Collect a page: `matching` gives a file's row numbers, `rows_of` the JSON of some of them."""
    files = run.tables(folder)
    total = sum(_rows_in(file) for file in files.values())
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    reached = None
    for iteration in sorted(files, reverse=True):
        if not _is_wanted(iteration, query):
            continue
        skip = query.row if iteration == query.iteration else 0
        if len(rows) >= PAGE or (reached is not None and time.monotonic() - started > SEARCH_S):
            return Page(rows, (iteration, skip), reached, total)
        try:
            numbers = matching(files[iteration])[skip:]
            kept = numbers[: PAGE - len(rows)]
            rows += rows_of(run, iteration, files[iteration], kept)
        except OSError:  # the campaign was set back to an earlier iteration
            continue
        reached = iteration
        if len(kept) < len(numbers):
            return Page(rows, (iteration, skip + len(kept)), reached, total)
    return Page(rows, None, reached, total)


def _is_wanted(iteration: int, query: Query) -> bool:
    return (
        (query.first is None or iteration >= query.first)
        and (query.last is None or iteration <= query.last)
        and (query.iteration is None or iteration <= query.iteration)
    )


def _rows_in(file: Path) -> int:
    try:
        return _counted_rows(file, file.stat().st_mtime_ns)
    except OSError:
        return 0


@lru_cache(maxsize=100_000)
def _counted_rows(file: Path, _changed: int) -> int:
    """Count the rows of a file that was last changed at `_changed`."""
    return int(pq.read_metadata(file).num_rows)


def take(file: Path, columns: list[str], numbers: list[int]) -> pa.Table:
    """Read `columns` of the rows `numbers`, which ascend, from their row groups only."""
    with pq.ParquetFile(file) as parquet:
        names = [name for name in columns if name in parquet.schema_arrow.names]
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = sorted({int(np.searchsorted(starts, n, side="right")) - 1 for n in numbers})
        table = parquet.read_row_groups(groups, columns=names)
        offset = np.cumsum([0, *(sizes[group] for group in groups)])
    where = [
        n - starts[group] + offset[groups.index(group)]
        for n in numbers
        for group in [int(np.searchsorted(starts, n, side="right")) - 1]
    ]
    return table.take(pa.array(where, pa.int64()))


# ----------------------------------------------------------------------------------------- samples


def _matching(file: Path, query: Query, labels: Mapping[tuple[int, str, int], str]) -> list[int]:
    """Return the row numbers that a query asks for."""
    columns = ["score", "outcome", "finish_reason", "source", "kind"]
    if query.labeled:
        columns += ["iteration", "prompt_id", "sample"]
    if query.text:
        columns += ["text", "messages"]
    if query.replied:
        columns += ["replies"]
    needed = query != replace(
        Query(), first=query.first, last=query.last, row=query.row, iteration=query.iteration
    )
    if not needed:
        return list(range(_rows_in(file)))
    table = read_columns(file, columns)
    mask = pa.array(np.ones(len(table), dtype=bool))
    for name, wanted in (("source", query.source), ("kind", query.kind)):
        if wanted:
            mask = pc.and_(mask, pc.equal(_text(table[name]), wanted))
    if query.outcome == "none":
        mask = pc.and_(mask, pc.is_null(table["outcome"]))
    elif query.outcome:
        mask = pc.and_(mask, pc.equal(_text(table["outcome"]), query.outcome))
    if query.minimum is not None:
        mask = pc.and_(mask, pc.greater_equal(table["score"], query.minimum))
    if query.maximum is not None:
        mask = pc.and_(mask, pc.less_equal(table["score"], query.maximum))
    if query.truncated:
        mask = pc.and_(mask, pc.equal(_text(table["finish_reason"]), "length"))
    if query.text:
        mask = pc.and_(mask, _contains(table, query.text))
    if query.replied:
        mask = pc.and_(mask, _has_replies(table["replies"]))
    if query.labeled:
        keys = zip(
            *(table[name].to_pylist() for name in ("iteration", "prompt_id", "sample")), strict=True
        )
        mask = pc.and_(mask, pa.array([key in labels for key in keys], pa.bool_()))
    return [int(n) for n in np.flatnonzero(pc.fill_null(mask, False).to_numpy(False))]


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def _has_replies(replies: pa.ChunkedArray) -> Any:
    if pa.types.is_null(replies.type):  # a run without the column
        return pa.nulls(len(replies), pa.bool_())
    return pc.greater(pc.list_value_length(replies), 0)


def _contains(table: pa.Table, text: str) -> Any:
    """Whether a sample's completion or any of its prompt's messages contains `text`."""
    found = pc.match_substring(_text(table["text"]), text, ignore_case=True)
    messages = table["messages"].combine_chunks()
    contents = messages.flatten().field("content")
    hits = pc.fill_null(pc.match_substring(contents, text, ignore_case=True), False)
    owners = pc.list_parent_indices(messages).to_numpy()
    in_prompt = np.zeros(len(table), dtype=bool)
    in_prompt[owners[hits.to_numpy(False)]] = True
    return pc.or_(pc.fill_null(found, False), pa.array(in_prompt))


def _sample_rows(
    run: Run, iteration: int, file: Path, numbers: list[int], *, columns: list[str]
) -> list[dict[str, Any]]:
    if not numbers:
        return []
    rows: list[dict[str, Any]] = take(file, columns, numbers).to_pylist()
    for row in rows:
        row["run"] = run.run_id
        row["prompt"] = cut(question(row.pop("messages")))
        row["reference_answer"] = cut(reference_answer(row.pop("row", None)))
        row["text"] = cut(row["text"])
        row["truncated"] = row.pop("finish_reason") == "length"
        row["version"] = row.pop("policy_version")
    return rows


# ----------------------------------------------------------------------------------------- prompts


def first_of(keys: list[str]) -> list[int]:
    """Return the index of the first occurrence of each key."""
    seen: dict[str, int] = {}
    for index, key in enumerate(keys):
        seen.setdefault(key, index)
    return list(seen.values())


def _first_samples(file: Path, query: Query) -> list[int]:
    """Return the number of each prompt's first row, of those with what `query.has` names."""
    columns = ["prompt_id"]
    columns += {"tree": ["parent", "kind"], "wins": ["wins"]}.get(query.has, [])
    table = read_columns(file, columns)
    prompts = table["prompt_id"].to_pylist()
    if query.has == "tree":
        has = pc.or_(pc.is_valid(table["parent"]), pc.equal(_text(table["kind"]), "step"))
    elif query.has == "wins":
        has = pc.is_valid(table["wins"])
    else:
        return first_of(prompts)
    kept = {prompts[i] for i in np.flatnonzero(pc.fill_null(has, False).to_numpy())}
    return [number for number in first_of(prompts) if prompts[number] in kept]


def _prompt_rows(run: Run, iteration: int, file: Path, numbers: list[int]) -> list[dict[str, Any]]:
    if not numbers:
        return []
    counts = Counter(read_columns(file, ["prompt_id"])["prompt_id"].to_pylist())
    return [
        {
            "run": run.run_id,
            "iteration": iteration,
            "prompt_id": row["prompt_id"],
            "source": row["source"],
            "prompt": cut(question(row["messages"])),
            "samples": counts[row["prompt_id"]],
        }
        for row in take(file, ["prompt_id", "source", "messages"], numbers).to_pylist()
    ]


# ------------------------------------------------------------------------------------------- pairs


def _pairs(file: Path) -> list[int]:
    lengths = pc.list_value_length(read_columns(file, ["samples"])["samples"])
    return [int(n) for n in np.flatnonzero(pc.equal(lengths, 2).to_numpy())]


def _example_rows(run: Run, iteration: int, file: Path, numbers: list[int]) -> list[dict[str, Any]]:
    from rayhf.view.groups import EXAMPLE_COLUMNS, SampleTexts, example_json

    if not numbers:
        return []
    texts = SampleTexts(run)
    rows = take(file, list(EXAMPLE_COLUMNS), numbers).to_pylist()
    return [example_json(run, row, texts) for row in rows]
