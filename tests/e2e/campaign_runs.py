"""Campaigns as child processes, and the files they write."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq

RAYHF = Path(sys.executable).with_name("rayhf")
"""The installed command."""


def start(world: Path, config: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `rayhf run` in `world`."""
    return subprocess.Popen(
        [RAYHF, "run", config, *overrides],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(world: Path, config: Path, *overrides: str, code: int = 0) -> tuple[str, str]:
    """Run a campaign to its end; return stdout and stderr."""
    process = start(world, config, *overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def metrics(world: Path, name: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without durations."""
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def samples(world: Path, name: str, iteration: int) -> list[dict[str, object]]:
    file = world / name / f"samples/iteration-{iteration:06d}.parquet"
    rows: list[dict[str, object]] = pq.read_table(file).to_pylist()
    return rows


def copy_as_if_killed(process: subprocess.Popen[str], run_dir: Path, copy: Path) -> None:
    """Copy the run directory of a running campaign while all of its processes are suspended.

    The copy is what a power failure would leave; the campaign itself goes on.
    """
    top = psutil.Process(process.pid)
    processes = [top, *top.children(recursive=True)]
    try:
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
        shutil.copytree(run_dir, copy)
    finally:
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
