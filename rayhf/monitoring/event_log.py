"""An observer that records in the run directory what a campaign is doing.

logs/attempt-0003/events.jsonl   what happened: phases, commits, faults; appended
progress.json                    the current phase, when it last moved, and when the process was
                                 last `alive`; replaced at every phase, every second within one, and
                                 by every heartbeat
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from rayhf.monitoring.observer import Observer
from rayhf.run_dir.progress import Progress
from rayhf.run_dir.store import RunDir

_WRITE_EVERY_S = 1.0
_HEARTBEAT_S = 20.0


class EventLog:
    """An Observer that passes everything on to another one."""

    def __init__(self, store: RunDir, inner: Observer) -> None:
        self._store = store
        self._inner = inner
        self._phases: dict[int, str] = {}
        """By iteration: where exploration runs ahead, several report in turn."""
        self._written = 0.0
        self._progress = Progress()

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        """Record a new phase as an event, and progress at most once a second."""
        is_new = self._phases.get(iteration) != name
        if is_new:
            self._phases[iteration] = name
            self._store.event("phase", name, iteration=iteration)
        self._progress = Progress(
            iteration=iteration,
            phase=name,
            done=done,
            total=total,
            time=time.time(),
            waiting=self._progress.waiting,
        )
        if is_new or time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._write()
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Pass on; the controller writes metrics.jsonl itself."""
        self._inner.metrics(metrics)

    def event(self, kind: str, message: str) -> None:
        """Record an event, and for a pause what the campaign waits for."""
        if kind in ("pause", "unpause"):
            waiting = message if kind == "pause" else ""
            self._progress = replace(self._progress, waiting=waiting)
            self._write()
        self._store.event(kind, message)
        self._inner.event(kind, message)

    async def beat(self) -> None:
        """Write heartbeats until canceled, also while nothing moves."""
        while True:
            self._write()
            await asyncio.sleep(_HEARTBEAT_S)

    def _write(self) -> None:
        self._written = time.monotonic()
        self._store.write_progress(replace(self._progress, alive=time.time()))
