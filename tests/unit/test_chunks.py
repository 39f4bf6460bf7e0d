"""Requests in chunks: of the learner's outputs and of scores, and deadlines of generations."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_actor import FakeRef, finished, no_process
from score_requests import request
from test_reference_pool import make_rows

from actors import scorer as scorer_module
from actors.learner import LearnerClient
from actors.process import ProcessInfo
from actors.rollout import RolloutPool
from actors.scorer import ScorerClient
from actors.supervise import SupervisedActor
from rayhf.config.schema import LearnerConfig
from rayhf.errors import DeadlineError
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import GenerateRequest, Row, Sampling, Scored


async def started(name: str, handle: SimpleNamespace) -> SupervisedActor:
    info = ProcessInfo("node", 0, 0.0)
    handle.process_info = SimpleNamespace(remote=lambda: finished(info))
    actor = SupervisedActor(name, lambda: handle, terminate=no_process)  # type: ignore[arg-type,return-value]
    await actor.start()
    return actor


@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_learner_computes_a_micro_batch_of_every_rank_at_a_time(packing: Any, ranks: int) -> None:
    rows = make_rows(25)
    calls: list[list[list[int]]] = [[] for _ in range(ranks)]
    progress: list[tuple[int, int]] = []

    def rank(number: int) -> SimpleNamespace:
        def outputs(share: Sequence[Row], temperature: float) -> FakeRef:
            calls[number].append([row.sample for row in share])
            return finished([np.full(len(row.response_ids), row.sample) for row in share])

        return SimpleNamespace(outputs=SimpleNamespace(remote=outputs))

    async def scenario() -> None:
        actors = [await started(f"rank {number}", rank(number)) for number in range(ranks)]
        config = LearnerConfig(token_budget=128)
        client = LearnerClient(actors, config, sync_dtype="float32", timeout_s=5)
        client._packing = packing
        values = await client.outputs(
            rows, temperature=1.0, progress=lambda *counts: progress.append(counts)
        )
        assert [value[0] for value in values] == list(range(25))
        assert await client.outputs([], temperature=1.0) == []

    asyncio.run(scenario())
    count = len(calls[0])
    assert count > 1 and all(len(of_rank) == count for of_rank in calls)
    assert progress == [(number, count) for number in range(1, count + 1)]
    assert sorted(i for of_rank in calls for share in of_rank for i in share) == list(range(25))


def test_late_chunk_and_its_rank_are_named() -> None:
    async def scenario() -> None:
        replies = [finished([np.zeros(1)]), FakeRef()]
        late = SimpleNamespace(outputs=SimpleNamespace(remote=lambda *_: replies.pop(0)))
        client = LearnerClient(
            [await started("learner rank 0", late)],
            LearnerConfig(token_budget=128),
            sync_dtype="float32",
            timeout_s=60,
            chunk_timeout_s=0.05,
        )
        client._plan = lambda *_, **__: [[[0], [1]]]  # type: ignore[method-assign]
        await client.outputs(make_rows(2), temperature=1.0)

    expected = "log-probs, chunk 2 of 2: no response from learner rank 0 within 0.05 s"
    with pytest.raises(DeadlineError, match=re.escape(expected)):
        asyncio.run(scenario())


def test_scores_come_in_chunks_of_which_an_actor_takes_some_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer_module, "_CHUNK", 4)
    running: list[int] = []
    most: list[int] = []

    def score(requests: Sequence[Any]) -> FakeRef:
        ref = FakeRef()
        running.append(1)
        most.append(len(running))

        def finish() -> None:
            running.pop()
            outcomes = [
                tuple(Scored(value=float(len(c.text))) for c in each.completions)
                for each in requests
            ]
            ref.result.set_result([outcomes])

        asyncio.get_running_loop().call_later(0.001, finish)
        return ref

    requests = [request("x" * number, "") for number in range(9)]

    async def scenario() -> list[float]:
        actor = await started("scorer", SimpleNamespace(score=SimpleNamespace(remote=score)))
        entries = [RuleConfig(function="mine:one")]
        client = ScorerClient([actor], entries, timeout_s=5, calls=2)
        outcomes = await client.score(requests)
        return [first.value for first, _ in outcomes if isinstance(first, Scored)]

    assert asyncio.run(scenario()) == list(range(9))
    assert len(most) == 5 and max(most) == 2


def test_generation_has_its_deadline_for_as_many_sequences_as_an_engine_takes() -> None:
    deadlines: list[float] = []

    class Engine:
        name = "engine"

        async def persist(self, call: Any, *, phase: str, timeout_s: float) -> Any:
            deadlines.append(timeout_s)
            await asyncio.sleep(0)
            return [()] * 9

    def generate(number: int, seeds: int) -> GenerateRequest:
        return GenerateRequest(
            prompt_id=f"p{number}",
            number=0,
            token_ids=(1,),
            sampling=Sampling(max_tokens=1),
            seeds=tuple(range(seeds)),
        )

    async def scenario() -> None:
        transport: Any = SimpleNamespace(join_engine=None, stored=None)
        pool = RolloutPool([Engine()], transport, max_num_seqs=4, timeout_s=10.0)  # type: ignore[list-item]
        await pool.generate([generate(0, 1)], version=0)
        await pool.generate([generate(number, 4) for number in range(9)], version=0)
        await asyncio.gather(*(pool.generate([generate(n, 3)], version=0) for n in range(2)))

    asyncio.run(scenario())
    assert deadlines == [10.0, 90.0, 10.0, 20.0]
