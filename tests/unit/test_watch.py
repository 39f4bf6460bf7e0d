"""Calls to a watched actor: every call gets its own result, and a stall fails them all."""

import asyncio
import gc
import weakref
from concurrent.futures import Future

import pytest
from fake_actor import FakeActor, FakeMethod, FakeRef

from actors.watch import WatchedActor
from rayhf.errors import ActorLostError, DeadlineError


def watched(actor, *, stall_s=60.0):
    return WatchedActor("engine", actor, stall_s=stall_s)


async def double(one, number, timeout_s=30.0):
    return await one.call(
        lambda actor: actor.double.remote(number), phase="test", timeout_s=timeout_s
    )


def stuck_actor():
    actor = FakeActor()
    actor.stuck = True
    return actor


def test_calls_in_sequence_and_in_parallel_all_get_their_results():
    async def run():
        one = watched(FakeActor())

        async def chain(start):
            return [await double(one, number) for number in range(start, start + 100)]

        results = await asyncio.wait_for(asyncio.gather(*(chain(1000 * i) for i in range(8))), 30)
        assert results == [[2 * (1000 * i + j) for j in range(100)] for i in range(8)]

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(4))
def test_call_right_after_the_last_one_returned(turns):
    async def run():
        one = watched(FakeActor())
        first = asyncio.ensure_future(double(one, 1))
        while not first.done():
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert await double(one, 2) == 4
        assert await first == 2

    asyncio.run(run())


def test_every_call_has_its_own_deadline():
    async def run():
        broken = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: broken.append(context))
        one = watched(stuck_actor())
        long_call = asyncio.ensure_future(double(one, 1))
        started = loop.time()
        results = await asyncio.gather(
            *(double(one, i, 0.05 + 5e-6 * i) for i in range(2000)), return_exceptions=True
        )
        assert all(isinstance(result, DeadlineError) for result in results)
        assert loop.time() - started < 5
        assert not broken and not long_call.done()
        long_call.cancel()

    asyncio.run(run())


def test_task_canceled_as_its_deadline_passes_ends_as_canceled():
    class CancelingRef(FakeRef):
        """Cancels the waiting task between its deadline and its next step."""

        def __init__(self):
            super().__init__()
            self.result = CancelingFuture()

    class CancelingFuture(Future):
        def cancel(self):
            tasks[0].cancel()
            return super().cancel()

    tasks = []

    async def run():
        actor = stuck_actor()
        actor.double = FakeMethod(lambda number: CancelingRef())
        tasks.append(asyncio.ensure_future(double(watched(actor), 1, 0.05)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(run())


def test_nothing_is_kept_of_a_call_that_returned():
    class Result:
        pass

    async def run():
        refs = []
        actor = FakeActor()
        actor.double = FakeMethod(lambda number: refs.append(FakeRef()) or refs[-1])
        one = watched(actor)
        call = asyncio.ensure_future(double(one, 1))
        await asyncio.sleep(0)
        result = Result()
        refs.pop().result.set_result(result)
        kept = weakref.ref(result)
        await call
        del call, result
        await asyncio.sleep(0)  # the loop lets go of the task that woke this one
        gc.collect()
        assert kept() is None

    asyncio.run(run())


def test_poll_of_an_earlier_call_does_not_fail_the_next_one():
    class Dying(FakeActor):
        """Its progress arrives when the test says so."""

        def __init__(self):
            super().__init__()
            self.sent = []

        def _progress(self):
            self.sent.append(FakeRef())
            return self.sent[-1]

    async def run():
        actor = Dying()
        actor.stuck = True
        one = watched(actor, stall_s=0.4)
        first = asyncio.ensure_future(double(one, 1))
        while not actor.sent:
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.ensure_future(double(one, 2))
        await asyncio.sleep(0.01)
        actor.sent[0].result.set_exception(ActorLostError("the poll of the first call"))
        await asyncio.sleep(0.05)
        assert not second.done()
        while len(actor.sent) < 2:
            await asyncio.sleep(0.01)
        actor.sent[1].result.set_exception(ActorLostError("the poll of the second call"))
        with pytest.raises(ActorLostError, match="the poll of the second call"):
            await second

    asyncio.run(run())


def test_each_event_loop_watches_its_own_calls():
    actor = FakeActor()
    one = watched(actor, stall_s=0.2)
    assert [asyncio.run(double(one, n)) for n in range(3)] == [0, 2, 4]
    actor.stuck = True
    with pytest.raises(DeadlineError, match="no progress"):
        asyncio.run(double(one, 1))
    with pytest.raises(DeadlineError, match="no response"):
        asyncio.run(double(one, 1, timeout_s=0.05))


def test_death_fails_all_pending_calls():
    class Dead(FakeActor):
        def _progress(self):
            raise ActorLostError("the engine died")

    async def run():
        actor = Dead()
        actor.stuck = True
        one = watched(actor, stall_s=0.2)
        results = await asyncio.gather(*(double(one, n) for n in range(5)), return_exceptions=True)
        assert all(isinstance(result, ActorLostError) for result in results)

    asyncio.run(run())


def test_stall_fails_all_pending_calls():
    async def run():
        actor = stuck_actor()
        one = watched(actor, stall_s=0.2)
        results = await asyncio.gather(*(double(one, n) for n in range(5)), return_exceptions=True)
        assert all(
            isinstance(result, DeadlineError) and "made no progress for 0.2 s" in str(result)
            for result in results
        )
        actor.stuck = False
        assert await double(one, 4) == 8

    asyncio.run(run())


def test_slow_actor_with_progress_only_fails_at_the_deadline():
    class Slow(FakeActor):
        def _double(self, number):
            return FakeRef()

    async def run():
        with pytest.raises(DeadlineError, match=r"test: no response from engine within 0\.6 s"):
            await double(watched(Slow(), stall_s=0.1), 1, timeout_s=0.6)

    asyncio.run(run())
