"""Hub data sets, read by the real huggingface_hub and datasets clients from tests/hub.py.

Both read their environment at import, so the client is a process: one for all cases, since
importing datasets takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub, hub_server

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.parquet}
  - {split: test, path: main/test.parquet}
- config_name: other
  data_files:
  - {split: train, path: main/test.parquet}
---
"""
READ = """
import json, sys
from pathlib import Path
from rayhf.config.load import load_section
from rayhf.data.readers import named_rows, open_source
from rayhf.errors import ConfigError
from rayhf.data.hub import HubSourceConfig
cases, commits = map(json.loads, sys.argv[1:])
for case in cases:
    try:
        source = open_source(HubSourceConfig(**case), base=Path(), key="k", commits=commits)
        result = {"rows": list(named_rows(source, key="k"))}
    except ConfigError as error:
        result = {"error": str(error)}
    print("RESULT", json.dumps(result))
print("RESULT", json.dumps(commits))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    with hub_server(tmp_path / "hub") as server:
        yield server


def data_set(directory: Path, *questions: str) -> Path:
    (directory / "main").mkdir(parents=True)
    (directory / "README.md").write_text(CARD)
    table = pa.table({"question": list(questions), "n": pa.array([1, None][: len(questions)])})
    pq.write_table(table, directory / "main/train.parquet")
    pq.write_table(pa.table({"question": ["test"]}), directory / "main/test.parquet")
    return directory


def read(
    hub: Hub, home: Path, cases: list[dict[str, Any]], commits: dict[str, str], **env: str
) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(cases), json.dumps(commits)],
        env=os.environ | hub.env(home, token=None) | env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def test_data_set_is_pinned_and_refusals_name_what_is_valid(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("dataset", "org/data", data_set(tmp_path / "a", "old", "b"))
    hub.add("dataset", "org/gated", data_set(tmp_path / "c", "x"))
    hub.gate("org/gated", "some-token")
    name = {"dataset": "org/data", "config": "main"}
    cases = [
        {**name, "rename": {"question": "prompt"}, "filter": "n is not none"},
        {**name, "split": "test"},
        {**name, "config": "mian"},
        {"dataset": "org/data"},
        {**name, "split": "tset"},
        {"dataset": "org/nothing"},
        {"dataset": "org/gated", "config": "main"},
        {**name, "revision": "v9"},
    ]
    *results, commits = read(hub, tmp_path / "home", cases, {})
    assert commits["org/data"] == commit
    assert results[0]["rows"] == [["k: org/data (main, train) row 1", {"prompt": "old", "n": 1}]]
    assert [row["question"] for _, row in results[1]["rows"]] == ["test"]
    for result, expected in zip(
        results[2:],
        (
            "no configuration 'mian'; expected `config` to be one of ['main', 'other']",
            "several configurations; expected `config` to be one of ['main', 'other']",
            "no split 'tset'; expected one of ['train', 'test']",
            "nor a data set of that name on http://127.0.0.1",
            "org/gated is gated; request access at http://127.0.0.1",
            "org/data has no revision v9",
        ),
        strict=True,
    ):
        assert result["error"].startswith("k: ") and expected in result["error"]
        assert "\n" not in result["error"]

    # The branch moves; the recorded commit stays, also without the hub.
    moved = hub.add("dataset", "org/data", data_set(tmp_path / "b", "new"))
    assert moved != commit
    offline = {"HF_HUB_OFFLINE": "1"}
    (kept, _) = read(hub, tmp_path / "home", cases[:1], {"org/data": commit}, **offline)
    assert [row["prompt"] for _, row in kept["rows"]] == ["old"]
    uncached, other, _ = read(
        hub, tmp_path / "home", [{**name, "revision": moved}, {"dataset": "org/x"}], {}, **offline
    )
    assert "the cache does not have commit" in uncached["error"]
    assert "HF_HUB_OFFLINE is set" in other["error"]
