"""Restarts of an actor that is lost: it died, does not respond, or stopped making progress.

An engine that does not start because memory of its GPU is taken is started again, too.

actors/watch.py notices the loss, actors/process.py terminates the process, and a new actor is
created, built, and brought to the state of the lost one.

Synchronization: `persist` waits for a result, and for a restart where one is needed; of several
calls that fail together one restarts the actor and the others wait for it. `attempt` does not wait
for a restart.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray.actor import ActorHandle

from actors.process import ProcessInfo, Terminate, terminate
from actors.remote import wait
from actors.watch import Call, WatchedActor
from rayhf.errors import ActorLostError, DeadlineError, GpuMemoryError, StateLostError

Report = Callable[[str, str], None]
"""(kind, message) of an event: to the campaign's event log and the console."""
Stage = Literal["not placed", "building", "ready"]
"""Of an actor: without a process; loading its model; able to work."""
_HOUR_S = 3600.0
_MEMORY_WAIT_S = 10.0
"""Time for other processes to give GPU memory back before an engine is started again."""
_START_S = 300.0
"""Time for an actor's process to start, before it builds anything."""


@dataclass(frozen=True, slots=True)
class SupervisionLimits:
    """How long to wait for progress, and how often to restart."""

    stall_s: float
    """Longest time without progress while there is work."""
    restarts: int
    """Maximum number of restarts of one actor within an hour."""


class RestartingError(Exception):
    """The actor was lost and is being restarted; its call may be made to another one."""


NEVER_RESTARTED = SupervisionLimits(stall_s=math.inf, restarts=0)


@dataclass(frozen=True, slots=True, eq=False)
class _Incarnation:
    """One life of a supervised actor."""

    watched: WatchedActor
    process: ProcessInfo


async def _nothing(actor: ActorHandle) -> None:
    return None


