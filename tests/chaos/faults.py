"""Faults for a running campaign, injected from outside, and checks of what is left afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq

RAYHF = Path(sys.executable).with_name("rayhf")
ACTORS = {
    "rollout": "RolloutActor",
    "scorer": "ScorerActor",
    "learner": "LearnerActor",
    "reference": "ReferenceActor",
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class Campaign:
    """A campaign in a process of its own, started as a user starts it."""

    world: Path
    config: Path
    overrides: tuple[str, ...] = ()
    supervised: bool = False
    """Started with --supervise: `process` is the supervisor, which restarts the controller."""
    process: subprocess.Popen[str] | None = None

    @property
    def run_dir(self) -> Path:
        return self.world / self.config.stem

    def start(self) -> None:
        supervise = ["--supervise"] if self.supervised else []
        self.process = subprocess.Popen(
            [RAYHF, "run", self.config, *self.overrides, *supervise],
            cwd=self.world,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self, timeout_s: float) -> None:
        """Wait until the campaign ends. Raises AssertionError unless it exits with 0."""
        assert self.process is not None
        _, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, err

    def stop(self, timeout_s: float) -> None:
        """Stop the campaign with `rayhf stop`. Raises AssertionError unless it exits with 75."""
        assert self.process is not None
        self.command("stop", self.run_dir)
        _, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 75, err

    def processes(self) -> list[psutil.Process]:
        """Return the campaign's process, first, and everything it started."""
        assert self.process is not None
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def actors(self, role: str) -> list[psutil.Process]:
        actors = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if ACTORS[role] in " ".join(process.cmdline()) and _is_running(process):
                    actors.append(process)
        return actors

    def iterations(self) -> int:
        """Return how many iterations are in metrics.jsonl; -1 before iteration 0."""
        file = self.run_dir / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) - 1 if file.exists() else -1

    def events(self) -> list[dict[str, object]]:
        files = sorted((self.run_dir / "logs").glob("attempt-*/events.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def wait_for_iterations(self, count: int, timeout_s: float) -> float:
        """Wait until `count` iterations are done or the campaign ends; return the seconds.

        Raises AssertionError after `timeout_s`.
        """
        started = time.monotonic()
        while self.iterations() < count and self.alive():
            assert time.monotonic() - started < timeout_s, (
                f"{self.run_dir.name}: no iteration {count} within {timeout_s:g} s"
            )
            time.sleep(0.05)
        return time.monotonic() - started

    def inject(self, role: str, number: int) -> bool:
        """Send a signal to an actor of a role, or to the controller; False where none is there."""
        if role == "controller":
            victims = self.processes()[self.supervised : self.supervised + 1]
        else:
            victims = self.actors(role)
        if not victims:
            return False
        os.kill(victims[-1].pid, number)
        return True

    def inject_and_recover(self, role: str, number: int, *, timeout_s: float) -> float:
        """Return the seconds from a fault to two more finished iterations than before it.

        Two, since the first may have been finished when the signal arrived. Waits while no process
        of the role is there, as after a learner's crash, when all actors restart.
        """
        deadline = time.monotonic() + timeout_s
        before = self.iterations()
        while not self.inject(role, number):
            assert self.alive() and time.monotonic() < deadline, f"{role}: no process to signal"
            time.sleep(0.2)
            before = self.iterations()
        if role == "controller" and not self.supervised:
            assert self.process is not None
            self.process.wait()
            self.start()
        return self.wait_for_iterations(before + 2, timeout_s)

    def command(self, *words: str | Path) -> str:
        """Run a command of rayhf; return its stdout. Raises AssertionError unless it exits with
        0."""
        done = subprocess.run(
            [RAYHF, *words], cwd=self.world, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for_state(self, state: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while json.loads((self.run_dir / "campaign.json").read_text())["state"] != state:
            assert time.monotonic() < deadline, (
                f"{self.run_dir.name} was not {state} within {timeout_s:g} s"
            )
            time.sleep(0.05)


def committed(run: Path) -> int:
    """Return the last committed iteration."""
    return int(json.loads((run / "campaign.json").read_text())["iteration"])


def orphans(processes: Sequence[psutil.Process], grace_s: float = 150.0) -> list[psutil.Process]:
    """Return the processes that are left after `grace_s`: Ray's agents take up to 90 s to stop."""
    deadline = time.monotonic() + grace_s
    while True:
        left = [process for process in processes if _is_running(process)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def fingerprint(run: Path) -> dict[str, str]:
    """Return checksums of all that equal campaigns have in common: samples, examples, metrics
    without durations, weights."""
    checksums = {}
    for file in sorted([*run.glob("samples/*.parquet"), *run.glob("examples/*.parquet")]):
        rows = repr(pq.read_table(file).to_pylist())
        checksums[str(file.relative_to(run))] = hashlib.sha256(rows.encode()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        sorted((k, v) for k, v in line.items() if not k.startswith("time/")) for line in lines
    ]
    checksums["metrics"] = hashlib.sha256(repr(metrics).encode()).hexdigest()
    for file in sorted(run.glob("policy*/model*.safetensors")):
        checksums[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return checksums
