"""Restarts of a supervised actor, with fake actors."""

import asyncio

import pytest
from fake_actor import FakeActor, FakeMethod, finished, no_process

from actors.process import ProcessInfo
from actors.supervise import SupervisedActor, SupervisionLimits
from rayhf.errors import ActorLostError


class Fleet:
    """Actors created one after the other; the first never returns a result."""

    def __init__(self):
        self.created = []
        self.prepared = []

    def create(self):
        actor = FakeActor()
        actor.stuck = not self.created
        actor.process_info = FakeMethod(lambda: finished(ProcessInfo("node", 0, 0.0)))
        self.created.append(actor)
        return actor

    async def prepare(self, actor):
        await asyncio.sleep(0.1)
        self.prepared.append(actor)


def supervised(fleet, *, stall_s, restarts, **settings):
    limits = SupervisionLimits(stall_s=stall_s, restarts=restarts)
    return SupervisedActor("engine", fleet.create, limits=limits, terminate=no_process, **settings)


def persist(one, number, timeout_s=30.0):
    return one.persist(lambda actor: actor.double.remote(number), phase="test", timeout_s=timeout_s)


def test_lost_actor_is_replaced_once_and_used_when_prepared():
    async def run():
        fleet, events = Fleet(), []
        one = supervised(fleet, stall_s=0.2, restarts=1, report=lambda *event: events.append(event))
        one.prepare = fleet.prepare
        await one.start()

        async def later(number, seconds):
            await asyncio.sleep(seconds)
            return await persist(one, number, timeout_s=5.0)

        # Some calls start before the stall is noticed, some while the replacement is prepared.
        results = await asyncio.gather(*(later(n, 0.03 * n) for n in range(20)))
        assert results == [2 * n for n in range(20)]
        assert len(fleet.created) == 2 and fleet.prepared == fleet.created[1:]
        assert [kind for kind, _ in events] == ["fault", "recovered"]

    asyncio.run(run())


def test_replacement_that_dies_unprepared_is_replaced():
    events = []

    async def run(restarts):
        fleet = Fleet()
        one = supervised(
            fleet,
            stall_s=0.1,
            restarts=restarts,
            report=lambda kind, message: events.append(kind),
        )

        async def prepare(actor):
            if len(fleet.created) == 2:
                raise ActorLostError("sync: a new engine died")

        one.prepare = prepare
        await one.start()
        return await persist(one, 4)

    assert asyncio.run(run(2)) == 8 and events == ["fault", "fault", "recovered"]
    with pytest.raises(
        ActorLostError, match=r"lost 2 times .* the last error: sync: a new engine died"
    ):
        asyncio.run(run(1))


@pytest.mark.parametrize("retired", [False, True])
def test_no_restart_after_too_many_losses_or_shutdown(retired):
    async def run():
        fleet = Fleet()
        one = supervised(fleet, stall_s=0.1, restarts=9 if retired else 0)
        await one.start()
        one.retired = retired
        with pytest.raises(
            ActorLostError,
            match=r"engine was lost 1 times .*: engine has work and made no progress",
        ):
            await persist(one, 1)
        assert len(fleet.created) == 1

    asyncio.run(run())


def test_actor_that_cannot_be_built_is_terminated():
    ended = []

    async def terminate(actor, process, *, graceful, stacks):
        ended.append((actor, graceful))

    async def build(actor):
        raise ValueError("no such model")

    async def run():
        fleet = Fleet()
        one = SupervisedActor("engine", fleet.create, build, terminate=terminate)
        with pytest.raises(ValueError, match="no such model"):
            await one.start()
        assert ended == [(fleet.created[0], True)]
        await one.kill()  # nothing is left to terminate
        assert len(ended) == 1

    asyncio.run(run())


def test_stacks_of_a_lost_actor_are_saved(tmp_path):
    files = []

    async def terminate(actor, process, *, graceful, stacks):
        files.append((graceful, stacks))

    async def run():
        fleet = Fleet()
        limits = SupervisionLimits(stall_s=0.1, restarts=1)
        one = SupervisedActor(
            "rollout engine 0", fleet.create, limits=limits, diagnosis=tmp_path, terminate=terminate
        )
        await one.start()
        assert await persist(one, 3) == 6
        await one.kill(stacks=False)
        assert files == [(False, tmp_path / "rollout-engine-0-0.txt"), (True, None)]

    asyncio.run(run())