class SupervisedActor:
    """One actor, restarted when it is lost.

    Args:
        name: for messages.
        create: returns a new actor's handle; the actor has methods `process_info` and, for
            `persist`, `progress`.
        build: makes a new actor able to work.
        report: receives an event for each restart.
        diagnosis: directory for the stacks of lost actors.
        terminate: ends an actor's process.
    """

    def __init__(
        self,
        name: str,
        create: Callable[[], ActorHandle],
        build: Callable[[ActorHandle], Awaitable[None]] = _nothing,
        *,
        limits: SupervisionLimits = NEVER_RESTARTED,
        report: Report = lambda kind, message: None,
        diagnosis: Path | None = None,
        terminate: Terminate = terminate,
    ) -> None:
        self.name = name
        self.prepare: Callable[[ActorHandle], Awaitable[None]] = _nothing
        """Brings a replacement to the state of the lost actor; set by the actor's client."""
        self.retired = False
        """The actor is not restarted any more."""
        self.stage: Stage = "not placed"
        self._create = create
        self._build = build
        self._limits = limits
        self._report = report
        self._diagnosis = diagnosis
        self._terminate = terminate
        self._current: _Incarnation | None = None
        self._restarting = asyncio.Lock()
        self._restarts: set[asyncio.Task[None]] = set()
        """Restarts that no call waits for."""
        self._state_lost: StateLostError | None = None
        """Why no replacement can work."""
        self._losses: deque[float] = deque()
        """Times of the losses within the last hour."""

    @property
    def actor(self) -> ActorHandle:
        return self._running.watched.handle

    @property
    def _running(self) -> _Incarnation:
        assert self._current is not None, f"{self.name} was not started"
        return self._current

    async def start(self) -> None:
        """Create and build the actor; terminate it where it cannot be built."""
        self._current = await self._launch()

    async def kill(self, *, stacks: bool = True) -> None:
        """Terminate the actor's process, with its stacks saved first, or gracefully without."""
        if self._current is not None:
            current = self._current
            await self._end(current.watched.handle, current.process, stacks=stacks)

    async def persist(self, call: Call, *, phase: str, timeout_s: float) -> Any:
        """Return the result of `call(actor)`, from a replacement where the actor is lost.

        Raises ActorLostError where it is lost too often, StateLostError where no replacement can
        have its state.
        """
        while True:
            current = self._running
            try:
                return await current.watched.call(call, phase=phase, timeout_s=timeout_s)
            except StateLostError:
                raise
            except (ActorLostError, DeadlineError) as error:
                await self._restart(current, error)

    @property
    def is_restarting(self) -> bool:
        return self._restarting.locked()

    async def restarted(self) -> None:
        """Wait until no restart is in progress; where it failed, the next call fails too."""
        async with self._restarting:
            pass

    async def attempt(self, call: Call, *, phase: str, timeout_s: float) -> Any:
        """Return the result of `call(actor)`.

        Raises RestartingError where the actor is lost, and ActorLostError where it is lost too
        often.
        """
        current = self._running
        try:
            return await current.watched.call(call, phase=phase, timeout_s=timeout_s)
        except StateLostError:
            raise
        except (ActorLostError, DeadlineError) as error:
            restart = asyncio.create_task(self._restart(current, error))
            self._restarts.add(restart)
            restart.add_done_callback(self._forget_restart)
            await asyncio.wait({restart}, timeout=0.0)
            if restart.done():
                restart.result()
            raise RestartingError(self.name) from error

    def _forget_restart(self, restart: asyncio.Task[None]) -> None:
        self._restarts.discard(restart)
        if not restart.cancelled():
            restart.exception()  # the actor stays lost: the next call to it ends in the same error

    async def _restart(self, lost: _Incarnation, error: Exception) -> None:
        """Replace `lost`; do nothing where that has been done."""
        async with self._restarting:
            if self._current is not lost:
                return
            if self._state_lost is not None:
                raise self._state_lost
            started = time.monotonic()
            self._record_loss(error)
            await self.kill()
            try:
                self._current = await self._launch_replacement()
            except StateLostError as lost_state:
                self._state_lost = lost_state
                raise
            seconds = time.monotonic() - started
            self._report("recovered", f"{self.name} restarted in {seconds:.1f} s")

    def _record_loss(self, error: Exception) -> None:
        """Note a loss. Raise ActorLostError where the actor is not restarted any more."""
        now = time.monotonic()
        while self._losses and now - self._losses[0] > _HOUR_S:
            self._losses.popleft()
        self._losses.append(now)
        if self.retired or len(self._losses) > self._limits.restarts:
            raise ActorLostError(
                f"{self.name} was lost {len(self._losses)} times within an hour (run.restarts "
                f"allows {self._limits.restarts}); the last error: {error}"
            ) from error
        self._report("fault", f"restarting {self.name}: {error}")

    async def _launch(self) -> _Incarnation:
        """Create an actor and build it, again where its GPU has too little free memory."""
        while True:
            try:
                return await self._launch_once()
            except GpuMemoryError as error:
                self._record_loss(error)
                await asyncio.sleep(_MEMORY_WAIT_S)

    async def _launch_once(self) -> _Incarnation:
        """Create an actor and build it."""
        self.stage = "not placed"
        actor = self._create()
        process: ProcessInfo | None = None
        try:
            located: ProcessInfo = await wait(
                actor.process_info.remote(), name=self.name, phase="start", timeout_s=_START_S
            )
            process = located
            self.stage = "building"
            await self._build(actor)
            self.stage = "ready"
        except BaseException:
            await self._end(actor, process, stacks=False)
            raise
        return _Incarnation(WatchedActor(self.name, actor, stall_s=self._limits.stall_s), located)

    async def _launch_replacement(self) -> _Incarnation:
        """Create an actor in the state of the lost one; one that dies on the way is a loss, too."""
        while True:
            try:
                replacement = await self._launch()
                try:
                    if self.retired:
                        raise ActorLostError(f"{self.name} is shut down")
                    await self.prepare(replacement.watched.handle)
                except BaseException:
                    await self._end(replacement.watched.handle, replacement.process, stacks=False)
                    raise
                return replacement
            except StateLostError:
                raise
            except ActorLostError as error:
                if self.retired:
                    raise
                self._record_loss(error)

    async def _end(self, actor: ActorHandle, process: ProcessInfo | None, *, stacks: bool) -> None:
        file = None
        if stacks and process is not None and self._diagnosis is not None:
            file = self._diagnosis / f"{self.name.replace(' ', '-')}-{process.pid}.txt"
        await self._terminate(actor, process, graceful=not stacks, stacks=file)
