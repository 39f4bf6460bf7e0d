"""New weights while completions are unfinished: versions of tokens, their limit, lost engines."""

import asyncio
import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fake_actor import FakeActor, FakeMethod, FakeRef, finished, no_process
from fakes import FakeLearner, FakeRollout, make_prompts

from actors.process import ProcessInfo
from actors.rollout import RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from rayhf.errors import ActorLostError, ConfigError, StaleWeightsError
from rayhf.exploration.codecs import GENERATE
from rayhf.exploration.journal import Journal
from rayhf.exploration.token_ages import token_ages
from rayhf.planning.preflight import check_settings
from rayhf.rollout.partials import Growth, KnownPartials, Partial
from rayhf.types import (
    Completion,
    GenerateRequest,
    Group,
    Sample,
    Sampling,
    float_array,
    split_versions,
    token_array,
)

IN_FLIGHT = {"run": {"iterations": 8, "max_staleness": 1}, "rollout": {"in_flight_updates": True}}


class InFlightRollout(FakeRollout):
    """Generates token by token; a token is of the version that is loaded when it is written."""

    paused_s = 0.25

    async def generate(self, requests, *, version):
        if version > self.version:
            raise StaleWeightsError(f"engine holds {self.version}, asked for {version}")
        self.calls.append([(r.prompt_id, r.number) for r in requests])
        self.running += 1
        versions = []
        for _ in range(3):
            await asyncio.sleep(self.delay * random.random())
            versions.append(self.version)
        self.running -= 1
        oldest, mixed = split_versions(token_array(versions))
        whole = [[self._complete(r, i, s) for i, s in enumerate(r.seeds)] for r in requests]
        return [tuple(self._of_versions(c, oldest, mixed) for c in each) for each in whole]

    def _of_versions(self, completion, oldest, mixed):
        return Completion(
            **{name: getattr(completion, name) for name in NAMES},
            policy_version=oldest,
            token_versions=mixed,
        )


NAMES = ("prompt_id", "index", "seed", "text", "token_ids", "logprobs", "finish_reason")


def completion(versions, *, prompt_id="p", index=0, seed=3):
    oldest, mixed = split_versions(token_array(versions))
    return Completion(
        prompt_id=prompt_id,
        index=index,
        seed=seed,
        text="",
        token_ids=token_array(range(len(versions))),
        logprobs=float_array([-0.5] * len(versions)),
        finish_reason="stop",
        policy_version=oldest,
        token_versions=mixed,
    )


def group(*versions):
    (prompt,) = make_prompts(1)
    samples = tuple(Sample(completion=completion(each), outcome=None) for each in versions)
    return Group(prompt=prompt, samples=samples)


# ------------------------------------------------------------------------------------------ types


def test_part_of_a_mixed_completion_has_its_own_versions():
    whole = completion([2, 2, 3, 4, 4])
    assert whole.policy_version == 2 and whole.token_versions.dtype == np.int32
    assert whole.part(1, 3).token_versions.tolist() == [2, 3]
    last = whole.part(3)
    assert last.policy_version == 4 and last.token_versions is None
    assert last.token_ids.tolist() == [3, 4] and len(last.logprobs) == 2
    assert completion([5, 5]).part(0, 1).policy_version == 5


def test_journal_restores_versions_of_tokens(tmp_path):
    request = GenerateRequest(
        prompt_id="p", number=0, token_ids=(1,), sampling=Sampling(max_tokens=9), seeds=(3, 3, 3)
    )
    versions = ([4, 4, 5], [6], [1, 2, 1, 1])
    responses = tuple(completion(each, index=i) for i, each in enumerate(versions))
    journal = Journal(tmp_path / "j")
    journal.add(GENERATE, [request], [responses])
    journal.close()
    assert Journal(tmp_path / "j").recall(GENERATE, request) == responses


