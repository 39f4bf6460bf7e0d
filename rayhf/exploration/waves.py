"""The deterministic scheduler: requests are sent in waves.

All coroutines run until each waits; then all their requests are sent at once, ordered by prompt id
and request number, and the next wave starts when this one is answered. An engine's batches, and
with them its floating-point results, then depend on nothing but the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar

from rayhf.exploration.codecs import RequestT, ResponseT
from rayhf.exploration.event_loop import ExplorationLoop
from rayhf.exploration.scheduler import Pending, RequestQueue, RequestScheduler, run_beside
from rayhf.types import ScoreRequest


class WaveScheduler(RequestScheduler):
    """Sends the requests of all coroutines once none of them can run any more."""

    writes_through: ClassVar[bool] = True
    """A repeated iteration must make the same calls: the journal has a call's responses or none."""

    async def _run(self, workers: Sequence[Coroutine[object, object, None]]) -> None:
        loop = ExplorationLoop(workers)  # type: ignore[abstract]  # it has no timers and sockets
        try:
            await run_beside(loop.ended, self._send_waves(loop))
        finally:
            await loop.shutdown()

    async def _send_waves(self, loop: ExplorationLoop) -> None:
        while True:
            await loop.wait_until_idle()
            queues: list[RequestQueue[Any, Any]] = [
                *self._generate.values(),
                self._score,
                self._compare,
                self._step,
            ]
            if not any(queue.pending for queue in queues):
                if asyncio.all_tasks(loop):
                    raise RuntimeError(
                        "an `explore` coroutine waits for something other than its "
                        "ExplorationContext, and would do so forever"
                    )
                return
            await asyncio.gather(*(self._send_all(queue) for queue in queues if queue.pending))

    async def _send_all(self, queue: RequestQueue[RequestT, ResponseT]) -> None:
        await self._send(queue, sorted(queue.take(), key=_order))

    async def _request(
        self, queue: RequestQueue[RequestT, ResponseT], request: RequestT
    ) -> ResponseT:
        return await queue.put(request)


def _order(pending: Pending[RequestT, ResponseT]) -> tuple[str, int]:
    """Return the place of a request in its call, which arrival must not decide."""
    request = pending.request
    prompt = request.prompt if isinstance(request, ScoreRequest) else request
    return prompt.prompt_id, request.number
