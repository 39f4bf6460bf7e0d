"""An asyncio loop in virtual time, for simulations.

In: coroutines that sleep, set timers and wait for each other. Out: the same events as in real time,
in the seconds that the computation itself takes: whenever nothing is ready, the clock jumps to the
next timer. Computation may count as virtual time, too; slow code is then late as it would be in
real time. While a thread of `run_in_executor` is at work, time passes as it really does.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Clock(selectors.DefaultSelector):
    """A selector that polls and never blocks."""

    def __init__(self, worked: Callable[[], float]) -> None:
        super().__init__()
        self.now = 0.0
        self.longest_turn_s = 0.0
        self.threads = 0
        """Calls of `run_in_executor` in progress."""
        self._worked = worked
        self._counted = worked()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        worked = self._worked()
        turn_s = worked - self._counted
        self._counted = worked
        self.longest_turn_s = max(self.longest_turn_s, turn_s)
        ready = super().select(0)
        if not ready and self.threads:
            began = time.perf_counter()
            ready = super().select(timeout)
            turn_s += time.perf_counter() - began
            self._counted = self._worked()
        elif not ready:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is ready and no timer is set")
            turn_s = max(timeout, turn_s)
        self.now += turn_s
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is virtual.

    `worked` returns the seconds of computation so far; they pass on the virtual clock too.
    """

    def __init__(self, worked: Callable[[], float] = lambda: 0.0) -> None:
        self._virtual = _Clock(worked)
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Result], *args: Any
    ) -> asyncio.Future[Result]:
        """Run a function in a thread; the clock does not jump before it has returned."""
        self._virtual.threads += 1
        future: asyncio.Future[Result] = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._returned)
        return future

    async def shutdown_default_executor(self, *limits: float) -> None:
        """Wait for idle threads to end."""
        self._virtual.threads += 1
        try:
            await super().shutdown_default_executor(*limits)
        finally:
            self._virtual.threads -= 1

    def _returned(self, future: asyncio.Future[Any]) -> None:
        self._virtual.threads -= 1

    @property
    def longest_turn_s(self) -> float:
        """Seconds of computation in the longest turn; a real loop would block as long."""
        return self._virtual.longest_turn_s


def simulate(
    work: Coroutine[Any, Any, Result], worked: Callable[[], float] = lambda: 0.0
) -> tuple[Result, VirtualLoop]:
    """Run a coroutine to its end in virtual time. Raises RuntimeError for a deadlock."""
    loop = VirtualLoop(worked)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work), loop
