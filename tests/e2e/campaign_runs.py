"""Campaigns in processes of their own, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

RAYHF = Path(sys.executable).with_name("rayhf")


def start(world: Path, config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [RAYHF, "run", config, *overrides],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(world: Path, config: Path, *overrides: str, code: int = 0) -> tuple[str, str]:
    process = start(world, config, *overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def metrics(world: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def samples(world: Path, name: str, iteration: int) -> list[dict[str, object]]:
    return pq.read_table(world / name / f"samples/iteration-{iteration:06d}.parquet").to_pylist()


def wait_for(condition, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
