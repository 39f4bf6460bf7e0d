"""Handles of actors without Ray: calls whose results arrive when a test says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class FakeRef:
    """An ObjectRef whose result arrives later, or never."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.result


def finished(value: Any) -> FakeRef:
    ref = FakeRef()
    ref.result.set_result(value)
    return ref


class FakeMethod:
    """`actor.name.remote(...)`."""

    def __init__(self, call: Callable[..., FakeRef]) -> None:
        self.remote = call


class FakeActor:
    """Actor with a method `double`, whose progress grows unless it is stuck."""

    def __init__(self) -> None:
        self.stuck = False
        self.polls = 0
        self.double = FakeMethod(self._double)
        self.progress = FakeMethod(self._progress)

    def _double(self, number: int) -> FakeRef:
        ref = FakeRef()
        if not self.stuck:
            asyncio.get_running_loop().call_later(
                random.choice([0.0, 0.0, 0.002]), ref.result.set_result, 2 * number
            )
        return ref

    def _progress(self) -> FakeRef:
        self.polls += not self.stuck
        return finished(self.polls)


async def no_process(actor: Any, process: Any, *, graceful: bool, stacks: Any) -> None:
    """Terminate nothing: fake actors have no process."""
