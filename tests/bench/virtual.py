"""An asyncio loop in virtual time, for simulations.

In: coroutines that sleep, set timers and wait for each other, in one thread. Out: the same events
as in real time, in the seconds that the computation itself takes: whenever nothing is ready, the
clock jumps to the next timer. Computation may count as virtual time, too; slow code is then late as
it would be in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Clock(selectors.DefaultSelector):
    """A selector that polls and never blocks."""

    def __init__(self, worked: Callable[[], float]) -> None:
        super().__init__()
        self.now = 0.0
        self.longest_turn_s = 0.0
        self._worked = worked
        self._counted = worked()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        worked = self._worked()
        turn_s = worked - self._counted
        self._counted = worked
        self.longest_turn_s = max(self.longest_turn_s, turn_s)
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is ready and no timer is set")
            turn_s = max(timeout, turn_s)
        self.now += turn_s
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is virtual; it cannot wait for threads and starts none.

    `worked` returns the seconds of computation so far; they pass on the virtual clock too.
    """

    def __init__(self, worked: Callable[[], float] = lambda: 0.0) -> None:
        self._virtual = _Clock(worked)
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(  # type: ignore[override]  # of any callable
        self, executor: Any, func: Callable[..., Result], *args: Any
    ) -> asyncio.Future[Result]:
        """Call `func` at once, as part of this turn."""
        done: asyncio.Future[Result] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  raised where the result is awaited
            done.set_exception(error)
        return done

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
