"""The one seam between Ray's world and ours: calls with a deadline, and Ray's errors translated to
ours."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayhf.errors import ActorLostError, DeadlineError, RayhfError

_GRACE_S = 10.0


async def wait(reference: ray.ObjectRef, *, who: str, phase: str, timeout_s: float) -> Any:
    """The result of a remote call. Raises DeadlineError after `timeout_s` seconds, and what
    `answer` raises."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer(asyncio.wrap_future(reference.future()), who=who, phase=phase)
    except TimeoutError:
        raise DeadlineError(f"{phase}: no answer from {who} within {timeout_s:g} s") from None


async def answer(reply: asyncio.Future[Any], *, who: str, phase: str) -> Any:
    """The result of a remote call, its future on this loop, however long it takes.

    Raises ActorLostError where the actor's process died (or whatever else of Ray's went away with a
    process or a node), and whatever rayhf error the actor raised. Any other exception of an actor
    is a bug and comes through as it is.
    """
    try:
        return await reply
    except RayError as error:
        found = translated(error, who=who, phase=phase)
        raise found from found.__cause__


def translated(error: BaseException, *, who: str, phase: str) -> BaseException:
    """What a call that failed with `error` means here; see `answer`."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayhfError):
        return cause
    if not isinstance(cause, RayError):
        return error
    what = (
        "died" if cause is error else "could not get what it needs"
    )  # the latter was lost with its owner
    lost = ActorLostError(f"{phase}: {who} {what} ({_first_line(cause)})")
    lost.__cause__ = error
    return lost


async def wait_all(
    references: Sequence[ray.ObjectRef], *, who: Sequence[str], phase: str, timeout_s: float
) -> list[Any]:
    """Results of calls that belong together (the ranks of a group).

    When one fails, the others usually fail in its wake, or never answer: after `_GRACE_S` more
    seconds nobody waits for them. The error raised is a lost actor or one of our own types rather
    than a broken connection, whichever rank it came from.
    """
    tasks = [
        asyncio.ensure_future(wait(r, who=w, phase=phase, timeout_s=timeout_s))
        for r, w in zip(references, who, strict=True)
    ]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=_GRACE_S)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        raise min(errors, key=_how_telling)
    return list(results)


def _how_telling(error: BaseException) -> int:
    if isinstance(error, ActorLostError):
        return 0
    if isinstance(error, RayhfError) and not isinstance(error, DeadlineError):
        return 1
    return 3 if isinstance(error, asyncio.CancelledError) else 2


def _first_line(error: BaseException) -> str:
    """What Ray says of a death, in one line: the cause is in the last lines, not in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if any(word in line for word in ("exit", "killed", "died", "Error", "unavailable"))
    ]
    return (telling or lines or [type(error).__name__])[0][:300]
