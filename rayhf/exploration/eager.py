"""The fast scheduler: requests are sent as early as the roles can take them.

A generation is sent at once, since engines batch continuously. Score requests are sent as soon as
fewer than `score_calls` calls are in flight, together with all that arrived meanwhile. The journal
is written several times a second: a campaign that was killed repeats its last requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar

from rayhf.exploration.codecs import RequestT, ResponseT
from rayhf.exploration.scheduler import RequestQueue, RequestScheduler, run_beside

_FLUSH_EVERY_S = 0.2
"""Seconds between two writes of the journal; closing it writes the rest."""
_STARTED_PER_TURN = 256
"""Coroutines that start in one turn of the event loop, which sends all their first requests."""


class EagerScheduler(RequestScheduler):
    """Sends generations at once, and score requests in a few calls at a time."""

    writes_through: ClassVar[bool] = False
    _calls: set[asyncio.Task[Any]]
    """Tasks with a call in progress: those of the scheduler, and any that `explore` created."""
    _senders: dict[object, int]
    """By queue, the number of its tasks that send calls."""

    async def _run(self, workers: Sequence[Coroutine[object, object, None]]) -> None:
        self._calls = set()
        self._senders = {}
        tasks: list[asyncio.Task[None]] = []
        ended = asyncio.create_task(_start(workers, tasks))
        try:
            await run_beside(ended, self._flush_regularly())
        finally:
            unfinished = {task for task in (ended, *tasks, *self._calls) if not task.done()}
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            for worker in workers[len(tasks) :]:
                worker.close()

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            if self._journal is not None:
                self._journal.flush()

    async def _request(
        self, queue: RequestQueue[RequestT, ResponseT], request: RequestT
    ) -> ResponseT:
        if queue.is_continuous:
            return await self._send_one(queue, request)
        response = queue.put(request)
        if self._senders.get(queue, 0) < self._score_calls and len(queue.pending) == 1:
            self._senders[queue] = self._senders.get(queue, 0) + 1
            task = asyncio.create_task(self._send_batches(queue))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        return await response

    async def _send_one(
        self, queue: RequestQueue[RequestT, ResponseT], request: RequestT
    ) -> ResponseT:
        journal = self._journal
        codec = queue.codec
        if journal is not None and codec is not None:
            recorded = journal.recall(codec, request)
            if recorded is not None:
                return recorded
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            with self.stopwatch(queue.timer):
                (response,) = await queue.call([request])
        finally:
            self._calls.discard(task)
        if journal is not None and codec is not None:
            journal.add(codec, [request], [response])
        return response

    async def _send_batches(self, queue: RequestQueue[RequestT, ResponseT]) -> None:
        await asyncio.sleep(0)  # coroutines that continue in the same turn share a call
        while pending := queue.take():
            await self._send(queue, pending)
        self._senders[queue] -= 1


async def _start(
    workers: Sequence[Coroutine[object, object, None]], tasks: list[asyncio.Task[None]]
) -> None:
    """Start the workers turn by turn, add their tasks to `tasks`, and wait for all of them.

    Raises the first error of any.
    """
    for start in range(0, len(workers), _STARTED_PER_TURN):
        tasks += map(asyncio.create_task, workers[start : start + _STARTED_PER_TURN])
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
