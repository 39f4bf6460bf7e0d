"""Writes down what a campaign is doing, for whoever looks at the run directory later, or from another machine.

logs/attempt-0003/events.jsonl   what happened: phases, commits, faults; appended
progress.json                    where it is now: replaced at every phase, and every second within one
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from rayhf.campaign.observer import Observer
from rayhf.campaign.store import RunDir

_EVERY_S = 1.0


class Recorder:
    """An Observer that passes everything on to another one."""

    def __init__(self, store: RunDir, inner: Observer) -> None:
        self._store, self._inner = store, inner
        self._phase: tuple[int, str] | None = None
        self._written = 0.0

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        new = (iteration, name) != self._phase
        if new:
            self._phase = (iteration, name)
            self._store.event("phase", name, iteration=iteration)
        if new or time.monotonic() - self._written >= _EVERY_S:
            self._written = time.monotonic()
            self._store.write_progress({"iteration": iteration, "phase": name, "done": done, "total": total})
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._inner.metrics(metrics)

    def event(self, kind: str, message: str) -> None:
        self._store.event(kind, message)
        self._inner.event(kind, message)
