"""Calls that are continued by another engine, not repeated, when their engine is lost.

In: requests. Out: their completions. While an engine has calls, it reports at intervals what their
completions have. When it is lost, another engine gets that with the call and generates the rest; it
is the lost one's replacement only where no other runs. What a lost engine generated after its last
report is generated again.

Synchronization: `generate` waits for the engine; reports are requested beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from actors.remote import errors_translated, wait
from actors.supervise import RestartingError, SupervisedActor
from rayhf.errors import RayhfError
from rayhf.rollout.partials import KnownPartials, Partial, Slot
from rayhf.types import GenerateRequest

_REPORT_TIMEOUT_S = 60.0


class ContinuedCalls:
    """The pending calls of several engines.

    Args:
        engines: the engines' actors.
        every_s: seconds between an engine's reports.
        timeout_s: limit on every call.
    """

    def __init__(
        self, engines: Sequence[SupervisedActor], *, every_s: float, timeout_s: float
    ) -> None:
        self._engines = engines
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._known = [KnownPartials() for _ in engines]
        """By engine."""
        self._reports: dict[int, asyncio.Task[None]] = {}
        """By engine, for those with calls."""
        self._count = 0
        self._moved = 0

    async def generate(self, number: int, requests: Sequence[GenerateRequest], version: int) -> Any:
        """Return the completions of every request, from the engine `number` if it is there."""
        self._count += 1
        call = self._count
        parts: Mapping[Slot, Partial] = {}
        while True:
            number = await self._available(number)
            self._open(number, call, parts)
            try:
                return await self._attempt(number, requests, version, call, parts)
            except RestartingError:
                continue
            finally:
                parts = self._close(number, call)

    async def _attempt(
        self,
        number: int,
        requests: Sequence[GenerateRequest],
        version: int,
        call: int,
        parts: Mapping[Slot, Partial],
    ) -> Any:
        return await self._engines[number].attempt(
            lambda actor: actor.generate.remote(list(requests), version, call, parts),
            phase="generate",
            timeout_s=self._timeout_s,
        )

    async def _available(self, number: int) -> int:
        """Return the engine, or another one while it restarts; wait where all of them do."""
        if not self._engines[number].is_restarting:
            return number
        running = [i for i, engine in enumerate(self._engines) if not engine.is_restarting]
        if not running:
            await self._engines[number].restarted()
            return number
        self._moved += 1
        return running[self._moved % len(running)]

    def _open(self, number: int, call: int, parts: Mapping[Slot, Partial]) -> None:
        self._known[number].open(call, parts)
        if number not in self._reports:
            self._reports[number] = asyncio.create_task(self._collect(number))

    def _close(self, number: int, call: int) -> Mapping[Slot, Partial]:
        parts = self._known[number].close(call)
        if not self._known[number]:
            self._reports.pop(number).cancel()
        return parts

    async def _collect(self, number: int) -> None:
        """Request an engine's reports for as long as it has calls."""
        engine = self._engines[number]
        while True:
            await asyncio.sleep(self._every_s)
            try:
                with errors_translated(name=engine.name, phase="generate"):
                    report = engine.actor.report.remote()
                grown = await wait(
                    report, name=engine.name, phase="generate", timeout_s=_REPORT_TIMEOUT_S
                )
            except RayhfError:
                continue  # the engine is lost, which its calls notice
            self._known[number].add(grown)
