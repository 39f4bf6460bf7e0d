"""The engine's thread, with a driver that counts instead of generating."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from rayhf.errors import RayhfError
from rayhf.rollout.loop import EngineLoop, Result, Wave


class CountingDriver:
    """A driver whose waves take as many steps as their version; steps block until `gate` is set."""

    def __init__(self) -> None:
        self.left: dict[Wave, int] = {}
        self.log: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def admit(self, wave: Wave) -> None:
        if wave.version < 0:
            raise RayhfError("negative")
        self.left[wave] = wave.version
        self.log.append(f"admit {wave.version}")

    def step(self) -> list[tuple[Wave, Result | RayhfError]]:
        self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.log.append("step")
        self.left = {wave: left - 1 for wave, left in self.left.items()}
        done = [wave for wave, left in self.left.items() if left <= 0]
        for wave in done:
            del self.left[wave]
        return [(wave, []) for wave in done]

    def cancel(self) -> None:
        self.left.clear()

    def close(self) -> None:
        self.log.append("close")


def start() -> tuple[EngineLoop[CountingDriver], CountingDriver]:
    driver = CountingDriver()
    return EngineLoop(lambda: driver), driver


def test_waves_share_steps() -> None:
    loop, driver = start()
    driver.gate.clear()
    futures = [loop.submit(Wave([], steps)) for steps in (3, 5, 2)]
    driver.gate.set()
    assert [future.result(10) for future in futures] == [[], [], []]
    assert loop.steps <= 6
    assert loop.progress == loop.steps + 3
    loop.close()


def test_call_waits_for_earlier_waves_and_blocks_later_ones() -> None:
    loop, driver = start()
    driver.gate.clear()
    loop.submit(Wave([], 3))
    called: Future[None] = loop.call(lambda driver: driver.log.append("call"))
    last = loop.submit(Wave([], 1))
    driver.gate.set()
    last.result(10)
    assert called.done()
    assert driver.log == ["admit 3", "step", "step", "step", "call", "admit 1", "step"]
    loop.close()


def test_call_that_is_not_exclusive_runs_between_two_steps() -> None:
    loop, driver = start()
    driver.gate.clear()
    running = loop.submit(Wave([], 3))
    called = loop.call(lambda driver: driver.log.append("call"), exclusive=False)
    driver.gate.set()
    running.result(10)
    assert called.done()
    assert driver.log.index("call") < len(driver.log) - 1
    assert driver.log.count("step") == 3
    loop.close()


def test_refused_wave_affects_no_other() -> None:
    loop, _ = start()
    refused = loop.submit(Wave([], -1))
    fine = loop.submit(Wave([], 1))
    with pytest.raises(RayhfError, match="negative"):
        refused.result(10)
    assert fine.result(10) == []
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda _: 1 // 0).result(10)
    loop.close()


def test_failing_step_fails_everything_and_every_later_caller() -> None:
    loop, driver = start()
    driver.gate.clear()
    running = loop.submit(Wave([], 3))
    waiting = loop.call(lambda _: None)
    driver.failure = ValueError("out of blocks")
    driver.gate.set()
    for future in (running, waiting):
        with pytest.raises(RayhfError, match="failed in a step: ValueError: out of blocks"):
            future.result(10)
    with pytest.raises(RayhfError, match="out of blocks"):
        loop.submit(Wave([], 1))
    loop.close()
    assert driver.log[-1] == "close"


def test_abort_fails_running_and_queued_waves_but_no_calls() -> None:
    loop, driver = start()
    driver.gate.clear()
    running = loop.submit(Wave([], 1000))
    called = loop.call(lambda _: "new weights")
    waiting = loop.submit(Wave([], 1))
    threading.Timer(0.05, driver.gate.set).start()
    assert loop.abort("enough") == 2
    for future in (running, waiting):
        with pytest.raises(RayhfError, match="aborted: enough"):
            future.result(10)
    assert called.result(10) == "new weights"
    assert loop.submit(Wave([], 1)).result(10) == []
    loop.close()


def test_canceled_wave_is_never_sent() -> None:
    loop, driver = start()
    driver.gate.clear()
    loop.submit(Wave([], 1))
    loop.call(lambda _: None)
    cancelled = loop.submit(Wave([], 7))
    assert cancelled.cancel()
    driver.gate.set()
    loop.submit(Wave([], 1)).result(10)
    assert "admit 7" not in driver.log
    loop.close()


def test_close_fails_running_waves_and_can_be_repeated() -> None:
    loop, driver = start()
    running = loop.submit(Wave([], 10**9))
    loop.close()
    with pytest.raises(RayhfError, match="closed"):
        running.result(10)
    with pytest.raises(RayhfError, match="closed"):
        loop.submit(Wave([], 1))
    loop.close()
    assert driver.log[-1] == "close"


def test_error_while_building_reaches_the_constructor() -> None:
    def build() -> CountingDriver:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        EngineLoop(build)
