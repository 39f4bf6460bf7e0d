"""Time-sharing of GPUs: the order of sleep and wake, and changes of owner that fail."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.colocate import GpuTimeSharing, SharedLearner, SharedRollout
from rayhf.errors import WeightSyncError


@dataclass
class Role:
    """Engines or learners that log their calls; `fail` names calls that raise once."""

    name: str
    log: list
    fail: set = field(default_factory=set)
    gate: asyncio.Event | None = None

    def _log(self, call):
        self.log.append(f"{self.name} {call}")
        if call in self.fail:
            self.fail.discard(call)
            raise WeightSyncError(f"{self.name} could not {call}")

    async def sleep(self):
        self._log("sleep")

    async def wake(self):
        self._log("wake")

    async def generate(self, requests, *, version):
        self._log("generate")
        if self.gate is not None:
            await self.gate.wait()
        self.log.append(f"{self.name} generated")
        return [()]

    async def update(self, snapshot):
        self._log(f"update {snapshot}")

    async def step(self, batch, loss):
        self._log("step")
        return {}

    async def publish(self, version, *, stored=False):
        self._log("publish for the store" if stored else "publish")
        return version

    async def save(self, directory):
        self._log("save")


def shared(*, engines=("engine",), learners=("learner",)):
    log = []
    pools = [Role(name, log) for name in engines]
    clients = [Role(name, log) for name in learners]
    gpus = GpuTimeSharing(pools, clients)
    rollouts = [SharedRollout(pool, gpus) for pool in pools]
    return log, pools, clients, rollouts, [SharedLearner(client, gpus) for client in clients]


def test_iteration_changes_owner_twice_and_updates_first():
    log, _, _, (rollout,), (learner, critic) = shared(learners=("learner", "critic"))

    async def run():
        await rollout.generate([], version=0)
        await rollout.generate([], version=0)
        await asyncio.gather(learner.step(None, None), critic.step(None, None))
        await rollout.update(await learner.publish(1))
        await rollout.generate([], version=1)
        await learner.save(Path())

    asyncio.run(run())
    assert log == [
        *("learner sleep", "critic sleep", "engine wake"),
        *("engine generate", "engine generated", "engine generate", "engine generated"),
        *("engine sleep", "learner wake", "critic wake"),
        *("learner step", "critic step", "learner publish"),
        *("learner sleep", "critic sleep", "engine update 1"),  # the update wakes it
        *("engine generate", "engine generated"),
        *("engine sleep", "learner wake", "critic wake", "learner save"),
    ]


def test_publish_for_a_reference_that_moves_is_stored():
    log, _, _, _, (learner,) = shared()
    asyncio.run(learner.publish(1, stored=True))
    assert log == ["learner publish for the store"]


def test_change_of_owner_waits_for_running_calls():
    log, (pool,), _, (rollout,), (learner,) = shared()

    async def run():
        pool.gate = asyncio.Event()
        generating = asyncio.create_task(rollout.generate([], version=0))
        await asyncio.sleep(0)
        training = asyncio.create_task(learner.step(None, None))
        for _ in range(5):
            await asyncio.sleep(0)
        assert "engine sleep" not in log and "engine generate" in log
        pool.gate.set()
        await asyncio.gather(generating, training)

    asyncio.run(run())
    assert log[-4:] == ["engine generated", "engine sleep", "learner wake", "learner step"]


def test_each_of_two_engines_wakes_at_its_first_call():
    log, _, _, (one, two), (learner, _) = shared(
        engines=("one", "two"), learners=("learner", "other")
    )

    async def run():
        await learner.step(None, None)
        await one.update(7)
        await asyncio.gather(
            one.generate([], version=7), two.generate([], version=0), two.generate([], version=0)
        )
        await learner.step(None, None)

    asyncio.run(run())
    assert [line for line in log if "generated" not in line] == [
        *("learner step", "learner sleep", "other sleep", "one update 7"),
        *("one generate", "two wake", "two generate", "two generate"),
        *("one sleep", "two sleep", "learner wake", "other wake", "learner step"),
    ]


@pytest.mark.parametrize("failing", ["learner sleep", "engine wake"])
def test_failed_change_to_engines_is_repeated(failing):
    log, (pool,), (client,), (rollout,), _ = shared()
    name, call = failing.split()
    {"learner": client, "engine": pool}[name].fail.add(call)

    async def run():
        with pytest.raises(WeightSyncError, match=f"{name} could not {call}"):
            await rollout.generate([], version=0)
        assert "engine generate" not in log
        log.clear()
        await rollout.generate([], version=0)

    asyncio.run(run())
    again = ["learner sleep"] if name == "learner" else []
    assert log == [*again, "engine wake", "engine generate", "engine generated"]


@pytest.mark.parametrize("failing", ["engine sleep", "learner wake"])
def test_failed_change_to_learners_leaves_engines_asleep(failing):
    log, (pool,), (client,), (rollout,), (learner,) = shared()
    name, call = failing.split()

    async def run():
        await rollout.generate([], version=0)
        {"learner": client, "engine": pool}[name].fail.add(call)
        with pytest.raises(WeightSyncError):
            await learner.step(None, None)
        assert "learner step" not in log
        log.clear()
        await rollout.generate([], version=0)
        await learner.step(None, None)

    asyncio.run(run())
    assert log == [
        *("learner sleep", "engine wake", "engine generate", "engine generated"),
        *("engine sleep", "learner wake", "learner step"),
    ]


def test_failed_and_canceled_calls_release_the_gpus():
    log, (pool,), (client,), (rollout,), (learner,) = shared()

    async def run():
        client.fail.add("step")
        with pytest.raises(WeightSyncError):
            await learner.step(None, None)
        pool.gate = asyncio.Event()
        generating = asyncio.create_task(rollout.generate([], version=0))
        while "engine generate" not in log:
            await asyncio.sleep(0)
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)
        await learner.step(None, None)

    asyncio.run(asyncio.wait_for(run(), 5))
    assert log[-1] == "learner step"
