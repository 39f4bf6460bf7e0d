"""Systems that are timed in turns: each a child process (peers.py), one training step at a time."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from typing import Any

import psutil

from tests.bench.workload import Spec

ROOT = Path(__file__).resolve().parents[2]
PAUSE_S = 0.2
"""Pause between turns: spinning worker threads of one system sleep before the next starts."""
TURNS_S = 120.0
"""Time limit for the turns of one case."""


@dataclass
class Peer:
    """A timed system in a child process, and its measurements."""

    label: str
    kind: str
    spec: Spec
    process: subprocess.Popen[str]
    log: Path
    seconds: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    rss_gib: float = 0.0
    pss_gib: float = 0.0
    cpu_s: float = 0.0
    """CPU seconds of the process tree."""

    @staticmethod
    def start(label: str, kind: str, spec: Spec, scratch: Path) -> Peer:
        log = scratch / f"{label}.log".replace(" ", "-")
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(spec.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.peers", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
                cwd=scratch,
                env=env,
            )
        peer = Peer(label, kind, spec, process, log)
        peer._write(spec.dump())
        return peer

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read_report(self) -> dict[str, Any]:
        """Wait for the report of a step. Raises SystemExit where the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.label} ended with code {self.process.wait()}:\n{tail}")
        report: dict[str, Any] = loads(line)
        return report

    def turn(self, *, keep: bool) -> None:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        self._write("go")
        report = self.read_report()
        if keep:
            self.seconds.append(time.perf_counter() - started)
            self.reports.append(report)

    def stop(self) -> None:
        """Record memory and CPU time, then stop the process."""
        if self.process.poll() is None:
            self.rss_gib, self.pss_gib, self.cpu_s = usage(self.process.pid)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Completions per second over whole training steps."""
        return self.spec.completions / self.median

    def phase(self, name: str) -> float | None:
        values = [r["phases"][name] for r in self.reports if name in r.get("phases", {})]
        return statistics.median(values) if values else None

    @property
    def length(self) -> float:
        return statistics.fmean(report["length"] for report in self.reports)


def usage(pid: int) -> tuple[float, float, float]:
    """Return the peak RSS and the PSS of a process tree in GiB, and its CPU seconds.

    The peak is the sum of every process's own, shared pages counted in each; PSS divides them.
    """
    peak = 0
    proportional = 0
    cpu = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            cpu += sum(process.cpu_times()[:4])
        except (OSError, psutil.NoSuchProcess):  # it has just ended
            continue
        peak += sum(int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.M))
        proportional += sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M))
    return peak / 2**20, proportional / 2**20, cpu


class OtherProcesses:
    """CPU time of processes that do not belong to the benchmark: much of it spoils the figures."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy = self._total()
        self._self = self._own()
        self.peers_s = 0.0
        """CPU seconds of stopped peers."""

    @staticmethod
    def _total() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + times.nice)

    @staticmethod
    def _own() -> float:
        return float(sum(psutil.Process().cpu_times()[:2]))

    def share(self) -> float:
        """Return their share of the machine's CPU time so far, from 0 to 1."""
        busy = self._total() - self._busy - self.peers_s - (self._own() - self._self)
        return max(0.0, busy) / ((time.monotonic() - self._started) * (os.cpu_count() or 1))


def time_peers(
    title: str, systems: dict[str, tuple[str, Spec]], scratch: Path, *, warmup: int, turns: int
) -> dict[str, Peer]:
    """Start every system, warm up, time it in turns, stop it.

    A system's first report ends its first step. After TURNS_S there are no more turns, but there
    are at least 3.
    """
    log(f"{title}: starting {', '.join(systems)}")
    peers: dict[str, Peer] = {}
    try:
        # One after the other: Ray clusters that start at the same time exceed Ray's time limits.
        for label, (kind, spec) in systems.items():
            peers[label] = Peer.start(label, kind, spec, scratch)
            peers[label].read_report()
        deadline = time.monotonic() + TURNS_S
        for number in range(warmup - 1 + turns):
            if number >= warmup + 2 and time.monotonic() > deadline:
                break
            for peer in peers.values():
                peer.turn(keep=number >= warmup - 1)
    finally:
        for peer in peers.values():
            peer.stop()
    for label, peer in peers.items():
        spread = f"{min(peer.seconds):.2f} to {max(peer.seconds):.2f}"
        log(f"  {label:<24} {peer.median:6.2f} s per step ({spread}), {peer.rate:.1f}/s")
    return peers


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