def test_ages_of_tokens_and_their_limit():
    groups = [group([3, 3, 4], [4]), group([4, 4, 4, 4])]
    assert token_ages(groups, 4, limit=1) == {
        "staleness/token_max": 1,
        "rollout/completions_mixed": pytest.approx(1 / 3),
        "staleness/tokens/0": 0.75,
        "staleness/tokens/1": 0.25,
    }
    assert token_ages([], 4, limit=1) == {}
    # Of a killed campaign, whose weights 4 are not trained again yet.
    assert token_ages(groups, 3, limit=0)["staleness/tokens/0"] == 1
    with pytest.raises(StaleWeightsError, match=r"weights 3, 2 versions before .* allows 1"):
        token_ages(groups, 5, limit=1)


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("run", "rollout", "expected"),
    [
        ({}, {"in_flight_updates": True}, "in_flight_updates is true, but run.max_staleness is 0"),
        (
            {"max_staleness": 1, "deterministic": True},
            {"in_flight_updates": True},
            "in_flight_updates is true, but run.deterministic is true",
        ),
        (
            {"max_staleness": 1},
            {"in_flight_kv": "keep"},
            "in_flight_kv is keep, but rollout.in_flight_updates is false",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, run, rollout, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(make_config(tmp_path, run=run, rollout=rollout))


def test_plan_names_in_flight_updates(tmp_path):
    config = make_config(tmp_path, **IN_FLIGHT)
    _, derived = check_settings(config)
    assert "between two engine steps" in dict(derived.table(config))["new weights"]


# --------------------------------------------------------------------------------------- campaign


@pytest.mark.parametrize("staleness", [1, 2])
def test_weights_change_during_generation_and_tokens_are_bounded(tmp_path, staleness):
    config = make_config(
        tmp_path,
        run={"iterations": 12, "max_staleness": staleness},
        rollout={"in_flight_updates": True},
    )
    rollout = InFlightRollout(delay=0.01)
    run_campaign(config, rollout=rollout)
    assert rollout.busy_at_update > 0
    lines = metrics_of(config)[1:]
    assert max(line["staleness/token_max"] for line in lines) == staleness
    assert max(line["rollout/completions_mixed"] for line in lines) > 0
    written = (config.run.dir / "metrics.jsonl").read_text().splitlines()[1:]
    assert all(json.loads(line)["time/engine_paused_s"] == 0.25 for line in written)
    rows = rows_of(config, 12)
    versions = [row["token_versions"] for row in rows if row["token_versions"] is not None]
    assert versions and all(
        len(set(each)) > 1 and each == sorted(each) and len(each) == 3 for each in versions
    )
    assert all(
        row["policy_version"] == min(row["token_versions"] or [99, row["policy_version"]])
        for row in rows
    )


def rows_of(config, iterations):
    files = [config.run.dir / f"samples/iteration-{i + 1:06d}.parquet" for i in range(iterations)]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_resume_trains_every_sample_once(tmp_path):
    config = make_config(tmp_path, **IN_FLIGHT)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, rollout=InFlightRollout(delay=0.01), learner=FakeLearner(fail_at=5))
    roles = run_campaign(config, rollout=InFlightRollout(delay=0.01))
    lines = metrics_of(config)
    assert [line["iteration"] for line in lines] == list(range(9))
    assert roles.learners["policy"].steps == lines[-1]["policy/version"] == 8
    rows = rows_of(config, 8)
    assert len({(r["iteration"], r["prompt_id"], r["sample"]) for r in rows}) == len(rows) == 128
    assert sum(line.get("rollout/tokens", 0) for line in lines) == 3 * len(rows)


# ------------------------------------------------------------------------------------ lost engines


def partial(first, count, *, version=0, reason=None):
    return Partial(
        token_ids=token_array(range(first, first + count)),
        logprobs=float_array([-1.0] * count),
        versions=token_array([version] * count),
        finish_reason=reason,
    )


def test_known_parts_are_a_true_beginning():
    known = KnownPartials()
    known.open(1, {})
    kept = known._calls

    def add(start, added, call=1):
        known.add([Growth(call=call, slot=(0, 0), start=start, added=added)])

    add(0, partial(0, 3))
    add(0, partial(0, 3))  # of an engine that was replaced since
    add(5, partial(5, 2))  # the report between was lost
    add(3, partial(3, 1, version=1), call=2)  # ended meanwhile
    assert kept[1][0, 0].token_ids.tolist() == [0, 1, 2]
    add(3, partial(3, 2, version=1, reason="stop"))
    whole = known.close(1)[0, 0]
    assert whole.token_ids.tolist() == [0, 1, 2, 3, 4] and whole.finish_reason == "stop"
    assert whole.versions.tolist() == [0, 0, 0, 1, 1]
    assert len(known) == 0


class Engines:
    """Engines that are created one after the other; the first reports two tokens and hangs."""

    def __init__(self):
        self.created = []
        self.calls = []
        """(engine, version, call, parts) of every call."""

    def create(self):
        number = len(self.created)
        actor = FakeActor()
        actor.process_info = FakeMethod(lambda: finished(ProcessInfo("node", 0, 0.0)))
        reports = iter([[Growth(call=1, slot=(0, 1), start=0, added=partial(7, 2))]])

        def report():
            actor.stuck = number == 0
            return finished(next(reports, []))

        def generate(requests, version, call, parts):
            self.calls.append((number, version, call, parts))
            return finished([("completions",)]) if number else FakeRef()

        actor.report = FakeMethod(report)
        actor.generate = FakeMethod(generate)
        self.created.append(actor)
        return actor

    def supervised(self, name, *, restarts=1, build=None):
        limits = SupervisionLimits(stall_s=0.2, restarts=restarts)
        builds = {} if build is None else {"build": build}
        return SupervisedActor(name, self.create, limits=limits, terminate=no_process, **builds)


class Stored:
    async def join_engine(self, actor): ...


REQUEST = GenerateRequest(
    prompt_id="p", number=0, token_ids=(1,), sampling=Sampling(max_tokens=9), seeds=(1, 2)
)


async def generate(supervised):
    pool = RolloutPool(supervised, Stored(), max_num_seqs=4, timeout_s=30.0, report_s=0.05)
    assert await pool.generate([REQUEST], version=3) == [("completions",)]
    await asyncio.sleep(0)
    return pool


def test_replacement_continues_where_no_other_engine_runs():
    async def run():
        engines = Engines()
        only = engines.supervised("engine")
        await only.start()
        await generate([only])
        first, second = engines.calls
        assert first == (0, 3, 1, {})
        assert second[:3] == (1, 3, 1) and list(second[3]) == [(0, 1)]
        assert second[3][0, 1].token_ids.tolist() == [7, 8]
        assert asyncio.all_tasks() == {asyncio.current_task()}  # no reports without calls

    asyncio.run(run())


def test_another_engine_continues_while_the_lost_one_restarts():
    async def run():
        engines = Engines()
        restart = asyncio.Event()

        async def build(actor):
            if len(engines.created) > 2:
                await restart.wait()

        group = [engines.supervised("first", build=build), engines.supervised("second")]
        for each in group:
            await each.start()
        pool = await generate(group)
        assert [(number, list(parts)) for number, _, _, parts in engines.calls] == [
            (0, []),
            (1, [(0, 1)]),
        ]
        assert group[0].is_restarting
        # So does a new call that would be the first engine's turn.
        assert await pool.generate([REQUEST] * 2, version=3) == [("completions",)] * 2
        assert [number for number, *_ in engines.calls[2:]] == [1, 1]
        restart.set()
        await group[0].restarted()
        await pool.generate([REQUEST] * 2, version=3)
        assert {number for number, *_ in engines.calls[4:]} == {1, 2}

    asyncio.run(run())


def test_engine_that_is_lost_too_often_ends_the_campaign():
    async def run():
        engines = Engines()
        group = [engines.supervised("first", restarts=0), engines.supervised("second")]
        for each in group:
            await each.start()
        with pytest.raises(ActorLostError, match="first was lost 1 times within an hour"):
            await generate(group)

    asyncio.run(run())
