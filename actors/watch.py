"""Calls to one actor: each has a deadline, and all fail when the actor stops making progress.

A live process is not enough: a stopped process does not respond, and an engine may hang in a step
while its actor still responds. While calls are pending, the actor's `progress`, which changes with
everything it does, is polled on a monotonic clock.

There may be thousands of actors with one call each. Timers would cost more than the calls: one
serves the deadlines of all calls to an actor, and the polls of many actors share one.

Synchronization: `WatchedActor.call` waits for a result, a deadline or a stall, whichever is first.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.actor import ActorHandle

from actors.remote import late_error, result_of, translate_error
from rayhf.errors import DeadlineError

Reply = asyncio.Future[Any]
"""Future of a remote call's result."""
Call = Callable[[ActorHandle], ray.ObjectRef]
"""Calls a method of an actor."""
_MAX_POLL_S = 10.0
_MIN_POLL_S = 0.1
_GRID_S = 0.05


class PendingCalls:
    """Calls to one actor that have not returned, on one event loop.

    One timer serves all deadlines. It stays when the last call returns: an actor that gets one call
    after the other would otherwise cost more for its timers than for its calls.
    """

    def __init__(self, name: str, loop: AbstractEventLoop) -> None:
        self._name = name
        self._loop = loop
        self.deadlines: dict[Reply, float] = {}
        """Deadline of each call, by its future, on the loop's clock."""
        self._errors: dict[Reply, BaseException | None] = {}
        """Reasons why futures were canceled; None: the call is late."""
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, reply: Reply, *, phase: str, timeout_s: float) -> Any:
        """Return the result of a call. Raise DeadlineError when late, or the error of `fail`."""
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        deadline = self._loop.time() + timeout_s
        self.deadlines[reply] = deadline
        if self._timer is None or deadline < self._timer.when():
            self._set_timer(deadline)
        try:
            return await result_of(reply, name=self._name, phase=phase)
        except asyncio.CancelledError:
            if reply not in self._errors or task.cancelling() > cancellations:
                raise  # the waiting task itself was canceled
            late = late_error(name=self._name, phase=phase, timeout_s=timeout_s)
            raise (self._errors[reply] or late) from None
        finally:
            del self.deadlines[reply]
            self._errors.pop(reply, None)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in every pending call."""
        self._cancel(self.deadlines, error)

    def _set_timer(self, deadline: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        now = self._loop.time()
        self._cancel([reply for reply, due in self.deadlines.items() if due <= now], None)
        self._set_timer(min((due for due in self.deadlines.values() if due > now), default=None))

    def _cancel(self, replies: Iterable[Reply], error: BaseException | None) -> None:
        for reply in replies:
            if reply.cancel():  # False where the result is here and its task has not run since
                self._errors[reply] = error


class ProgressWatch:
    """Polls of one actor's progress for as long as it has pending calls, on one event loop.

    When the actor neither responds nor makes progress for `stall_s` seconds, all pending calls
    fail.
    """

    def __init__(
        self,
        name: str,
        actor: ActorHandle,
        calls: PendingCalls,
        *,
        stall_s: float,
        loop: AbstractEventLoop,
    ) -> None:
        self._name = name
        self._actor = actor
        self._calls = calls
        self._stall_s = stall_s
        self._loop = loop
        self._scheduled = False
        """The next tick is due."""
        self._poll: Reply | None = None
        """A poll that has not returned."""
        self._progress: float | None = None
        """Result of the last poll."""
        self._since = 0.0
        """Time at which the actor was first seen at this progress, or got work."""

    def start(self) -> None:
        """Start to watch, or continue; to be called before every call to the actor.

        Not a task per actor, but a timer: there may be thousands of actors, with one call each.
        """
        if not self._calls.deadlines or not self._scheduled:
            self._reset()
        if not self._scheduled:
            self._schedule(self._interval)

    @property
    def _interval(self) -> float:
        return min(_MAX_POLL_S, self._stall_s / 4)

    def _schedule(self, seconds: float) -> None:
        self._scheduled = True
        _call_later(self._loop, seconds, self._tick)

    def _reset(self) -> None:
        self._progress = None
        self._since = self._loop.time()
        self._poll = None

    def _tick(self) -> None:
        self._scheduled = False
        if not self._calls.deadlines:
            return
        left = self._since + self._stall_s - self._loop.time()
        if self._poll is not None and not self._poll.done() and left <= 0:
            self._stalled()
            return
        self._schedule(min(self._interval, max(left, _MIN_POLL_S)))
        if self._poll is None:
            self._start_poll()

    def _start_poll(self) -> None:
        try:
            reply = self._actor.progress.remote().future()
        except Exception as error:  # noqa: BLE001  passed on to the pending calls
            self._calls.fail(error)
            return
        self._poll = asyncio.wrap_future(reply, loop=self._loop)
        self._poll.add_done_callback(self._polled)

    def _polled(self, poll: Reply) -> None:
        error = asyncio.CancelledError() if poll.cancelled() else poll.exception()
        if poll is not self._poll:
            return  # it was sent for calls that have returned since
        self._poll = None
        now = self._loop.time()
        if error is not None:
            self._calls.fail(translate_error(error, name=self._name, phase="watch"))
        elif poll.result() != self._progress:
            self._progress = poll.result()
            self._since = now
        elif now - self._since >= self._stall_s:
            self._stalled()

    def _stalled(self) -> None:
        self._reset()
        self._calls.fail(
            DeadlineError(f"{self._name} has work and made no progress for {self._stall_s:g} s")
        )


class WatchedActor:
    """One actor, alive or lost, whose calls end for certain.

    Args:
        name: for messages.
        handle: the actor, which needs a method `progress`: its result changes with everything that
            the actor does.
        stall_s: longest time without progress while calls are pending.
    """

    def __init__(self, name: str, handle: ActorHandle, *, stall_s: float) -> None:
        self.handle = handle
        self._name = name
        self._stall_s = stall_s
        self._loop: AbstractEventLoop | None = None

    def call(self, call: Call, *, phase: str, timeout_s: float) -> Awaitable[Any]:
        """Return the result of `call(handle)`, to be awaited at once.

        Raises ActorLostError or DeadlineError as soon as it is clear that there will be none.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        reply = asyncio.wrap_future(call(self.handle).future(), loop=loop)
        self._watch.start()
        return self._calls.wait(reply, phase=phase, timeout_s=timeout_s)

    def _bind(self, loop: AbstractEventLoop) -> None:
        """Use timers of this loop from now on."""
        self._loop = loop
        self._calls = PendingCalls(self._name, loop)
        self._watch = ProgressWatch(
            self._name, self.handle, self._calls, stall_s=self._stall_s, loop=loop
        )


# ---------------------------------------------------------------------------------- shared timers

_timers: WeakKeyDictionary[AbstractEventLoop, dict[int, list[Callable[[], None]]]] = (
    WeakKeyDictionary()
)
"""Callbacks by the multiple of `_GRID_S` at which they are due, on each loop's clock."""


def _call_later(loop: AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> None:
    """Call back after `seconds`, or up to `_GRID_S` later, with all others that are due then.

    Thousands of actors get their work at the same time, and each timer makes all others of the loop
    more expensive.
    """
    timers = _timers.setdefault(loop, {})
    slot = math.ceil((loop.time() + seconds) / _GRID_S)
    if slot in timers:
        timers[slot].append(callback)
        return
    timers[slot] = [callback]
    loop.call_at(slot * _GRID_S, _call_all, timers, slot)


def _call_all(timers: dict[int, list[Callable[[], None]]], slot: int) -> None:
    for callback in timers.pop(slot):
        callback()
