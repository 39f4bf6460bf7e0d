"""An event loop within asyncio's that knows when all of its coroutines wait.

WaveScheduler must know when no explore coroutine can run any more. Counting the coroutines that
wait for a response is not enough: one may wait for a gather of gathers, for tasks that it created,
or for an event, and a response passes through any number of these before a coroutine continues. But
whatever asyncio does between a response and the next step of a coroutine, it does through
`loop.call_soon`: a task's next step, a future's callbacks, a gather that has all its results.
Explore coroutines therefore run on a loop that keeps these calls in a queue of its own. As long as
a coroutine can run, a call that leads to it is in the queue; once the queue is empty, every
coroutine waits for a future that only a response can complete.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from contextvars import Context
from functools import partial
from typing import NoReturn, TypeVar, TypeVarTuple

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class ExplorationLoop(asyncio.AbstractEventLoop):
    """A loop of tasks and futures only; its turns are callbacks of the loop that created it.

    It has no timers, threads or sockets: what an explore coroutine does must follow from responses
    alone. Calls run in the order in which asyncio would run them. Its coroutines cannot await
    futures of the outer loop, nor the outer loop's coroutines futures of this one.
    """

    def __init__(self, coroutines: Iterable[Coroutine[object, object, object]]) -> None:
        """Create a task for each coroutine; they start with the outer loop's next turn."""
        self._outer = asyncio.get_running_loop()
        self._queue: deque[tuple[asyncio.Handle, Context, Callable[[], object]]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self.ended: asyncio.Future[None] = self._outer.create_future()
        """Done when all coroutines have ended; gets the first error of any of them."""
        asyncio.gather(*map(self.create_task, coroutines)).add_done_callback(self._end)

    def _end(self, tasks: asyncio.Future[list[object]]) -> None:
        error = tasks.exception()
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    async def shutdown(self) -> None:
        """Cancel all tasks that are left, and return when they have ended."""
        self.ended.cancel()
        for task in asyncio.all_tasks(self):
            task.cancel()
        await self.wait_until_idle()

    async def wait_until_idle(self) -> None:
        """Return when no coroutine of this loop can run."""
        while not self._idle.is_set():
            await self._idle.wait()

    def call_soon(
        self,
        callback: Callable[[*Args], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Queue a call for the next turn."""
        context = context or contextvars.copy_context()
        handle = asyncio.Handle(callback, args, self, context)
        self._queue.append((handle, context, partial(callback, *args)))
        if self._idle.is_set():
            self._idle.clear()
            self._outer.call_soon(self._turn)
        return handle

    def _turn(self) -> None:
        """Run the next calls in the queue; the outer loop runs its own between two turns."""
        asyncio._set_running_loop(self)  # asyncio.gather and create_task look it up
        try:
            for _ in range(min(len(self._queue), _CALLS_PER_TURN)):
                handle, context, call = self._queue.popleft()
                if not handle.cancelled():
                    context.run(call)
        finally:
            asyncio._set_running_loop(self._outer)
            if self._queue:
                self._outer.call_soon(self._turn)
            else:
                self._idle.set()

    def create_future(self) -> asyncio.Future[Result]:
        """Create a future whose callbacks run in this loop's turns."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[asyncio.Future[object] | None, None, Result]
        | Coroutine[object, object, Result],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[Result]:
        """Create a task that takes its steps in this loop's turns."""
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        """Return False: tasks and futures ask for it."""
        return False

    def call_exception_handler(self, context: Mapping[str, object]) -> None:
        """Report an exception that nothing retrieves, as the outer loop does."""
        self._outer.call_exception_handler(dict(context))

    def call_later(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to wait for a clock."""
        raise RuntimeError(_ONLY_RESPONSES)

    def call_at(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to wait for a clock."""
        raise RuntimeError(_ONLY_RESPONSES)

    def time(self) -> NoReturn:
        """Refuse to tell the time."""
        raise RuntimeError(_ONLY_RESPONSES)

    def run_in_executor(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to wait for a thread."""
        raise RuntimeError(_ONLY_RESPONSES)


_CALLS_PER_TURN = 2048
"""Limit on calls in one turn, so that the outer loop never waits long."""
_ONLY_RESPONSES = (
    "in a deterministic campaign `explore` may only wait for its ExplorationContext, never for a "
    "clock, a thread or a socket"
)
