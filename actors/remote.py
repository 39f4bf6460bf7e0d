"""Calls to Ray actors with a deadline, and the translation of Ray's errors to rayhf's.

In: object references of remote calls. Out: their results, or an error of rayhf.errors.

Synchronization: `wait` waits for one call, `wait_all` for calls that belong together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import OutOfDiskError, RayError, RayTaskError

from rayhf.errors import (
    ActorError,
    ActorLostError,
    DeadlineError,
    LostObjectError,
    RayhfError,
    StorageError,
    clean_line,
    is_full_disk,
    last_line,
)

_GRACE_S = 10.0
_CAUSE_WORDS = ("exit", "killed", "died", "Error", "unavailable")


async def wait(reference: ray.ObjectRef, *, name: str, phase: str, timeout_s: float) -> Any:
    """Return the result of a remote call.

    Args:
        reference: of the call.
        name: the actor that runs it, for messages.
        phase: what the campaign is doing, for messages.

    Raises DeadlineError after `timeout_s` seconds, and what `result_of` raises.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await result_of(asyncio.wrap_future(reference.future()), name=name, phase=phase)
    except TimeoutError:
        raise late_error(name=name, phase=phase, timeout_s=timeout_s) from None


def late_error(*, name: str, phase: str, timeout_s: float) -> DeadlineError:
    """Return the error of a call that passed its deadline."""
    return DeadlineError(f"{phase}: no response from {name} within {timeout_s:g} s")


async def result_of(reply: asyncio.Future[Any], *, name: str, phase: str) -> Any:
    """Return the result of a remote call, given its future on this loop, however long it takes.

    Raises ActorLostError where the actor's process died, LostObjectError where an argument was lost
    with a process or a node, and any rayhf error that the actor raised; StorageError where a disk
    is full, and ActorError for every other exception of an actor.
    """
    try:
        return await reply
    except RayError as error:
        translated = translate_error(error, name=name, phase=phase)
        raise translated from translated.__cause__


def translate_error(error: BaseException, *, name: str, phase: str) -> BaseException:
    """Return the error that stands for `error` outside of Ray; see `result_of`."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayhfError):
        return cause
    if is_full_disk(cause) or isinstance(cause, OutOfDiskError):
        return _caused(StorageError(f"{phase}: {name}: {last_line(cause)}"), error)
    if not isinstance(cause, RayError):
        return _caused(ActorError(f"{phase}: {name}: {last_line(cause)}"), error)
    if isinstance(error, RayTaskError) and type(cause) is RayError:
        # The actor's error cannot be pickled: Ray only has its traceback.
        text = clean_line((error.traceback_str.strip().splitlines() or [""])[-1])
        return _caused(ActorError(f"{phase}: {name}: {text}"), error)
    # A RayError inside of a task's error: an object that the call needed was lost with its owner.
    if cause is not error:
        lost = f"{phase}: {name} could not fetch an argument of the call ({_cause_line(cause)})"
        return _caused(LostObjectError(lost), error)
    return _caused(ActorLostError(f"{phase}: {name} died ({_cause_line(cause)})"), error)


def _caused(translated: RayhfError, error: BaseException) -> RayhfError:
    translated.__cause__ = error
    return translated


@contextmanager
def errors_translated(*, name: str, phase: str) -> Iterator[None]:
    """Translate what Ray itself raises within the block: no command ends with an error of Ray's."""
    try:
        yield
    except RayError as error:
        raise translate_error(error, name=name, phase=phase) from error


async def wait_all(
    references: Sequence[ray.ObjectRef], *, names: Sequence[str], phase: str, timeout_s: float
) -> list[Any]:
    """Return the results of calls that belong together (the ranks of one learner), in order.

    When one call fails, the others usually fail as a consequence or never return: they get
    `_GRACE_S` more seconds. Of all errors the one raised is the most telling: a lost actor or one
    of rayhf's own types rather than a broken connection, whichever rank it came from.
    """
    tasks = [
        asyncio.ensure_future(wait(reference, name=name, phase=phase, timeout_s=timeout_s))
        for reference, name in zip(references, names, strict=True)
    ]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=_GRACE_S)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=_distance_from_cause)
    return list(results)


def _distance_from_cause(error: BaseException) -> int:
    """Return how far an error is from the cause of a joint failure: 0 is nearest."""
    if isinstance(error, ActorLostError):
        return 0
    if isinstance(error, RayhfError) and not isinstance(error, DeadlineError | ActorError):
        return 1
    return 3 if isinstance(error, asyncio.CancelledError) else 2


def _cause_line(error: BaseException) -> str:
    """Return the one line of Ray's multi-line message that names a cause, else its first line."""
    lines = [line for line in map(clean_line, str(error).splitlines()) if line]
    causes = [line for line in lines if any(word in line for word in _CAUSE_WORDS)]
    return (causes or lines or [type(error).__name__])[0][:300]
