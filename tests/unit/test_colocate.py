"""GpuTimeSharing on shared GPUs: in which order everybody sleeps and wakes, and that an error leaves no
half-made turn behind."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.colocate import GpuTimeSharing, SharedLearner, SharedRollout
from rayhf.errors import WeightSyncError


@dataclass
class Role:
    """Engines or learners that write down what they do; `fail` makes the next call of that name
    raise."""

    name: str
    log: list
    fail: set = field(default_factory=set)
    gate: asyncio.Event | None = None

    def _do(self, what):
        self.log.append(f"{self.name} {what}")
        if what in self.fail:
            self.fail.discard(what)
            raise WeightSyncError(f"{self.name} could not {what}")

    async def sleep(self):
        self._do("sleep")

    async def wake(self):
        self._do("wake")

    async def generate(self, requests, *, version):
        self._do("generate")
        if self.gate is not None:
            await self.gate.wait()
        self.log.append(f"{self.name} wrote")
        return [()]

    async def update(self, snapshot):
        self._do(f"update {snapshot}")

    async def step(self, batch, loss):
        self._do("step")
        return {}

    async def publish(self, version, *, stored=False):
        self._do("publish for the store" if stored else "publish")
        return version

    async def save(self, directory):
        self._do("save")


def shared(*, engines=("engine",), learners=("learner",)):
    log = []
    pools, groups = [Role(name, log) for name in engines], [Role(name, log) for name in learners]
    turns = GpuTimeSharing(pools, groups)
    return (
        log,
        pools,
        groups,
        [SharedRollout(p, turns) for p in pools],
        [SharedLearner(g, turns) for g in groups],
    )


def test_a_round_changes_turns_twice_and_loads_new_weights_before_the_cache_of_the_next():
    log, _, _, (rollout,), (learner, critic) = shared(learners=("learner", "critic"))

    async def play():
        await rollout.generate([], version=0)
        await rollout.generate([], version=0)
        await asyncio.gather(learner.step(None, None), critic.step(None, None))
        await rollout.update(await learner.publish(1))
        await rollout.generate([], version=1)
        await learner.save(Path())

    asyncio.run(play())
    assert log == [
        *("learner sleep", "critic sleep", "engine wake"),
        *("engine generate", "engine wrote", "engine generate", "engine wrote"),
        *("engine sleep", "learner wake", "critic wake"),
        *("learner step", "critic step", "learner publish"),
        *("learner sleep", "critic sleep", "engine update 1"),  # the update is what wakes it
        *("engine generate", "engine wrote"),
        *("engine sleep", "learner wake", "critic wake", "learner save"),
    ]


def test_a_reference_that_moves_finds_the_weights_in_the_store():
    log, _, _, _, (learner,) = shared()
    asyncio.run(learner.publish(1, stored=True))
    assert log == ["learner publish for the store"]


def test_nobody_is_put_to_sleep_at_work():
    log, (pool,), _, (rollout,), (learner,) = shared()

    async def play():
        pool.gate = asyncio.Event()
        writing = asyncio.create_task(rollout.generate([], version=0))
        await asyncio.sleep(0)
        learning = asyncio.create_task(learner.step(None, None))
        for _ in range(5):
            await asyncio.sleep(0)
        assert "engine sleep" not in log and "engine generate" in log
        pool.gate.set()
        await asyncio.gather(writing, learning)

    asyncio.run(play())
    assert log[-4:] == ["engine wrote", "engine sleep", "learner wake", "learner step"]


def test_with_two_policies_each_engine_wakes_when_it_is_asked():
    log, _, _, (one, two), (learner, _) = shared(
        engines=("one", "two"), learners=("learner", "other")
    )

    async def play():
        await learner.step(None, None)
        await one.update(7)
        await asyncio.gather(
            one.generate([], version=7), two.generate([], version=0), two.generate([], version=0)
        )
        await learner.step(None, None)

    asyncio.run(play())
    assert [line for line in log if "wrote" not in line] == [
        *("learner step", "learner sleep", "other sleep", "one update 7"),
        *("one generate", "two wake", "two generate", "two generate"),
        *("one sleep", "two sleep", "learner wake", "other wake", "learner step"),
    ]


@pytest.mark.parametrize("where", ["learner sleep", "engine wake"])
def test_an_engine_s_turn_that_fails_is_made_again(where):
    log, (pool,), (group,), (rollout,), _ = shared()
    who, what = where.split()
    {"learner": group, "engine": pool}[who].fail.add(what)

    async def play():
        with pytest.raises(WeightSyncError, match=f"{who} could not {what}"):
            await rollout.generate([], version=0)
        assert "engine generate" not in log
        log.clear()
        await rollout.generate([], version=0)

    asyncio.run(play())
    again = ["learner sleep"] if who == "learner" else []
    assert log == [*again, "engine wake", "engine generate", "engine wrote"]


@pytest.mark.parametrize("where", ["engine sleep", "learner wake"])
def test_a_learner_s_turn_that_fails_does_not_let_the_other_side_think_it_is_awake(where):
    log, (pool,), (group,), (rollout,), (learner,) = shared()
    who, what = where.split()

    async def play():
        await rollout.generate([], version=0)
        {"learner": group, "engine": pool}[who].fail.add(what)
        with pytest.raises(WeightSyncError):
            await learner.step(None, None)
        assert "learner step" not in log
        log.clear()
        await rollout.generate([], version=0)
        await learner.step(None, None)

    asyncio.run(play())
    assert log == [
        *("learner sleep", "engine wake", "engine generate", "engine wrote"),
        *("engine sleep", "learner wake", "learner step"),
    ]


def test_work_that_fails_or_is_cancelled_gives_its_turn_up():
    log, (pool,), (group,), (rollout,), (learner,) = shared()

    async def play():
        group.fail.add("step")
        with pytest.raises(WeightSyncError):
            await learner.step(None, None)
        pool.gate = asyncio.Event()
        writing = asyncio.create_task(rollout.generate([], version=0))
        while "engine generate" not in log:
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await learner.step(None, None)

    asyncio.run(asyncio.wait_for(play(), 5))
    assert log[-1] == "learner step"
