"""Writes down what a campaign is doing, for whoever looks at the run directory later, or from
another machine.

logs/attempt-0003/events.jsonl   what happened: phases, commits, faults; appended
progress.json                    where it is now, since when, and that the process was there at
                                 `alive`: replaced at every phase, every second within one, and by
                                 every heartbeat
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from rayhf.monitoring.observer import Observer
from rayhf.run_dir.store import RunDir

_EVERY_S = 1.0
_BEAT_S = 20.0


class EventLog:
    """An Observer that passes everything on to another one."""

    def __init__(self, store: RunDir, inner: Observer) -> None:
        self._store, self._inner = store, inner
        self._phases: dict[int, str] = {}
        """Of every round: several are under way where exploration runs ahead, and they report in
        turn."""
        self._written = 0.0
        self._progress: dict[str, Any] = {}

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        new = self._phases.get(iteration) != name
        if new:
            self._phases[iteration] = name
            self._store.event("phase", name, iteration=iteration)
        self._progress |= {
            "iteration": iteration,
            "phase": name,
            "done": done,
            "total": total,
            "time": time.time(),
        }
        if new or time.monotonic() - self._written >= _EVERY_S:
            self._write()
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._inner.metrics(metrics)

    def event(self, kind: str, message: str) -> None:
        if kind in ("pause", "unpause"):
            self._progress["waiting"] = message if kind == "pause" else ""
            self._write()
        self._store.event(kind, message)
        self._inner.event(kind, message)

    async def beat(self) -> None:
        """Until cancelled: say that the process is there, also while nothing moves."""
        while True:
            self._write()
            await asyncio.sleep(_BEAT_S)

    def _write(self) -> None:
        self._written = time.monotonic()
        self._store.write_progress({**self._progress, "alive": time.time()})
