"""Calls of an engine that are continued, not repeated, when the engine is lost.

In: requests. Out: their completions. While calls are pending, the engine reports at intervals what
their completions have; a replacement gets that with the call and generates the rest. What a lost
engine generated after its last report is generated again.

Synchronization: `generate` waits for the engine; reports are requested beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.remote import errors_translated, wait
from actors.supervise import SupervisedActor
from rayhf.errors import RayhfError
from rayhf.rollout.partials import KnownPartials
from rayhf.types import GenerateRequest

_REPORT_TIMEOUT_S = 60.0


class ContinuedCalls:
    """The pending calls of one engine.

    Args:
        engine: the engine's actor.
        every_s: seconds between reports.
    """

    def __init__(self, engine: SupervisedActor, *, every_s: float) -> None:
        self._engine = engine
        self._every_s = every_s
        self._known = KnownPartials()
        self._count = 0
        self._reports: asyncio.Task[None] | None = None

    async def generate(
        self, requests: Sequence[GenerateRequest], version: int, *, timeout_s: float
    ) -> Any:
        """Return the completions of every request."""
        self._count += 1
        call = self._count
        self._known.open(call)
        if self._reports is None:
            self._reports = asyncio.create_task(self._collect())
        try:
            return await self._engine.persist(
                lambda actor: actor.generate.remote(
                    list(requests), version, call, self._known.of(call)
                ),
                phase="generate",
                timeout_s=timeout_s,
            )
        finally:
            self._known.close(call)
            if not self._known:
                self._reports.cancel()
                self._reports = None

    async def _collect(self) -> None:
        """Request reports for as long as there are calls."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                with errors_translated(name=self._engine.name, phase="generate"):
                    report = self._engine.actor.report.remote()
                grown = await wait(
                    report,
                    name=self._engine.name,
                    phase="generate",
                    timeout_s=_REPORT_TIMEOUT_S,
                )
            except RayhfError:
                continue  # the engine is lost, which the pending calls notice
            self._known.add(grown)
