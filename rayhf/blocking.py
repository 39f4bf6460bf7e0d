"""Long work beside the controller's event loop, which serves every other role."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

_RELEASED = 4096
"""Objects released in one turn of the event loop."""
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


async def in_thread(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Return the result of `function`, called in a thread.

    A cancelled caller waits until the thread has ended too: a commit is finished before the run
    directory is closed.
    """
    work = asyncio.create_task(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        raise


async def release(items: list[Any]) -> None:
    """Empty a list in several turns: freeing an iteration's groups takes half a second."""
    while items:
        del items[-_RELEASED:]
        await asyncio.sleep(0)
