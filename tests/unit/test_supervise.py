"""Restarts of a supervised actor, with fake actors."""

import asyncio

import pytest
from fake_actor import FakeActor, FakeMethod, FakeRef, finished, no_process
from ray.exceptions import OwnerDiedError, RayTaskError

import actors.supervise
from actors.process import ProcessInfo
from actors.supervise import RestartingError, SupervisedActor, SupervisionLimits
from launch.assemble import start_in_turn
from rayhf.errors import ActorLostError, GpuMemoryError, StateLostError


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


def test_no_restart_brings_back_what_an_actor_needs():
    """A replacement whose weights are gone, and a call whose argument is: both end at once."""

    async def run(prepare, call):
        fleet = Fleet()
        one = supervised(fleet, stall_s=0.1, restarts=9)
        one.prepare = prepare
        await one.start()
        calls = [one.persist(call, phase="sync", timeout_s=5.0) for _ in range(3)]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, StateLostError) and "owner has exited" in str(error)
        return len(fleet.created)

    async def lost(actor):
        raise StateLostError("sync: its owner has exited")

    async def fine(actor):
        return None

    def fetches():
        ref = FakeRef()
        owner_died = OwnerDiedError("0a", None, "")
        ref.result.set_exception(RayTaskError("update", "traceback", owner_died))
        return ref

    assert asyncio.run(run(lost, lambda actor: actor.double.remote(1))) == 2
    assert asyncio.run(run(fine, lambda actor: fetches())) == 1


def test_attempt_after_a_restart_without_state_ends_in_its_error():
    async def run():
        fleet = Fleet()
        one = supervised(fleet, stall_s=0.1, restarts=9)

        async def lost(actor):
            raise StateLostError("sync: its owner has exited")

        one.prepare = lost
        await one.start()

        def attempt():
            return one.attempt(lambda actor: actor.double.remote(1), phase="test", timeout_s=5.0)

        with pytest.raises(RestartingError):
            await attempt()
        await one.restarted()
        with pytest.raises(StateLostError, match="owner has exited"):
            await attempt()
        assert len(fleet.created) == 2

    asyncio.run(run())


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


@pytest.mark.parametrize(("short", "restarts"), [(2, 2), (3, 2)])
def test_engine_without_gpu_memory_is_started_again(monkeypatch, short, restarts):
    """Other processes give memory back; after run.restarts attempts the error is raised."""
    monkeypatch.setattr(actors.supervise, "_MEMORY_WAIT_S", 0.0)
    events = []
    fleet = Fleet()

    async def build(actor):
        if len(fleet.created) <= short:
            raise GpuMemoryError("vLLM does not start: Free memory on device 1.0/80.0 GiB")

    one = supervised(
        fleet,
        stall_s=30.0,
        restarts=restarts,
        build=build,
        report=lambda kind, message: events.append(kind),
    )
    if short <= restarts:
        asyncio.run(one.start())
        assert one.stage == "ready" and len(fleet.created) == short + 1
    else:
        with pytest.raises(ActorLostError, match=r"lost 3 times .* Free memory on device"):
            asyncio.run(one.start())
    assert events == ["fault"] * min(short, restarts)


def test_engines_of_two_policies_on_the_same_gpus_start_in_turn():
    log = []

    class Noted:
        def __init__(self, name):
            self.name = name

        async def start(self):
            log.append(f"start {self.name}")
            await asyncio.sleep(0)
            log.append(f"ready {self.name}")

        async def sleep(self):
            log.append(f"sleep {self.name}")

    first = [Noted("actor 0"), Noted("actor 1")]
    second = [Noted("refiner 0")]
    asyncio.run(start_in_turn([(first, Noted("actor")), (second, Noted("refiner"))]))
    assert log[:2] == ["start actor 0", "start actor 1"], "one policy's engines start together"
    assert log[-4:] == ["sleep actor", "start refiner 0", "ready refiner 0", "sleep refiner"]
