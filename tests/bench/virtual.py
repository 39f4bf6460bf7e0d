"""Time that passes only while everybody waits: an asyncio loop for simulations.

In: coroutines that sleep, set timers and wait for each other, in one thread. Out: the same run as
in real time, in the seconds that its own work takes: whenever nothing is ready, the clock jumps to
the next timer. Work may count as time too: then whoever works too much comes too late, as in real
life.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Clock(selectors.DefaultSelector):
    """Looks, and never waits."""

    def __init__(self, worked: Callable[[], float]) -> None:
        super().__init__()
        self.now = 0.0
        self.longest_turn_s = 0.0
        self._worked, self._counted = worked, worked()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        worked = self._worked()
        turn_s, self._counted = worked - self._counted, worked
        self.longest_turn_s = max(self.longest_turn_s, turn_s)
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits for ever: nothing is ready and no timer is set")
            turn_s = max(timeout, turn_s)
        self.now += turn_s
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its `time()` is virtual. Threads have no place in it: the clock would run away from them.

    `worked`: seconds of work so far; they pass on the virtual clock too.
    """

    def __init__(self, worked: Callable[[], float] = lambda: 0.0) -> None:
        self._virtual = _Clock(worked)
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    @property
    def longest_turn_s(self) -> float:
        """Work in the longest turn so far, in seconds: for so long a real loop would have heard
        nobody."""
        return self._virtual.longest_turn_s


def simulate(
    work: Coroutine[Any, Any, Result], worked: Callable[[], float] = lambda: 0.0
) -> tuple[Result, VirtualLoop]:
    """Run to the end in virtual time. RuntimeError where everybody waits for something that cannot
    come."""
    loop = VirtualLoop(worked)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work), loop
