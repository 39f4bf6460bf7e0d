"""What an open dashboard costs a real campaign beside it; `tests.bench.view dashboard-cost`.

One campaign of the tiny world runs all the time. Blocks of iterations take turns: without a
dashboard; with its server, asked as an open overview asks it ("browser elsewhere"); and with a page
in headless Chromium on this machine, which draws the curves again after every iteration, at the
lowest priority. An iteration in which a dashboard starts or stops is not counted. The learning rate
is too small to change the policy, so that iterations stay alike.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil

from rayhf.tiny import build
from tests.bench.browser import chromium, dashboard

ROOT = Path(__file__).parents[2]
LIMIT_S = 600.0
"""Limit on the wait for one block, and for the start."""
APP = ROOT / "rayhf" / "view" / "static" / "app.js"
WITHOUT, ELSEWHERE, HERE = "without", "with, browser elsewhere", "with, browser here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of iterations, and what an open dashboard cost."""

    seconds: Sequence[float]
    server: float = 0.0
    """CPU seconds of the server per second."""
    browser: float = 0.0
    """CPU seconds of the browser per second."""
    requests: int = 0
    """Requests of the page for data."""


def measure(turns: int, iterations: int) -> str:
    """Run the campaign; return a table of the seconds per iteration, in Markdown."""
    blocks: dict[str, list[Block]] = {WITHOUT: [], ELSEWHERE: [], HERE: []}
    with (
        tempfile.TemporaryDirectory(prefix="rayhf-cost-") as folder,
        _campaign(Path(folder) / "run") as campaign,
    ):
        campaign.wait(3)  # the first iterations compile and fill caches
        for number in range(turns):
            blocks[WITHOUT].append(Block(seconds=campaign.block(iterations, time.sleep)))
            blocks[ELSEWHERE].append(_asked(campaign, iterations))
            blocks[HERE].append(_shown(campaign, iterations, Path(folder)))
            medians = (f"{statistics.median(b[-1].seconds):.3f} s {k}" for k, b in blocks.items())
            print(f"turn {number + 1}: {'; '.join(medians)}", flush=True)
    return _table(blocks)


def _asked(campaign: Campaign, iterations: int) -> Block:
    """Serve the campaign to a client that asks as `refresh` of app.js does."""
    found = re.search(r"REFRESH_MS = (\d+)", APP.read_text())
    assert found is not None
    every_s = int(found[1]) / 1e3
    with dashboard(campaign.run) as (url, server):
        requests = 0
        known: Any = None
        due = time.monotonic()

        def ask(what: str) -> Any:
            nonlocal requests
            requests += 1
            with urlopen(f"{url.rstrip('/')}/api/{what}") as answer:
                return json.load(answer)

        def wait(seconds: float) -> None:
            nonlocal known, due
            if time.monotonic() >= due:
                due += every_s
                runs = ask("runs")
                if runs != known:
                    known = runs
                    ask(f"overview?run={runs[0]['id']}")
            time.sleep(seconds)

        wait(0.0)
        before = _used([server])
        started = time.monotonic()
        measured = campaign.block(iterations, wait)
        took = time.monotonic() - started
        return Block(seconds=measured, server=(_used([server]) - before) / took, requests=requests)


def _shown(campaign: Campaign, iterations: int, folder: Path) -> Block:
    """Serve the campaign to a browser on this machine."""
    with chromium(folder) as browser, dashboard(campaign.run) as (url, server):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("body[data-shown]", timeout=1e3 * LIMIT_S)
        before = _cpu(server)
        started = time.monotonic()
        seconds = campaign.block(iterations, lambda s: page.wait_for_timeout(1e3 * s))
        took = time.monotonic() - started
        after = _cpu(server)
        entries = "performance.getEntriesByType('resource')"
        return Block(
            seconds=seconds,
            server=(after[0] - before[0]) / took,
            browser=(after[1] - before[1]) / took,
            requests=page.evaluate(f"{entries}.filter(e => e.name.includes('/api/')).length"),
        )


class Campaign:
    """A running campaign and the seconds of its iterations."""

    def __init__(self, run: Path, process: subprocess.Popen[bytes]) -> None:
        self.run = run
        self._process = process

    def block(self, iterations: int, sleep: Callable[[float], None]) -> list[float]:
        """Return the seconds of the next iterations that begin from now on."""
        first = len(self._seconds()) + 1  # the one under way is not counted
        return self.wait(first + iterations, sleep)[first : first + iterations]

    def wait(self, count: int, sleep: Callable[[float], None] = time.sleep) -> list[float]:
        """Wait for so many iterations; return the seconds of each."""
        limit = time.monotonic() + LIMIT_S
        while len(seconds := self._seconds()) < count:
            if self._process.poll() is not None:
                raise SystemExit(f"the campaign ended with {self._process.returncode}")
            if time.monotonic() > limit:
                raise SystemExit(f"{count} iterations took longer than {LIMIT_S:.0f} s")
            sleep(0.5)
        return seconds

    def _seconds(self) -> list[float]:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row["time/iteration_s"] for row in rows if row["iteration"] > 0]


@contextmanager
def _campaign(run: Path) -> Iterator[Campaign]:
    """Run a campaign until the block is left."""
    task = build(Path(os.environ.get("RAYHF_TINY_DIR", ROOT / ".tiny")), tasks=["arithmetic"])
    files = task["arithmetic"]
    command = [str(Path(sys.executable).with_name("rayhf")), "run"]
    command += [
        "configs/tiny/online_dpo_arithmetic.yaml",
        f"run.dir={run}",
        "run.iterations=100000",
        "run.eval_every=0",
        "run.checkpoint_every=100000",
        f"policy.model={files.policy}",
        f"prompts.train={files.train}",
        f"prompts.heldout={files.heldout}",
        "learner.lr=1e-8",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            yield Campaign(run, process)
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def _cpu(server: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds of the server, and of the browser's processes."""
    browsers = [
        p for p in psutil.Process().children(recursive=True) if p.name().startswith("chrom")
    ]
    return _used([server]), _used(browsers)


def _used(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def _table(blocks: dict[str, list[Block]]) -> str:
    without = _seconds(blocks[WITHOUT])
    rows = [
        "| | median s per iteration | ratio | 95 % interval | server | browser | requests |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, each in blocks.items():
        seconds = _seconds(each)
        cells = [name, f"{statistics.median(seconds):.3f}"]
        if name != WITHOUT:
            low, high = _interval(without, seconds)
            cells += [
                f"{statistics.median(seconds) / statistics.median(without):.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{100 * statistics.mean(block.server for block in each):.1f} %",
                f"{100 * statistics.mean(block.browser for block in each):.1f} %",
                str(sum(block.requests for block in each)),
            ]
        rows.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
    first = blocks[WITHOUT]
    note = (
        f"{len(first)} turns of blocks of {len(first[0].seconds)} iterations in one campaign "
        "(online DPO, arithmetic). Elsewhere: the server alone, asked for what an open overview "
        "asks. Here: headless Chromium at nice 19 as well. The server runs at nice 10; its and the "
        "browser's CPU time are percentages of one core. The interval is a bootstrap over "
        "iterations. Target: a ratio of at most 1.02."
    )
    return "\n".join(rows) + "\n\n" + note


def _seconds(blocks: Sequence[Block]) -> list[float]:
    return [seconds for block in blocks for seconds in block.seconds]


def _interval(without: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of medians, over iterations."""
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(seconds, size=(2000, len(seconds))), axis=1)
        for seconds in (without, beside)
    ]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)
