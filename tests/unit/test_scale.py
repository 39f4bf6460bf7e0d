"""Scaling in engines and prompts, and the simulation in virtual time that measures it."""

import asyncio
import errno
import gc
import itertools
import random

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeChat, FakeLearner, FakeRollout, FakeScorer, make_prompts

from actors.rollout import LeastLoaded, RolloutPool
from rayhf.algorithms.base import sample_and_score
from rayhf.errors import StorageError
from rayhf.exploration.build import build_scheduler
from rayhf.monitoring.audit import audit
from rayhf.run_dir import table_writer, tables
from rayhf.types import Batch, GenerateRequest, Sampling
from tests.bench.scale_sim import Case, measure
from tests.bench.simulated import World
from tests.bench.virtual import simulate


def test_virtual_time_passes_only_while_all_coroutines_wait():
    async def work():
        loop = asyncio.get_running_loop()
        timers = []

        async def after(seconds):
            await asyncio.sleep(seconds)
            timers.append((seconds, loop.time()))

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10_000):
                await asyncio.gather(*(after(s) for s in (300, 7, 100_000)))
        return timers

    timers, loop = simulate(work())
    assert timers == [(7, 7), (300, 300)] and loop.time() == 10_000


def test_work_may_count_as_virtual_time():
    spent = itertools.count(0, 5)  # every turn takes five seconds

    async def work():
        loop = asyncio.get_running_loop()
        for _ in range(10):
            await asyncio.sleep(0)
        before = loop.time()
        await asyncio.sleep(100)
        return before, loop.time()

    (before, after), _ = simulate(work(), worked=lambda: next(spent))
    assert before >= 50 and 100 <= after - before <= 110


def test_deadlock_in_virtual_time_is_reported():
    async def work():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(work())


@pytest.mark.parametrize("staleness", [0, 1])
def test_simulated_campaign_with_crashing_engines_is_complete(tmp_path, staleness):
    case = Case(engines=3, prompts=32, iterations=3, max_staleness=staleness)
    world = World(engines=3, slots=4, tokens=4, life_s=150.0, restart_s=20.0, invalid=0.0)
    result = measure(case, tmp_path / "run", world)
    assert (
        result["failures"] > 0
        and result["busy_at_update"] == 0
        and result["staleness"] == staleness
    )
    assert result["over_ideal"] >= 1.0 and 0 < result["busy"] < 1
    assert [
        finding.problem for finding in audit(tmp_path / "run", deep=False) if finding.problem
    ] == []


def test_least_busy_engine_is_chosen():
    rng = random.Random(0)
    load = [0] * 7
    busy = LeastLoaded(7)
    under_way = []
    for _ in range(2000):
        if under_way and rng.random() < 0.5:
            number, work = under_way.pop(rng.randrange(len(under_way)))
            load[number] -= work
            busy.add(number, -work)
        else:
            number = busy.choose()
            work = rng.randrange(1, 5)
            assert number == min(range(7), key=load.__getitem__)
            load[number] += work
            busy.add(number, work)
            under_way.append((number, work))
    assert len(busy._heap) <= 4 * 7


class ControlledEngine:
    """An engine as the pool sees it; the test decides when its calls return."""

    prepare = None

    def __init__(self):
        self.calls = []

    async def persist(self, call, *, phase, timeout_s):
        return await call(self)

    @property
    def generate(self):
        return self

    def remote(self, requests, version):
        self.calls.append((requests, version, asyncio.get_running_loop().create_future()))
        return self.calls[-1][2]

    def answer(self, number):
        requests, _, future = self.calls[number]
        future.set_result([request.prompt_id for request in requests])

    @property
    def sizes(self):
        return [len(requests) for requests, _, _ in self.calls]


class NoBroadcast:
    async def join_engine(self, actor): ...


def _send(pool, numbers, version=0):
    def send(number):
        request = GenerateRequest(
            prompt_id=str(number),
            number=0,
            token_ids=(1,),
            sampling=Sampling(max_tokens=4),
            seeds=(1, 2),
        )
        return asyncio.ensure_future(pool.generate([request], version=version))

    return [send(number) for number in numbers]


async def _turns():
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_are_batched_at_twice_the_engines_capacity():
    async def scenario():
        engines = [ControlledEngine(), ControlledEngine()]
        pool = RolloutPool(engines, NoBroadcast(), max_num_seqs=4, timeout_s=1.0)
        tasks = _send(pool, range(8))
        await _turns()
        # Two sequences each: twice the four slots.
        assert [engine.sizes for engine in engines] == [[1] * 4, [1] * 4]
        tasks += [*_send(pool, range(8, 21)), *_send(pool, [21], version=1)]
        await _turns()
        assert [engine.sizes[4:] for engine in engines] == [[8], [5, 1]]
        assert [version for engine in engines for _, version, _ in engine.calls[4:]] == [0, 0, 1]
        engines[1].answer(0)
        await _turns()
        assert [task.done() for task in tasks].count(
            True
        ) == 1  # no request waits for another one without need
        for engine in engines:
            for number, (_, _, future) in enumerate(engine.calls):
                if not future.done():
                    engine.answer(number)
        assert await asyncio.gather(*tasks) == [[str(n)] for n in range(22)]
        tasks = _send(pool, range(2))
        await _turns()
        # The load counts requests in progress, not finished ones.
        assert [engine.sizes[-1] for engine in engines] == [1, 1]

    asyncio.run(scenario())


