"""Signals and lost output: how a command ends cleanly, or goes on without anybody to print to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TextIO

from rayhf.errors import InterruptedRunError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_STARTING = "interrupted while starting; the same command continues"
_CANCELLATIONS = 2
"""The first request cancels the campaign, the second its clean-up; others change nothing."""


class Interrupt:
    """Interruption of a campaign, by signals or from another thread.

    Before its loop runs, a signal raises InterruptedRunError in the main thread. While it runs, a
    request cancels its task. After that, requests are ignored: it is already ending.
    """

    def __init__(self) -> None:
        self._cancel: Callable[[], object] | None = None
        self._requests = 0
        self._ended = False

    def bind(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        """Set what to cancel; called by the campaign once its loop runs."""
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        if self._requests:
            self._cancel()

    def end(self) -> None:
        """Ignore requests from now on; called by the campaign when its loop is about to end."""
        self._ended = True

    def request(self) -> None:
        """Cancel the campaign; one that does not run yet is cancelled when it does."""
        self._requests += 1
        if self._cancel is not None and not self._ended and self._requests <= _CANCELLATIONS:
            self._cancel()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGTERM, SIGINT, SIGHUP and SIGQUIT request it; an ignored SIGHUP (nohup) stays so.

        Does nothing outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with _handled(self._handle):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request()
        if self._cancel is None and not self._ended and not _is_ending():
            raise InterruptedRunError(_STARTING)


def _is_ending() -> bool:
    """Return whether an interruption is being handled: another one would cut its clean-up short."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, InterruptedRunError):
            return True
        error = error.__context__
    return False


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Deliver signals that arrive within the block at its end.

    For starting processes: an exception halfway would leave them behind. Ray's own handler of
    SIGTERM, set by `ray.init`, ends what it has started and raises SystemExit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    try:
        with _handled(lambda number, frame: arrived.append(number)):
            yield
    except SystemExit:
        raise InterruptedRunError(_STARTING) from None
    for number in arrived[:1]:
        signal.raise_signal(number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def survive_lost_output() -> None:
    """Drop what this process prints where nothing takes it.

    A closed terminal, a closed pipe or a full disk behind standard output must not end a campaign.
    """
    sys.stdout = _Droppable(sys.stdout)
    sys.stderr = _Droppable(sys.stderr)


class _Droppable:
    """A standard stream that goes to /dev/null after the first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
