"""An actor that is replaced when it is lost: it died, it does not answer, or it has work and makes
no progress.

Being alive is not enough: a stopped process answers nothing, and an engine may hang in a step while
its actor still answers. So whoever supervises watches a counter that grows with every engine step,
on a monotonic clock. A lost actor's stacks are saved where they can be, its process is killed on
its own node, and a new one is started and built. Callers who held the old one get ActorLostError;
`persist` asks the new one again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.remote import answer, translated, wait
from rayhf.errors import ActorLostError, DeadlineError

Report = Callable[[str, str], None]
"""(kind, message): to the campaign's event log and whoever watches."""
_HOUR_S = 3600.0
_DUMP_S = 10.0
_QUIET_S = 5.0
_START_S = 300.0
"""For an actor's process to appear, before it builds anything."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Where an actor's process is; told by itself once it is built."""

    node: str
    pid: int
    created: float
    """Its start time: another process may get the pid."""


def process_info() -> ProcessInfo:
    """Of the calling process."""
    return ProcessInfo(
        ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time()
    )


@dataclass(frozen=True, slots=True)
class SupervisionLimits:
    """How long to wait and how often to try again."""

    stall_s: float
    """Without progress, while there is work."""
    restarts: int
    """Of one actor within an hour."""


Stage = Literal["not placed", "building", "ready"]
"""Of an actor: without a process; placed, and loading what it works with; able to work."""
NEVER_REPLACED = SupervisionLimits(stall_s=math.inf, restarts=0)


async def _nothing(actor: Any) -> None:
    return None