def test_batch_fails_and_is_canceled_as_one():
    async def scenario():
        engine = ControlledEngine()
        pool = RolloutPool([engine], NoBroadcast(), max_num_seqs=1, timeout_s=1.0)
        first = _send(pool, range(1))
        await _turns()
        tasks = _send(pool, range(1, 4))
        await _turns()
        assert engine.sizes == [1, 3]
        tasks[0].cancel()
        await _turns()
        assert not engine.calls[1][2].cancelled() and tasks[0].cancelled()
        engine.calls[1][2].set_exception(ValueError("broken"))
        errors = await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert [str(each) for each in errors] == ["broken"] * 2
        tasks = _send(pool, range(4, 6))
        await _turns()
        for each in tasks:
            each.cancel()
        await _turns()
        assert engine.sizes == [1, 3, 2] and engine.calls[2][2].cancelled()
        engine.answer(0)
        assert await first[0] == ["0"] and pool._loads.least() == 0

    asyncio.run(scenario())


class Counting(FakeRollout):
    """Counts how many prompts are explored at the same time."""

    def __init__(self):
        super().__init__(delay=0.002)
        self.most = 0

    async def generate(self, requests, *, version):
        answers = await super().generate(requests, version=version)
        self.most = max(self.most, self.running + 1)
        return answers


@pytest.mark.parametrize("deterministic", [True, False])
def test_number_of_prompts_in_flight_is_limited(deterministic):
    async def run(in_flight):
        rollout = Counting()
        scheduler = build_scheduler(
            {"policy": rollout},
            FakeScorer(),
            chat=FakeChat(),
            versions={"policy": 0},
            deterministic=deterministic,
            in_flight=in_flight,
        )
        groups = await scheduler.run(
            make_prompts(10),
            lambda prompt, context: sample_and_score(prompt, context, 2),
            sampling=Sampling(max_tokens=8),
            seed=1,
            done=lambda group: None,
        )
        return rollout, groups

    free, all_at_once = asyncio.run(run(100))
    limited, groups = asyncio.run(run(3))
    assert groups == all_at_once
    assert [g.prompt.prompt_id for g in groups] == [p.prompt_id for p in make_prompts(10)]
    if deterministic:
        assert [len(call) for call in limited.calls] == [3, 3, 3, 1] and len(free.calls) == 1
    else:
        assert limited.most <= 3 < free.most


def test_tables_written_in_parts_are_the_same(tmp_path, monkeypatch):
    whole = make_config(tmp_path / "whole")
    parts = make_config(tmp_path / "parts")
    run_campaign(whole)
    monkeypatch.setattr(table_writer, "_PIECE", 1)
    monkeypatch.setattr(table_writer, "_ROW_GROUP", 2)
    run_campaign(parts)
    assert metrics_of(whole) == metrics_of(parts)
    for folder in ("samples", "examples", "credit"):
        one, many = (
            config.run.dir / folder / "iteration-000001.parquet" for config in (whole, parts)
        )
        assert pq.read_table(one).equals(pq.read_table(many))
        assert pq.ParquetFile(many).num_row_groups > pq.ParquetFile(one).num_row_groups == 1


def test_rows_are_freed_once_they_are_trained_on(tmp_path):
    """Those of a whole iteration would hold up the event loop."""
    alive = []
    gc.collect()
    others = [each for each in gc.get_objects() if type(each) is Batch]  # of other tests

    class Counting(FakeLearner):
        async def step(self, batch, loss):
            figures = await super().step(batch, loss)
            self.batches.clear()
            batches = sum(type(each) is Batch for each in gc.get_objects())
            alive.append(batches - len(others))
            return figures

    config = make_config(tmp_path, run={"iterations": 1}, learner={"prompts_per_step": 1})
    run_campaign(config, learner=Counting())
    assert alive == [3, 2, 1]  # one of four prompts has a tie


def test_clock_does_not_jump_while_a_thread_is_at_work():
    async def work():
        loop = asyncio.get_running_loop()
        timer = asyncio.create_task(asyncio.sleep(1000))
        assert await asyncio.to_thread(lambda: 7) == 7
        between = loop.time()
        await timer
        return between, loop.time()

    (between, end), _ = simulate(work())
    assert between < 500 and end >= 1000


def test_failed_table_stops_the_campaign_before_the_metrics_line(tmp_path, monkeypatch):
    config = make_config(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables, "example_table", full)
    with pytest.raises(StorageError, match=r"examples/iteration-000001.parquet: No space left"):
        run_campaign(config)
    assert [line["iteration"] for line in metrics_of(config)] == [0]


def test_many_coroutines_start_turn_by_turn_and_an_early_error_ends_all():
    started = []

    async def explore(prompt, context):
        started.append(prompt.prompt_id)
        if len(started) == 10:
            raise ValueError("early")
        await asyncio.get_running_loop().create_future()

    async def work():
        scheduler = build_scheduler(
            {"policy": FakeRollout()},
            FakeScorer(),
            chat=FakeChat(),
            versions={"policy": 0},
            deterministic=False,
        )
        await scheduler.run(
            make_prompts(2000),
            explore,
            sampling=Sampling(max_tokens=4),
            seed=1,
            done=lambda group: None,
        )

    with pytest.raises(ValueError, match="early"):
        asyncio.run(work())
    assert 10 <= len(started) <= 2000
