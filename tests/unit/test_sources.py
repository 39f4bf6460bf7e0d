"""Sources: files in every format, directories and globs; columns; malformed rows."""

from __future__ import annotations

import gzip
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rayhf.config.sources import SourceConfig
from rayhf.data.columns import MAX_DEPTH, Columns, json_row
from rayhf.data.files import FileSource, FileSourceConfig
from rayhf.data.readers import named_rows, open_source, read_rows
from rayhf.errors import ConfigError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "ü", "n": None}]
LINES = b'{"prompt": "a", "n": 1}\n\n{"prompt": "\xc3\xbc", "n": null}\n'


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read_rows(path, key="k")]


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    files = {
        "p.jsonl": LINES,
        "p.ndjson": b"\xef\xbb\xbf" + LINES,
        "p.json": json.dumps(ROWS).encode(),
        "lines.json": LINES,
        "p.jsonl.gz": gzip.compress(LINES),
        "p.jsonl.zst": zstandard.compress(LINES),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(table, tmp_path / "p.parquet")
    write_stream(tmp_path / "stream.arrow", table)
    write_file(tmp_path / "file.arrow", table)
    for path in tmp_path.iterdir():
        assert rows_of(path) == ROWS, path


def test_separated_values_stay_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,answer,id\n"a, ""b""\nc",007,\nd,42.0,x\n')
    (tmp_path / "p.tsv").write_text("prompt\tanswer\na\t1\n")
    assert rows_of(tmp_path / "p.csv") == [
        {"prompt": 'a, "b"\nc', "answer": "007", "id": None},
        {"prompt": "d", "answer": "42.0", "id": "x"},
    ]
    assert rows_of(tmp_path / "p.tsv") == [{"prompt": "a", "answer": "1"}]


def test_directories_and_globs_name_each_file(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.jsonl", "b/1.jsonl.gz", ".hidden.jsonl", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = json.dumps({"prompt": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name[-1] == "z" else content)
    read = list(read_rows(tmp_path, key="k"))
    assert [row["prompt"] for _, row in read] == ["a.jsonl", "b/1.jsonl.gz", "b/2.jsonl"]
    assert [where for where, _ in read] == [
        f"k: {tmp_path / name} row 1" for name in ("a.jsonl", "b/1.jsonl.gz", "b/2.jsonl")
    ]
    found = FileSource(FileSourceConfig(path=Path("**/*.jsonl")), base=tmp_path)
    assert [row["prompt"] for row in found.rows()] == ["a.jsonl", "b/2.jsonl"]


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    (saved / "train").mkdir(parents=True)
    for name in ("dataset_info.json", "state.json"):
        (saved / "train" / name).write_text("{}")
    write_stream(saved / "train/data-00000-of-00001.arrow", pa.Table.from_pylist(ROWS))
    assert rows_of(saved / "train") == ROWS
    (saved / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds several splits; expected .*saved/train$"):
        rows_of(saved)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', " row 2: not valid JSON (Expecting value"),
        ("p.jsonl", b"[1]\n", " row 1: expected an object, got list"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', " row 1: not valid UTF-8"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", " row 1: an integer of more"),
        ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 200_000, " row 1: nested too deep"),
        ("p.jsonl", b'{"prompt": "a\\ud800b"}', " row 1: column `prompt` has the lone surrogate"),
        ("p.jsonl", b'{"a\\ud800": 1}', " row 1: a column's name has the lone surrogate"),
        ("p.jsonl", b'{"x": Infinity}', " row 1: column `x` is infinite"),
        ("p.json", b'[{"a": 1}, 2]', " row 2: expected an object, got int"),
        ("p.json", b"[\n{]", ": not valid JSON (Expecting property name enclosed in double"),
        ("p.csv", b"a,b\n1\n", " row 1: 1 cells; the header has 2"),
        ("p.csv", b"a,a\n", ": two columns are named 'a'"),
        ("p.csv", b"a\n\xff\n", ": not valid UTF-8"),
        ("p.csv", b'a\n"b', ": not valid CSV (unexpected end of data)"),
        ("p.jsonl.gz", b"no", ": cannot be read ("),
        ("p.jsonl.gz", gzip.compress(LINES * 999)[:-90], ": cannot be read (Truncated"),
        ("p.jsonl.zst", zstandard.compress(LINES * 999)[:-9], ": cannot be read (Truncated"),
        ("p.parquet", b"no", ": not a Parquet file ("),
        ("p.arrow", b"no", ": not an Arrow file ("),
        ("p.txt", b"a", " has ending '.txt'; expected .jsonl"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(f"k: {tmp_path / name}{expected}")
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, expected in (
        ("nothing.jsonl", "no such file or directory"),
        ("*.jsonl", "no file matches"),
        ("empty", "has no data file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            rows_of(tmp_path / path)


def test_text_of_arrow_files_is_checked_row_by_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"b", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"p\.parquet row 3: not valid UTF-8"):
        rows_of(tmp_path / "p.parquet")


def test_values_of_other_libraries_become_json(tmp_path: Path) -> None:
    row = {
        "day": date(2026, 1, 2),
        "price": Decimal("12.50"),
        "whole": Decimal("3"),
        "array": np.arange(3),
        "scalar": np.float32("nan"),
        "flag": np.bool_(True),
        "pair": (1, {"x": float("nan")}),
        "large": 10**4000,
    }
    plain = json_row(row)
    assert plain == {
        "day": "2026-01-02",
        "price": 12.5,
        "whole": 3,
        "array": [0, 1, 2],
        "scalar": None,
        "flag": True,
        "pair": [1, {"x": None}],
        "large": 10**4000,
    }
    assert json.loads(json.dumps(plain)) == plain
    deep: Any = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for value, expected in (
        (b"png", "holds bytes"),
        ({"bytes": b"png", "path": None}, "holds bytes"),
        (object(), "is a object; expected text"),
        ({1: 2}, "has a mapping with the key 1"),
        (deep, "is nested more than"),
        (10**4300, "has an integer of more than"),
    ):
        with pytest.raises(ConfigError, match=rf"^column `x` {expected}.*`drop`"):
            json_row({"x": value})


def shaped(rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    placed = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return [dict(row) for _, row in Columns(SourceConfig(**settings)).apply(placed)]


def test_columns_are_dropped_renamed_filtered_and_cut() -> None:
    rows = [
        {"question": f"q{n}", "meta": {"gold": n}, "image": b"", "Level 1": n} for n in range(9)
    ]
    assert shaped(
        rows,
        drop=["image"],
        rename={"question": "prompt", "meta.gold": "answer"},
        filter="answer % 2 == 1 and row['Level 1'] > 2",
        limit=2,
    ) == [{"prompt": f"q{n}", "meta": {"gold": n}, "answer": n, "Level 1": n} for n in (3, 5)]
    swapped = shaped([{"a": 1, "b": 2}], rename={"a": "b", "b": "a"})
    assert swapped == [{"b": 1, "a": 2}]


def test_template_makes_the_user_message() -> None:
    rows = [{"question": "1+1?", "messages": [1], "hints": ["x", "{{ question }}"]}]
    (row,) = shaped(rows, template="{{ question }} Hint: {{ hints | join(', ') }}")
    assert row == {
        "question": "1+1?",
        "hints": ["x", "{{ question }}"],
        "prompt": "1+1? Hint: x, {{ question }}",  # text of a row is never a template
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"filter": "a +"}, "filter is not valid jinja"),
        ({"template": "{{ a"}, "template is not valid jinja"),
        ({"filter": "b == 1"}, "row 1: filter: UndefinedError: 'b' is undefined"),
        ({"filter": "a"}, "row 1: filter gives 1; expected true or false"),
        ({"filter": "a.__class__.__mro__ is none"}, "row 1: filter: SecurityError"),
        ({"template": "{{ 'x' * 10**9 }}"}, "row 1: template: OverflowError"),
        ({"template": "{% for _ in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}"}, "OverflowError"),
        ({"rename": {"text": "prompt"}}, "rename: no row has a column 'text'"),
        ({"rename": {"prmpt": "prompt2"}}, "rename: no row has a column 'prmpt'; did you mean"),
        ({"rename": {"a": "prompt"}}, "row 1: rename makes a column `prompt`, but there is one"),
        ({"drop": ["b"]}, "drop: no row has a column 'b'"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(settings: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        shaped([{"a": 1, "prompt": "p"}], **settings)
    assert expected in str(error.value)


def test_open_source_applies_the_changes_and_keeps_row_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"q": "{n}", "n": {n}}}\n' for n in range(4)))
    config = FileSourceConfig(path=Path("p.jsonl"), rename={"q": "prompt"}, filter="n > 1")
    source = open_source(config, base=tmp_path, key="k")
    read = list(named_rows(source, key="k"))
    assert [row["prompt"] for _, row in read] == [row["prompt"] for row in source.rows()]
    assert [where[-6:] for where, _ in read] == [" row 3", " row 4"]
    both = open_source(config, config.model_copy(update={"limit": 1}), base=tmp_path, key="k")
    assert [row["prompt"] for row in both.rows()] == ["2", "3", "2"]
    with pytest.raises(ConfigError, match=r"^k: filter is not valid jinja"):
        open_source(config.model_copy(update={"filter": "a +"}), base=tmp_path, key="k")
