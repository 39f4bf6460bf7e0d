"""Asking an actor that is watched: every question gets its own answer, and a stall ends them
all."""

import asyncio
import random
from concurrent.futures import Future

import pytest

from actors.supervise import ProcessInfo, SupervisedActor, SupervisionLimits
from rayhf.errors import ActorLostError, DeadlineError


class Ref:
    """What Ray gives for a call: here a future that somebody else fulfils."""

    def __init__(self):
        self.result = Future()

    def future(self):
        return self.result


class Method:
    def __init__(self, call):
        self.remote = call


class Actor:
    """Answers `double` after a moment; `progress` grows unless it is stuck."""

    def __init__(self):
        self.stuck, self.beats = False, 0
        self.double, self.progress = Method(self._double), Method(self._progress)

    def _double(self, number):
        ref = Ref()
        if not self.stuck:
            asyncio.get_running_loop().call_later(
                random.choice([0.0, 0.0, 0.002]), ref.result.set_result, 2 * number
            )
        return ref

    def _progress(self):
        ref = Ref()
        self.beats += not self.stuck
        ref.result.set_result(self.beats)
        return ref


def supervised(actor, *, stall_s=60.0):
    one = SupervisedActor("engine", None, limits=SupervisionLimits(stall_s=stall_s, restarts=1))
    one._actor = actor
    return one


def double(one, number, timeout_s=30.0):
    return one.ask(lambda actor: actor.double.remote(number), phase="test", timeout_s=timeout_s)


def test_questions_one_after_the_other_and_side_by_side_all_get_their_answers():
    async def play():
        one = supervised(Actor())

        async def chain(start):
            return [await double(one, number) for number in range(start, start + 100)]

        found = await asyncio.wait_for(asyncio.gather(*(chain(1000 * i) for i in range(8))), 30)
        assert found == [[2 * (1000 * i + j) for j in range(100)] for i in range(8)]

    asyncio.run(play())


@pytest.mark.parametrize("offset", range(4))
def test_a_question_asked_while_the_last_ones_watch_is_on_its_way_out_is_answered(offset):
    async def play():
        one = supervised(Actor())
        first = asyncio.ensure_future(double(one, 1))
        while not one._asked:
            await asyncio.sleep(0)
        while one._asked:  # until it is answered: it has not yet returned
            await asyncio.sleep(0)
        for _ in range(offset):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert await double(one, 2) == 4
        assert await first == 2

    asyncio.run(play())


def test_every_question_has_its_own_deadline():
    async def play():
        broken = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: broken.append(context)
        )
        actor = Actor()
        actor.stuck, one = True, supervised(actor)
        patient = asyncio.ensure_future(double(one, 1))
        started = asyncio.get_running_loop().time()
        found = await asyncio.gather(
            *(double(one, i, 0.05 + 5e-6 * i) for i in range(2000)), return_exceptions=True
        )
        assert (
            all(isinstance(each, DeadlineError) for each in found)
            and asyncio.get_running_loop().time() - started < 5
        )
        assert not broken and not patient.done()
        patient.cancel()

    asyncio.run(play())


def test_an_asker_who_is_cancelled_as_his_deadline_passes_ends_as_cancelled():
    async def play():
        actor = Actor()
        actor.stuck, one = True, supervised(actor)
        asker = asyncio.ensure_future(double(one, 1, 0.05))
        while not one._given_up:
            await asyncio.sleep(0)
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        assert not one._asked and not one._given_up

    asyncio.run(play())


def test_a_look_from_when_somebody_else_asked_leaves_the_next_question_alone():
    class Dying(Actor):
        """Its progress is told when the test wants it."""

        def __init__(self):
            super().__init__()
            self.looks = []

        def _progress(self):
            self.looks.append(Ref())
            return self.looks[-1]

    async def play():
        actor = Dying()
        one = supervised(actor, stall_s=0.4)
        actor.stuck = True
        first = asyncio.ensure_future(double(one, 1))
        while not actor.looks:
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.ensure_future(double(one, 2))
        await asyncio.sleep(0.01)
        actor.looks[0].result.set_exception(ActorLostError("the one who was asked before"))
        await asyncio.sleep(0.05)
        assert not second.done()
        while len(actor.looks) < 2:
            await asyncio.sleep(0.01)
        actor.looks[1].result.set_exception(ActorLostError("this one"))
        with pytest.raises(ActorLostError, match="this one"):
            await second

    asyncio.run(play())


def test_who_is_asked_in_another_loop_is_watched_there():
    actor = Actor()
    one = supervised(actor, stall_s=0.2)
    assert [asyncio.run(double(one, n)) for n in range(3)] == [0, 2, 4]
    actor.stuck = True
    with pytest.raises(DeadlineError, match="no progress"):
        asyncio.run(double(one, 1))
    with pytest.raises(DeadlineError, match="no answer"):
        asyncio.run(double(one, 1, timeout_s=0.05))


