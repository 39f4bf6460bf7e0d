"""Processes of actors: where they run, and how to terminate them together with their children.

In: an actor's handle and the ProcessInfo that it reported. Out: nothing; a file with its stacks if
requested.

Synchronization: `terminate` waits until the process is gone, at most some seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.remote import wait
from rayhf.config.import_path import USER_FOLDER, import_path
from rayhf.errors import ActorLostError, DeadlineError

_DUMP_S = 10.0
_EXIT_S = 5.0
"""Time for a healthy process to exit by itself."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Location of an actor's process, as it reports it."""

    node: str
    """Ray's id of the node."""
    pid: int
    created: float
    """Start time of the process, which tells it from a later one with the same pid."""


def process_info() -> ProcessInfo:
    """Return the location of the calling process."""
    return ProcessInfo(
        ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time()
    )


class ReportsProcess:
    """Base of the actor classes."""

    def __init__(self) -> None:
        folder = os.environ.get(USER_FOLDER)
        if folder is not None:  # an actor may get objects of the user's modules
            sys.path[:] = import_path(sys.path, folder)

    def process_info(self) -> ProcessInfo:
        return process_info()


CONCURRENCY_GROUPS = {"watch": 1}
"""Option of `ray.remote` for subclasses of ReportsAlive: a poll must not wait for a long call."""


class ReportsAlive(ReportsProcess):
    """Base of actor classes whose calls are limited by their deadlines alone."""

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def progress(self) -> float:
        """Return a number that grows as long as the process runs."""
        return time.monotonic()


class Terminate(Protocol):
    """Signature of `terminate`."""

    async def __call__(
        self,
        actor: ActorHandle,
        process: ProcessInfo | None,
        *,
        graceful: bool,
        stacks: Path | None,
    ) -> None: ...


async def terminate(
    actor: ActorHandle, process: ProcessInfo | None, *, graceful: bool, stacks: Path | None
) -> None:
    """End an actor's process for certain, even a stopped one that ignores signals.

    Args:
        actor: the handle.
        process: None where the actor has not started yet.
        graceful: let Ray end it first, so that Ray does not report a crash.
        stacks: file for the stacks of a process that is still there, written before it is killed.
    """
    if graceful:
        ray.kill(actor, no_restart=True)
    if process is not None:
        await _on_node(process.node, end_process, process, stacks, _EXIT_S if graceful else 0.0)
    if not graceful:
        ray.kill(actor, no_restart=True)


async def _on_node(node: str, function: Callable[..., None], *arguments: object) -> None:
    """Run `function` on a node, for at most some seconds; do nothing where the node is gone."""
    if node == ray.get_runtime_context().get_node_id():
        await asyncio.to_thread(function, *arguments)
        return
    remote = ray.remote(num_cpus=0)(function).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    with contextlib.suppress(DeadlineError, ActorLostError, ray.exceptions.RayError):
        await wait(
            remote.remote(*arguments), name=f"node {node}", phase="kill", timeout_s=3 * _DUMP_S
        )


def end_process(process: ProcessInfo, stacks: Path | None, grace_s: float) -> None:
    """Kill a process of this node and its children unless it exits within `grace_s` seconds."""
    with contextlib.suppress(psutil.NoSuchProcess):
        running = psutil.Process(process.pid)
        if running.create_time() != process.created:
            return
        with contextlib.suppress(psutil.TimeoutExpired):
            running.wait(grace_s)
            return
        if stacks is not None:
            _write_stacks(process.pid, stacks)
        for each in [*running.children(recursive=True), running]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)


def _write_stacks(pid: int, file: Path) -> None:
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    # The stacks only help to find the cause: the process is killed with or without them.
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        file.parent.mkdir(parents=True, exist_ok=True)
        dump = subprocess.run(
            [py_spy, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_DUMP_S,
            check=False,
        )
        file.write_text(dump.stdout or dump.stderr)
