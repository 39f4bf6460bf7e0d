"""New weights while completions are unfinished: versions of tokens, their limit, lost engines."""

import asyncio
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
from rayhf.errors import ConfigError, StaleWeightsError
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
    assert all(line["sync/engine_paused_s"] == 0.25 for line in lines)
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
    known.open(1)

    def add(start, added, call=1):
        known.add([Growth(call=call, slot=(0, 0), start=start, added=added)])

    add(0, partial(0, 3))
    add(0, partial(0, 3))  # of an engine that was replaced since
    add(5, partial(5, 2))  # the report between was lost
    add(3, partial(3, 1, version=1), call=2)  # ended meanwhile
    assert known.of(1)[0, 0].token_ids.tolist() == [0, 1, 2]
    add(3, partial(3, 2, version=1, reason="stop"))
    whole = known.of(1)[0, 0]
    assert whole.token_ids.tolist() == [0, 1, 2, 3, 4] and whole.finish_reason == "stop"
    assert whole.versions.tolist() == [0, 0, 0, 1, 1]
    known.close(1)
    assert len(known) == 0


class Engines:
    """Engines created one after the other; the first reports two tokens and hangs."""

    def __init__(self):
        self.created = []
        self.calls = []

    def create(self):
        actor = FakeActor()
        lost = not self.created
        actor.process_info = FakeMethod(lambda: finished(ProcessInfo("node", 0, 0.0)))
        reports = iter([[Growth(call=1, slot=(0, 1), start=0, added=partial(7, 2))]])

        def report():
            actor.stuck = lost
            return finished(next(reports, []))

        def generate(requests, version, call, partials):
            self.calls.append((version, call, partials))
            return FakeRef() if lost else finished([("completions",)])

        actor.report = FakeMethod(report)
        actor.generate = FakeMethod(generate)
        self.created.append(actor)
        return actor


class Stored:
    async def join_engine(self, actor): ...


def test_replacement_continues_a_lost_engines_completions():
    async def run():
        engines = Engines()
        supervised = SupervisedActor(
            "engine",
            engines.create,
            limits=SupervisionLimits(stall_s=0.2, restarts=1),
            terminate=no_process,
        )
        pool = RolloutPool([supervised], Stored(), max_num_seqs=4, timeout_s=30.0, report_s=0.05)
        await supervised.start()
        request = GenerateRequest(
            prompt_id="p", number=0, token_ids=(1,), sampling=Sampling(max_tokens=9), seeds=(1, 2)
        )
        assert await pool.generate([request], version=3) == [("completions",)]
        first, second = engines.calls
        assert first == (3, 1, {})
        assert second[:2] == (3, 1) and list(second[2]) == [(0, 1)]
        assert second[2][0, 1].token_ids.tolist() == [7, 8]
        await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        assert not tasks  # no reports without calls

    asyncio.run(run())
