"""Faults for a running campaign, from outside: which process, which signal, when; and what was left
afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
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


@dataclass
class Campaign:
    """A campaign that runs as a user starts it."""

    world: Path
    config: Path
    overrides: tuple[str, ...] = ()
    supervised: bool = False
    """It runs with --supervise: what it started is the controller's process, and nobody else starts
    it again."""
    process: subprocess.Popen[str] | None = None

    @property
    def run_dir(self) -> Path:
        return self.world / self.config.stem

    def start(self) -> None:
        self.process = subprocess.Popen(
            [RAYHF, "run", self.config, *self.overrides, *(["--supervise"] if self.supervised else [])],
            cwd=self.world, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self, timeout_s: float) -> str:
        """Wait for the end; what it said on stderr. Raises AssertionError unless it ended well."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, said
        return said

    def family(self) -> list[psutil.Process]:
        """The campaign's process and everything it started."""
        assert self.process is not None
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def actors(self, role: str) -> list[psutil.Process]:
        found = []
        for process in self.family():
            try:
                if (
                    ACTORS[role] in " ".join(process.cmdline())
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def rounds(self) -> int:
        """Rounds in metrics.jsonl."""
        file = self.run_dir / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) - 1 if file.exists() else -1

    def events(self) -> list[dict[str, object]]:
        files = sorted((self.run_dir / "logs").glob("attempt-*/events.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def wait_for_rounds(self, rounds: int, timeout_s: float) -> float:
        """Seconds until so many rounds are done; returns at once where the campaign has ended.
        AssertionError where it hangs."""
        started = time.monotonic()
        while self.rounds() < rounds and self.alive():
            assert time.monotonic() - started < timeout_s, (
                f"{self.run_dir.name}: no round {rounds} within {timeout_s:g} s"
            )
            time.sleep(0.05)
        return time.monotonic() - started

    def strike(self, role: str, number: int) -> bool:
        """Send a signal to one of a role's actors, or to the controller; False where there is none
        to hit."""
        victims = [self.family()[self.supervised]] if role == "controller" else self.actors(role)
        if not victims:
            return False
        os.kill(victims[-1].pid, number)
        return True

    def strike_and_recover(self, role: str, number: int, *, timeout_s: float) -> float:
        """Seconds from the strike to two finished rounds more than ever before: the first may have
        been done when it fell.

        Waits where there is nobody to strike: after a learner's death, which is noticed when it is
        needed, all start again.
        """
        deadline, before = time.monotonic() + timeout_s, self.rounds()
        while not self.strike(role, number):
            assert self.alive() and time.monotonic() < deadline, f"{role}: nobody to strike"
            time.sleep(0.2)
            before = self.rounds()
        if role == "controller" and not self.supervised:
            assert self.process is not None
            self.process.wait()
            self.start()
        return self.wait_for_rounds(before + 2, timeout_s)

    def command(self, *words: str | Path) -> str:
        """What a command of rayhf on this run printed. Raises AssertionError unless it ended
        well."""
        done = subprocess.run(
            [RAYHF, *words], cwd=self.world, capture_output=True, text=True, timeout=60
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
    return int(json.loads((run / "campaign.json").read_text())["iteration"])


def orphans(family: list[psutil.Process], grace_s: float = 150.0) -> list[psutil.Process]:
    """Who is still there some time after the end. Ray's own agents take up to a minute and a half
    to notice it."""
    deadline = time.monotonic() + grace_s
    while True:
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def fingerprint(run: Path) -> dict[str, str]:
    """Of everything that must be equal in equal campaigns: samples, pairs, metrics (times aside)
    and weights."""
    found = {}
    for file in sorted([*run.glob("samples/*.parquet"), *run.glob("examples/*.parquet")]):
        found[str(file.relative_to(run))] = hashlib.sha256(
            repr(pq.read_table(file).to_pylist()).encode()
        ).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    found["metrics"] = hashlib.sha256(
        repr([sorted(line.items()) for line in timeless]).encode()
    ).hexdigest()
    for file in sorted(run.glob("policy*/model*.safetensors")):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