class SupervisedActor:
    """One actor under supervision.

    Args:
        create: a new actor's handle; the actor has methods `process_info` and, if it is asked by
        `ask` or `persist`, `progress`. build: makes the new actor able to work.
    """

    def __init__(
        self,
        name: str,
        create: Callable[[], Any],
        build: Callable[[Any], Awaitable[None]] = _nothing,
        *,
        limits: SupervisionLimits = NEVER_REPLACED,
        report: Report = lambda kind, message: None,
        diagnosis: Path | None = None,
    ) -> None:
        self.name, self.limits = name, limits
        self.prepare: Callable[[Any], Awaitable[None]] = _nothing
        """Brings a replacement to where the lost actor was; for whoever asks to set."""
        self.retired = False
        """Nobody is hired in its place any more."""
        self.stage: Stage = "not placed"
        self._create, self._build, self._report, self._diagnosis = create, build, report, diagnosis
        self._life = 0
        self._actor: Any = None
        self._where: ProcessInfo | None = None
        self._replacing = asyncio.Lock()
        self._losses: deque[float] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Whose timers these are."""
        self._asked: dict[asyncio.Future[Any], float] = {}
        """Every reply that somebody waits for, and until when, on the loop's clock."""
        self._given_up: dict[asyncio.Future[Any], BaseException | None] = {}
        """Replies that will not come, and why; None for one that is late. Whoever waits takes his
        out."""
        self._alarm: asyncio.TimerHandle | None = None
        """One timer for all of them: thousands would cost more than the questions. It and the next
        stay when nobody asks any more: an engine that gets one question after the other would cost
        more for its timers than for the questions."""
        self._ticking = False
        """The actor will be looked at."""
        self._look: asyncio.Future[Any] | None = None
        """Its progress, asked for and not yet told."""
        self._seen: Any = None
        self._since = 0.0
        """The progress that was told last, and when it was first."""

    @property
    def actor(self) -> Any:
        return self._actor

    async def start(self) -> None:
        """Create and build. What was created and could not be built is ended."""
        self._actor, self._where = await self._hire()

    async def _hire(self) -> tuple[Any, ProcessInfo]:
        self.stage = "not placed"
        actor, where = self._create(), None
        try:
            where = await wait(
                actor.process_info.remote(), who=self.name, phase="start", timeout_s=_START_S
            )
            self.stage = "building"
            await self._build(actor)
            self.stage = "ready"
            return actor, where
        except BaseException:
            await self._end(actor, where, stacks=False)
            raise

    async def persist(self, call: Callable[[Any], Any], *, phase: str, timeout_s: float) -> Any:
        """The answer to `call(actor)`, from a replacement where the actor is lost; ActorLostError
        where that is too often."""
        while True:
            life = self._life
            try:
                return await self.ask(call, phase=phase, timeout_s=timeout_s)
            except (ActorLostError, DeadlineError) as lost:
                await self._replace(life, lost)

    async def _replace(self, life: int, why: Exception) -> None:
        """Put a new actor in the place of the one that lived `life`; nothing where that was done
        already."""
        async with self._replacing:
            if self._life != life:
                return
            lost = time.monotonic()
            self._count_loss(why)
            await self.kill()
            self._actor, self._where = await self._successor()
            self._life = life + 1
            self._watch_anew()
            self._report("recovered", f"{self.name} is back after {time.monotonic() - lost:.1f} s")

    def _count_loss(self, why: Exception) -> None:
        """Raises ActorLostError where nobody comes after it."""
        now = time.monotonic()
        while self._losses and now - self._losses[0] > _HOUR_S:
            self._losses.popleft()
        self._losses.append(now)
        if self.retired or len(self._losses) > self.limits.restarts:
            raise ActorLostError(
                f"{self.name} was lost {len(self._losses)} times within an hour "
                f"(run.restarts allows {self.limits.restarts}); the last time: {why}"
            ) from why
        self._report("fault", f"{self.name} is replaced: {why}")

    async def _successor(self) -> tuple[Any, ProcessInfo]:
        """A new actor, brought to where the lost one was. One that dies before it is ready is a
        loss like any other."""
        while True:
            try:
                actor, where = await self._hire()
                try:
                    if self.retired:
                        raise ActorLostError(f"{self.name} is not needed any more")
                    await self.prepare(actor)
                except BaseException:
                    await self._end(actor, where, stacks=False)
                    raise
                return actor, where
            except ActorLostError as why:
                if self.retired:
                    raise
                self._count_loss(why)

    async def kill(self, *, stacks: bool = True) -> None:
        """Save its stacks, then end its process for certain, also where it is stopped and hears
        nothing."""
        await self._end(self._actor, self._where, stacks=stacks)

    async def _end(self, actor: Any, where: ProcessInfo | None, *, stacks: bool) -> None:
        if actor is not None and not stacks:
            ray.kill(
                actor, no_restart=True
            )  # who is well goes quietly, and Ray does not report a crash
        if where is not None:
            file = None
            if stacks and self._diagnosis is not None:
                file = self._diagnosis / f"{self.name.replace(' ', '-')}-{where.pid}.txt"
            await on_node(where.node, end_process, where, file, 0.0 if stacks else _QUIET_S)
        if actor is not None and stacks:
            ray.kill(actor, no_restart=True)

    async def ask(self, call: Callable[[Any], Any], *, phase: str, timeout_s: float) -> Any:
        """The answer to `call(actor)`. Raises ActorLostError or DeadlineError as soon as it is
        clear that none will come."""
        loop, asker = asyncio.get_running_loop(), asyncio.current_task()
        assert asker is not None
        cancelled = asker.cancelling()
        reply = asyncio.wrap_future(call(self._actor).future(), loop=loop)
        self._wait_until(reply, loop.time() + timeout_s, loop)
        try:
            return await answer(reply, who=self.name, phase=phase)
        except asyncio.CancelledError:
            if reply not in self._given_up or asker.cancelling() > cancelled:
                raise  # the asker himself was cancelled
            late = DeadlineError(f"{phase}: no answer from {self.name} within {timeout_s:g} s")
            raise (self._given_up[reply] or late) from None
        finally:
            self._asked.pop(reply, None)
            self._given_up.pop(reply, None)

    def _wait_until(
        self, reply: asyncio.Future[Any], due: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        if loop is not self._loop:
            self._loop, self._alarm, self._ticking = loop, None, False
        if not self._asked or not self._ticking:
            self._watch_anew()
        self._asked[reply] = due
        if not self._ticking:
            self._ticking = True
            _soon_after(loop, self._pause, self._watch)
        if self._alarm is None or due < self._alarm.when():
            self._set_alarm(due)

    def _set_alarm(self, due: float | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if due is None else asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        now = asyncio.get_running_loop().time()
        self._give_up([reply for reply, due in self._asked.items() if due <= now], None)
        self._set_alarm(min((due for due in self._asked.values() if due > now), default=None))

    def _give_up(self, replies: Iterable[asyncio.Future[Any]], why: BaseException | None) -> None:
        for reply in replies:
            if (
                reply.cancel()
            ):  # False where the answer is there, and its asker has not come round to it yet
                self._given_up[reply] = why

    @property
    def _pause(self) -> float:
        return min(10.0, self.limits.stall_s / 4)

    def _watch(self) -> None:
        """Look at the actor, one look for all who wait, again and again until nobody does. It has
        work: when it neither answers nor gets on for `stall_s`, they are told.

        Not a task: there may be thousands of actors, and one question for each. The actor's
        `progress` must grow whenever it did anything.
        """
        loop, self._ticking = asyncio.get_running_loop(), False
        if not self._asked:
            return
        left = self._since + self.limits.stall_s - loop.time()
        if self._look is not None and not self._look.done() and left <= 0:
            self._stalled()
            return
        self._ticking = True
        _soon_after(loop, min(self._pause, max(left, 0.1)), self._watch)
        if self._look is None:
            try:
                self._look = asyncio.wrap_future(self._actor.progress.remote().future(), loop=loop)
            except Exception as error:  # noqa: BLE001  passed on to whoever waits, not swallowed
                self._give_up(self._asked, error)
            else:
                self._look.add_done_callback(self._looked)

    def _looked(self, look: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if look.cancelled() else look.exception()
        if look is not self._look:
            return  # nobody waits any more who waited then
        self._look, now = None, asyncio.get_running_loop().time()
        if error is not None:
            self._give_up(self._asked, translated(error, who=self.name, phase="watch"))
        elif look.result() != self._seen:
            self._seen, self._since = look.result(), now
        elif now - self._since >= self.limits.stall_s:
            self._stalled()

    def _watch_anew(self) -> None:
        self._seen, self._since, self._look = None, asyncio.get_running_loop().time(), None

    def _stalled(self) -> None:
        self._watch_anew()
        self._give_up(
            self._asked,
            DeadlineError(
                f"{self.name} has work and made no progress for {self.limits.stall_s:g} s"
            ),
        )


_GRID_S = 0.05
_timers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, list[Callable[[], None]]]] = (
    WeakKeyDictionary()
)
"""By multiples of `_GRID_S`, on each loop's clock."""


def _soon_after(loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
    """Call it then or up to `_GRID_S` later, with all others who are due: thousands of actors get
    their work at the same time, and a timer of its own for each makes every timer of the loop
    dearer."""
    timers = _timers.setdefault(loop, {})
    slot = math.ceil((loop.time() + seconds) / _GRID_S)
    if slot in timers:
        timers[slot].append(call)
        return
    timers[slot] = [call]
    loop.call_at(slot * _GRID_S, _ring_all, timers, slot)


def _ring_all(timers: dict[int, list[Callable[[], None]]], slot: int) -> None:
    for call in timers.pop(slot):
        call()


async def on_node(node: str, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function` there, at most some seconds; a node that is gone has nothing left to do."""
    if node == ray.get_runtime_context().get_node_id():
        await asyncio.to_thread(function, *arguments)
        return
    remote = ray.remote(num_cpus=0)(function).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    with contextlib.suppress(DeadlineError, ActorLostError, ray.exceptions.RayError):
        await wait(
            remote.remote(*arguments), who=f"node {node}", phase="kill", timeout_s=3 * _DUMP_S
        )


def end_process(where: ProcessInfo, stacks: Path | None, grace_s: float) -> None:
    """Kill the process and its children where it is still there after `grace_s`; its stacks are
    written to a file first. To be called on its own node."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(where.pid)
        if process.create_time() != where.created:
            return
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(grace_s)
            return
        if stacks is not None:
            _write_stacks(where.pid, stacks)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)


def _write_stacks(pid: int, file: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("py-spy")),
        "dump",
        "--nonblocking",
        "--pid",
        str(pid),
    ]
    with contextlib.suppress(
        OSError, subprocess.TimeoutExpired
    ):  # a help to whoever looks for the cause, not a condition
        file.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DUMP_S, check=False)
        file.write_text(done.stdout or done.stderr)
