"""Attacks on how a campaign ends: signals, lost processes, full disks, closed pipes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil

from tests.chaos.attacks.attack import Attack, Result
from tests.chaos.faults import RAYHF, Campaign, orphans
from tests.chaos.harness import make_campaign
from tests.e2e.world import make_world

START_S = 120.0
END_S = 60.0
ORPHAN_S = 45.0


class Run:
    """A campaign in a process of its own, whose end is looked at."""

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str | Path] = (),
        run_dir: str = "run",
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        if not (folder / "policy").exists():
            make_world(folder)
        self.campaign: Campaign = make_campaign(
            folder, "run", "online_dpo", run={"dir": run_dir, "checkpoint_every": 1}
        )
        self.process = subprocess.Popen(
            [*command, RAYHF, "run", self.campaign.config],
            cwd=folder,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.campaign.process = self.process
        self.family: list[psutil.Process] = []

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds or the process ends; note the processes of its family."""
        deadline = time.monotonic() + START_S
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.family = self.campaign.processes()

    def has(self, name: str) -> bool:
        """Whether it has started a process of this name."""
        return any(_name(process) == name for process in self.campaign.processes())

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process that it started, by its name."""
        for process in self.family:
            if _name(process) == name:
                process.kill()

    def end(self, code: int, said: str, timeout_s: float = END_S) -> str:
        """Return "" where it ends with `code`, at most one line with `said`, and no orphan."""
        started = time.monotonic()
        try:
            _, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return f"alive after {timeout_s:g} s"
        self.seconds = time.monotonic() - started
        if self.process.returncode != code:
            return f"exit code {self.process.returncode} instead of {code}: {stderr[-300:]}"
        lines = stderr.strip().splitlines()
        if len(lines) != 1 or said not in lines[0]:
            return f"{len(lines)} lines: {stderr[-300:]}"
        left = orphans(self.family, ORPHAN_S)
        return f"left behind: {', '.join(map(_name, left))}" if left else ""


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _result(run: Run, problem: str) -> Result:
    if problem:
        return 1, 0, problem
    return 1, 1, f"exit code {run.process.returncode} after {run.seconds:.1f} s, no process left"


def killed(process: str, folder: Path, seed: int) -> Result:
    """SIGKILL of a process of the campaign's own Ray cluster, while it runs."""
    run = Run(folder)
    run.wait_for(lambda: run.campaign.iterations() >= 1)
    run.kill(process)
    return _result(run, run.end(10, "everything it ran is lost"))


def signaled_at_start(number: int, times: int, folder: Path, seed: int) -> Result:
    """A signal, repeated, while Ray starts."""
    run = Run(folder)
    run.wait_for(lambda: run.has("gcs_server"))
    for _ in range(times):
        _send(run, number)
        time.sleep(0.2)
    return _result(run, run.end(75, "interrupted"))


def signaled_while_running(number: int, folder: Path, seed: int) -> Result:
    """A signal three times, and nobody reads what the campaign prints."""
    reader, writer = os.pipe()
    run = Run(folder, stdout=writer)
    os.close(writer)
    os.close(reader)
    run.wait_for(lambda: run.campaign.iterations() >= 2)
    for _ in range(3):
        _send(run, number)
        time.sleep(0.3)
    return _result(run, run.end(75, "interrupted"))


def _send(run: Run, number: int) -> None:
    if run.process.poll() is None:
        os.kill(run.process.pid, number)


def full_disk(size: str, free: str, folder: Path, seed: int) -> Result:
    """A run directory on a disk of `size` that has `free` left."""
    if not _may_mount():
        return 0, 0, "not tried: this machine allows no mounts in a namespace"
    disk = folder / "disk"
    disk.mkdir()
    fill = f"head -c $(( {size} - {free} )) /dev/zero > {disk}/filled"
    script = f'mount -t tmpfs -o size={size} none {disk} && {fill}; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh"]
    run = Run(folder, command=command, run_dir="disk/run")
    run.wait_for(lambda: run.has("gcs_server"))
    return _result(run, run.end(8, "No space left on device", START_S + END_S))


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True).returncode == 0


RAYLET = Attack(
    "Ray's raylet is killed", "300 s of waiting, then exit code 2", partial(killed, "raylet")
)
ATTACKS: list[Attack] = [
    RAYLET,
    Attack("Ray's GCS is killed", "the same", partial(killed, "gcs_server")),
    Attack(
        "SIGTERM while Ray starts",
        "exit code 15, unknown to `rayhf explain`",
        partial(signaled_at_start, signal.SIGTERM, 1),
    ),
    Attack(
        "Ctrl-C three times while Ray starts",
        "exit code 130, or a traceback",
        partial(signaled_at_start, signal.SIGINT, 3),
    ),
    Attack(
        "Ctrl-C three times while it runs, standard output closed",
        "a traceback, exit code 130 or 1",
        partial(signaled_while_running, signal.SIGINT),
    ),
    Attack(
        "SIGHUP three times while it runs, standard output closed",
        "ended at once, two processes left",
        partial(signaled_while_running, signal.SIGHUP),
    ),
    Attack(
        "a full disk at the start",
        "exit code 1",
        partial(full_disk, "131072", "0"),
    ),
    Attack(
        "a disk that fills while it runs",
        "exit code 1, a traceback in `status`",
        partial(full_disk, "1048576", "900000"),
    ),
]
