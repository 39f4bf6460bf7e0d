"""The one thread that owns an engine, and the queue in front of it.

In: waves (requests that enter the engine together) and exclusive calls, from any thread. Out: a
future for each. They are processed in order of arrival. A wave enters between two engine steps,
whole, and runs beside the waves that are already running (continuous batching).

Synchronization: an exclusive call (new weights, a probe) waits until nothing runs, and everything
behind it in the queue waits for it. A call that is not exclusive runs between two steps. When a
step raises, every future gets the error and the loop is broken for good.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rayhf.errors import ActorLostError, DeadlineError, RayhfError
from rayhf.rollout.partials import Partial, Slot
from rayhf.types import Completion, GenerateRequest

Result = list[tuple[Completion, ...]]
"""The completions of each of a wave's requests."""


@dataclass(eq=False)
class Wave:
    """Requests that enter the engine together."""

    requests: Sequence[GenerateRequest]
    version: int
    """The weights that must generate; with in-flight updates the oldest that may."""
    call: int | None = None
    """Number under which its growth is reported; None: it is not."""
    partials: Mapping[Slot, Partial] = field(default_factory=dict)
    """What another engine has already generated."""
    future: Future[Result] = field(default_factory=Future)


class Driver(Protocol):
    """An engine as the loop sees it; called from the loop's thread only."""

    def admit(self, wave: Wave) -> None:
        """Start all requests of a wave, or raise and start none."""
        ...

    def step(self) -> list[tuple[Wave, Result | RayhfError]]:
        """Take one engine step and return the waves it finished. Raising breaks the loop."""
        ...

    def cancel(self) -> None:
        """Drop every running wave."""
        ...

    def close(self) -> None: ...


D = TypeVar("D", bound=Driver)
T = TypeVar("T")


@dataclass
class _Call(Generic[D]):
    """A function that runs between two steps, or, where it is exclusive, while no wave runs."""

    function: Callable[[D], object]
    exclusive: bool
    future: Future[Any]


class EngineLoop(Generic[D]):
    """A thread that runs a driver.

    `build` is called on that thread; its error is raised in the constructor.
    """

    def __init__(self, build: Callable[[], D]) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.progress = 0
        """Grows whenever the engine did anything: the heartbeat that a watchdog reads."""
        self._queue: deque[Wave | _Call[D]] = deque()
        self._running: set[Wave] = set()
        self._condition = threading.Condition()
        self._closing = False
        self._abort: tuple[str, Future[int]] | None = None
        self._broken: RayhfError | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, ready), name="rollout-engine", daemon=True
        )
        self._thread.start()
        ready.result()

    @property
    def in_flight(self) -> int:
        """Running and queued waves."""
        with self._condition:
            return len(self._running) + sum(isinstance(item, Wave) for item in self._queue)

    def submit(self, wave: Wave) -> Future[Result]:
        self._put(wave)
        return wave.future

    def call(self, function: Callable[[D], T], *, exclusive: bool = True) -> Future[T]:
        """Run `function(driver)`; its error is the future's."""
        future: Future[T] = Future()
        self._put(_Call(function, exclusive, future))
        return future

    def abort(self, reason: str) -> int:
        """Fail every running and queued wave with RayhfError; the engine stays usable.

        Returns how many there were.
        """
        done: Future[int] = Future()
        with self._condition:
            self._check_open()
            self._abort = (reason, done)
            self._condition.notify()
        return done.result()

    def close(self, timeout_s: float = 60.0) -> None:
        """Fail all waves and calls, stop the thread and close the driver.

        Raises DeadlineError where a step does not return.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineError(
                f"closing a rollout engine: its thread is still in a step after {timeout_s:g} s"
            )

    def _put(self, item: Wave | _Call[D]) -> None:
        with self._condition:
            self._check_open()
            self._queue.append(item)
            self._condition.notify()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._closing:
            raise RayhfError("the rollout engine is closed")

    # ----------------------------------------------------------------------- on the loop's thread

    def _run(self, build: Callable[[], D], ready: Future[None]) -> None:
        try:
            driver = build()
        except Exception as error:  # noqa: BLE001 - raised again by the constructor
            self._broken = RayhfError(f"the rollout engine did not start: {error}")
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._iterate(driver):
                pass
            self._fail_all(RayhfError("the rollout engine was closed"))
        except Exception as error:  # noqa: BLE001 - vLLM may raise anything; every caller gets it
            failure = ActorLostError(
                f"the rollout engine failed in a step: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            with self._condition:
                self._broken = failure
            self._fail_all(failure)
        finally:
            driver.close()

    def _iterate(self, driver: D) -> bool:
        """Wait for work, admit what may enter, and take one step. Returns False when closing."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._queue or self._running or self._abort or self._closing
            )
            if self._closing:
                return False
        if self._abort is not None:
            self._abort_waves(driver)
        self._process_queue(driver)
        if self._running:
            started = time.perf_counter()
            finished = driver.step()
            self.busy_s += time.perf_counter() - started
            self.steps += 1
            self.progress += 1
            for wave, result in finished:
                self._running.remove(wave)
                _resolve(wave.future, result)
        return True

    def _process_queue(self, driver: D) -> None:
        """Admit waves and run calls, in order, up to a call that has to wait for running waves."""
        while True:
            with self._condition:
                if not self._queue:
                    return
                item = self._queue[0]
                if isinstance(item, _Call) and item.exclusive and self._running:
                    return
                self._queue.popleft()
            if not item.future.set_running_or_notify_cancel():
                continue
            self.progress += 1
            try:
                if isinstance(item, Wave):
                    driver.admit(item)
                    self._running.add(item)
                else:
                    item.future.set_result(item.function(driver))
            except Exception as error:  # noqa: BLE001 - raised again by the caller's future
                item.future.set_exception(error)

    def _abort_waves(self, driver: D) -> None:
        with self._condition:
            assert self._abort is not None
            reason, done = self._abort
            self._abort = None
            queued = [item for item in self._queue if isinstance(item, Wave)]
            self._queue = deque(item for item in self._queue if not isinstance(item, Wave))
        aborted = [
            *self._running,
            *(wave for wave in queued if wave.future.set_running_or_notify_cancel()),
        ]
        self._running.clear()
        driver.cancel()
        for wave in aborted:
            wave.future.set_exception(RayhfError(f"generation was aborted: {reason}"))
        done.set_result(len(aborted))

    def _fail_all(self, error: RayhfError) -> None:
        with self._condition:
            queued = [item.future for item in self._queue]
            self._queue.clear()
            abort = self._abort
            self._abort = None
        for wave in self._running:
            wave.future.set_exception(error)
        self._running.clear()
        for future in queued:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        if abort is not None:
            abort[1].set_exception(error)


def _resolve(future: Future[Result], result: Result | RayhfError) -> None:
    if isinstance(result, RayhfError):
        future.set_exception(result)
    else:
        future.set_result(result)
