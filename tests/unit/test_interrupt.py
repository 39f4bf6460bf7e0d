"""Signals at any moment, and output that nothing takes."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
from ray.exceptions import OutOfDiskError, RayActorError

from actors.remote import errors_translated, translate_error
from launch.interrupt import SIGNALS, Interrupt, signals_deferred
from rayhf.errors import ActorError, ActorLostError, InterruptedRunError, StorageError, is_full_disk


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_the_loop_raises(number):
    interrupt = Interrupt()
    with interrupt.on_signals(), pytest.raises(InterruptedRunError):
        signal.raise_signal(number)


def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt().on_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_is_delivered_at_the_end_of_a_deferral():
    steps = []
    with Interrupt().on_signals(), pytest.raises(InterruptedRunError):
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            steps.append("started")
        steps.append("not reached")
    assert steps == ["started"]


def test_second_signal_does_not_interrupt_the_end_of_a_start():
    steps = []
    with Interrupt().on_signals(), pytest.raises(InterruptedRunError):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            steps.append("ended what was started")
    assert steps


def test_start_that_exits_by_rays_handler_is_an_interruption():
    with Interrupt().on_signals(), pytest.raises(InterruptedRunError), signals_deferred():
        raise SystemExit(1)


def test_first_signal_cancels_the_campaign_and_the_second_its_clean_up():
    interrupt = Interrupt()
    steps = []

    async def campaign():
        interrupt.bind(asyncio.get_running_loop(), asyncio.current_task())
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            steps.append("cancelled")
            signal.raise_signal(signal.SIGINT)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                steps.append("clean-up cancelled")
            interrupt.end()
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0.01)
            steps.append("ended")

    with interrupt.on_signals():
        asyncio.run(campaign())
        signal.raise_signal(signal.SIGINT)
    assert steps == ["cancelled", "clean-up cancelled", "ended"]


def test_request_before_the_loop_counts():
    interrupt = Interrupt()
    interrupt.request()

    async def campaign():
        interrupt.bind(asyncio.get_running_loop(), asyncio.current_task())
        await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(campaign())


PRINTS = """
from launch.interrupt import survive_lost_output
survive_lost_output()
for number in range(100_000):
    print(number, flush=True)
import os
os.write(2, b"done")
"""


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_output_that_nothing_takes_is_dropped(output):
    if output == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(writer, "wb") as stdout:
        result = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=stdout, stderr=subprocess.PIPE, timeout=60
        )
    assert (result.returncode, result.stderr) == (0, b"done")


def test_foreign_errors_of_actors_are_one_line():
    line = "\x1b[31mfirst\nlast line"
    error = translate_error(_task_error(ValueError(line)), name="engine 0", phase="sync")
    assert isinstance(error, ActorError)
    assert str(error) == "sync: engine 0: ValueError: last line"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for cause in (full, RuntimeError("I/O error: No space left on device (os error 28)")):
        assert is_full_disk(cause)
        assert isinstance(
            translate_error(_task_error(cause), name="learner", phase="export"), StorageError
        )


def test_rays_own_errors_are_one_line():
    full = translate_error(OutOfDiskError("spilled"), name="the Ray cluster", phase="campaign")
    assert isinstance(full, StorageError)
    cannot_be_pickled = ValueError("bad value")
    cannot_be_pickled.lock = threading.Lock()
    error = translate_error(
        _task_error(cannot_be_pickled, "Traceback ...\n\x1b[36mValueError\x1b[39m: bad value\n"),
        name="engine 0",
        phase="generate",
    )
    assert isinstance(error, ActorError)
    assert str(error) == "generate: engine 0: ValueError: bad value"
    with (
        pytest.raises(ActorLostError, match="campaign: the Ray cluster died"),
        errors_translated(name="the Ray cluster", phase="campaign"),
    ):
        raise RayActorError


def _task_error(cause, traceback="traceback"):
    from ray.exceptions import RayTaskError

    return RayTaskError("method", traceback, cause)
