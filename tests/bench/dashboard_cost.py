"""What an open dashboard costs a real campaign beside it; `tests.bench.view dashboard-cost`.

One campaign of the tiny world runs all the time. Blocks of iterations without and with the
dashboard alternate; "with" is the server and a page in headless Chromium that polls it and draws
the curves again after every iteration. The browser runs at the lowest priority: it stands for one
on another machine. An iteration in which the two start or stop is not counted. The learning rate is
too small to change the policy, so that iterations stay alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from rayhf.tiny import build
from tests.bench.browser import chromium, dashboard

ROOT = Path(__file__).parents[2]
LIMIT_S = 600.0
"""Limit on the wait for one block, and for the start."""
Seconds = list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A block of iterations with an open dashboard."""

    seconds: Seconds
    server: float
    """CPU seconds of the server per second."""
    browser: float
    """CPU seconds of the browser per second."""
    requests: int
    """Requests of the page for data."""


def measure(pairs: int, iterations: int) -> str:
    """Run the campaign; return a table of the seconds per iteration, in Markdown."""
    blocks: list[tuple[Seconds, Beside]] = []
    with (
        tempfile.TemporaryDirectory(prefix="rayhf-cost-") as folder,
        _campaign(Path(folder) / "run") as campaign,
    ):
        campaign.wait(3)  # the first iterations compile and fill caches
        for number in range(pairs):
            without = campaign.block(iterations, time.sleep)
            beside = _with_dashboard(campaign, iterations, Path(folder))
            blocks.append((without, beside))
            ratio = _ratio(without, beside.seconds)
            print(
                f"pair {number + 1}: {statistics.median(without):.3f} s without, "
                f"{statistics.median(beside.seconds):.3f} s with, ratio {ratio:.3f}",
                flush=True,
            )
    return _table(blocks)


def _with_dashboard(campaign: Campaign, iterations: int, folder: Path) -> Beside:
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
        return Beside(
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

    def block(self, iterations: int, sleep: Callable[[float], None]) -> Seconds:
        """Return the seconds of the next iterations that begin from now on."""
        first = len(self._seconds()) + 1  # the one under way is not counted
        return self.wait(first + iterations, sleep)[first : first + iterations]

    def wait(self, count: int, sleep: Callable[[float], None] = time.sleep) -> Seconds:
        """Wait for so many iterations; return the seconds of each."""
        limit = time.monotonic() + LIMIT_S
        while len(seconds := self._seconds()) < count:
            if self._process.poll() is not None:
                raise SystemExit(f"the campaign ended with {self._process.returncode}")
            if time.monotonic() > limit:
                raise SystemExit(f"{count} iterations took longer than {LIMIT_S:.0f} s")
            sleep(0.5)
        return seconds

    def _seconds(self) -> Seconds:
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


def _ratio(without: Seconds, beside: Seconds) -> float:
    return statistics.median(beside) / statistics.median(without)


def _table(blocks: Sequence[tuple[Seconds, Beside]]) -> str:
    without = [seconds for block, _ in blocks for seconds in block]
    beside = [seconds for _, block in blocks for seconds in block.seconds]
    ratios = [_ratio(block, other.seconds) for block, other in blocks]
    low, high = _interval(without, beside)
    server = 100 * statistics.mean(block.server for _, block in blocks)
    browser = 100 * statistics.mean(block.browser for _, block in blocks)
    rows = [
        "| | without | with the dashboard | ratio | 95 % interval | pairs of blocks |",
        "|---|---:|---:|---:|---:|---:|",
        f"| median seconds per iteration | {statistics.median(without):.3f} "
        f"| {statistics.median(beside):.3f} | {_ratio(without, beside):.3f} "
        f"| {low:.3f} to {high:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |",
    ]
    note = (
        f"{len(blocks)} pairs of blocks of {len(blocks[0][0])} iterations in one campaign "
        "(online DPO, arithmetic), alternating. The page asked "
        f"{sum(block.requests for _, block in blocks)} times; the server took {server:.1f} % of a "
        f"core (nice 10), headless Chromium {browser:.1f} % (nice 19: it stands for a browser on "
        "another machine). The interval is a bootstrap over iterations. Target: a ratio of at "
        "most 1.02."
    )
    return "\n".join(rows) + "\n\n" + note


def _interval(without: Seconds, beside: Seconds) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of medians, over iterations."""
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(seconds, size=(2000, len(seconds))), axis=1)
        for seconds in (without, beside)
    ]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)