def test_an_actor_that_dies_while_it_is_watched_is_noticed_by_all_who_wait():
    class Dead(Actor):
        def _progress(self):
            raise ActorLostError("the engine is gone")

    async def play():
        actor = Dead()
        actor.stuck, one = True, supervised(actor, stall_s=0.2)
        answers = await asyncio.gather(*(double(one, n) for n in range(5)), return_exceptions=True)
        assert all(isinstance(answer, ActorLostError) for answer in answers)

    asyncio.run(play())


def test_an_actor_that_gets_nowhere_is_noticed_by_all_who_wait():
    async def play():
        actor = Actor()
        one = supervised(actor, stall_s=0.2)
        actor.stuck = True
        answers = await asyncio.gather(*(double(one, n) for n in range(5)), return_exceptions=True)
        assert all(
            isinstance(answer, DeadlineError) and "made no progress for 0.2 s" in str(answer)
            for answer in answers
        )
        actor.stuck = False
        assert await double(one, 4) == 8

    asyncio.run(play())


def test_a_slow_actor_that_gets_on_is_left_alone_until_the_deadline():
    class Slow(Actor):
        def _double(self, number):
            return Ref()

    async def play():
        with pytest.raises(DeadlineError, match=r"test: no answer from engine within 0\.6 s"):
            await double(supervised(Slow(), stall_s=0.1), 1, timeout_s=0.6)

    asyncio.run(play())


class Fleet:
    """Actors one after the other; `double` of the first is never answered, each is built before it
    is asked."""

    def __init__(self):
        self.hired, self.ready = [], []

    def create(self):
        actor = Actor()
        actor.stuck = not self.hired
        actor.process_info = Method(lambda: self._done(ProcessInfo("nowhere", 0, 0.0)))
        self.hired.append(actor)
        return actor

    @staticmethod
    def _done(value):
        ref = Ref()
        ref.result.set_result(value)
        return ref

    async def prepare(self, actor):
        await asyncio.sleep(0.1)
        self.ready.append(actor)


def test_a_lost_actor_is_replaced_once_whoever_asks_meanwhile_and_not_before_it_is_ready(
    monkeypatch,
):
    async def nowhere(node, function, *arguments):
        return None

    monkeypatch.setattr("actors.supervise.on_node", nowhere)
    monkeypatch.setattr("actors.supervise.ray.kill", lambda actor, no_restart: None)

    async def play():
        fleet, heard = Fleet(), []
        one = SupervisedActor(
            "engine",
            fleet.create,
            limits=SupervisionLimits(stall_s=0.2, restarts=1),
            report=lambda *said: heard.append(said),
        )
        one.prepare = fleet.prepare
        await one.start()

        async def persist(number, after):
            await asyncio.sleep(after)
            return await one.persist(
                lambda actor: actor.double.remote(number), phase="test", timeout_s=5.0
            )

        # Some ask before it is found wanting, some while the new one is being made ready: those
        # wait for their deadline here, where with Ray they would hear of the death.
        answers = await asyncio.gather(*(persist(n, 0.03 * n) for n in range(20)))
        assert answers == [2 * n for n in range(20)]
        assert len(fleet.hired) == 2 and fleet.ready == fleet.hired[1:]
        assert [kind for kind, _ in heard] == ["fault", "recovered"]

    asyncio.run(play())


def test_a_new_actor_that_dies_before_it_is_ready_is_replaced_too(monkeypatch):
    async def nowhere(node, function, *arguments):
        return None

    monkeypatch.setattr("actors.supervise.on_node", nowhere)
    monkeypatch.setattr("actors.supervise.ray.kill", lambda actor, no_restart: None)

    heard = []

    async def play(restarts):
        fleet = Fleet()
        limits = SupervisionLimits(stall_s=0.1, restarts=restarts)
        one = SupervisedActor(
            "engine", fleet.create, limits=limits, report=lambda kind, message: heard.append(kind)
        )

        async def prepare(actor):
            if len(fleet.hired) == 2:
                raise ActorLostError("sync: a new engine died")

        one.prepare = prepare
        await one.start()
        return await one.persist(lambda actor: actor.double.remote(4), phase="test", timeout_s=30.0)

    assert asyncio.run(play(2)) == 8 and heard == ["fault", "fault", "recovered"]
    with pytest.raises(
        ActorLostError, match=r"lost 2 times .* the last time: sync: a new engine died"
    ):
        asyncio.run(play(1))


@pytest.mark.parametrize("retired", [False, True])
def test_who_is_lost_too_often_or_not_needed_any_more_is_not_replaced(monkeypatch, retired):
    monkeypatch.setattr("actors.supervise.ray.kill", lambda actor, no_restart: None)

    async def play():
        fleet = Fleet()
        one = SupervisedActor(
            "engine",
            fleet.create,
            limits=SupervisionLimits(stall_s=0.1, restarts=9 if retired else 0),
        )
        await one.start()
        one.retired = retired
        with pytest.raises(
            ActorLostError,
            match=r"engine was lost 1 times .*: engine has work and made no progress",
        ):
            await one.persist(lambda actor: actor.double.remote(1), phase="test", timeout_s=30.0)
        assert len(fleet.hired) == 1

    asyncio.run(play())
