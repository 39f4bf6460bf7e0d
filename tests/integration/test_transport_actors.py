"""Weights between real actors: a learner of two ranks (ZeRO-3) and a vLLM engine, by broadcast, and
what happens when the engine dies; with LoRA also through the object store.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.learner import LearnerGroup, RemoteLearner
from actors.rollout import RolloutActor, RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import transport
from launch.local import ray_cluster
from rayhf.config.schema import LearnerConfig, LoraConfig, RolloutConfig
from rayhf.errors import ActorLostError
from rayhf.losses.sft import SFTLoss
from rayhf.rollout.env import engine_env
from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.types import (
    Batch,
    Example,
    GenerateRequest,
    Row,
    Sampling,
    TransportName,
    WeightSnapshot,
)
from rayhf.weights import broadcast as channel
from rayhf.weights.lora import is_factor

SIZE = ModelSize(hidden=256, layers=4, intermediate=512)
"""About ten buckets of a MiB: more than sockets hold, so that a sender notices who has gone."""
TIMEOUT_S = 60.0
FATAL = 99
ROW = Row(prompt_id="p", sample=0, prompt_ids=(5, 6, 7), response_ids=(8, 9, 10, 11))


class Mortal(RolloutActor):
    """Dies in the middle of weights FATAL."""

    async def update(self, snapshot: WeightSnapshot, *payloads: Any) -> Any:
        if snapshot.version == FATAL:
            check, seen = channel.check_seal, []

            def dying(flat: torch.Tensor, *where: int) -> str:
                seen.append(where)
                if len(seen) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return check(flat, *where)

            channel.check_seal = dying
        return await super().update(snapshot, *payloads)


class Stage:
    """One engine, its learner, and a loop to play on."""

    def __init__(
        self, model: Path, way: TransportName = "broadcast", lora: LoraConfig | None = None
    ) -> None:
        self.events: list[tuple[str, str]] = []
        rollout, learner = (
            RolloutConfig(kv_cache_gib=0.1),
            LearnerConfig(dtype="float32", zero_stage=3, bucket_mib=1, threads=1),
        )
        remote = ray.remote(Mortal).options(
            num_cpus=0.25, max_concurrency=100, runtime_env={"env_vars": engine_env("cpu", 1)}
        )
        settings = {"dtype": "float32", "max_length": 128, "seed": 0, "device": "cpu"}

        async def build(actor: Any) -> None:
            await asyncio.wrap_future(actor.build.remote(model, rollout, **settings).future())

        limits = SupervisionLimits(stall_s=TIMEOUT_S, restarts=3)
        self.engine = SupervisedActor(
            "rollout engine 0", remote.remote, build, limits=limits, report=self.report
        )
        env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        rank = RemoteLearner.options(num_cpus=0.25, runtime_env={"env_vars": env})
        self._ranks, self._settings = (
            [SupervisedActor(f"learner rank {i}", rank.remote) for i in range(2)],
            learner,
        )
        self._places = rollout.max_num_seqs
        self.travel(way)
        self._begin = partial(self.learner.start, model, lr=1e-2, total_steps=10, lora=lora)
        self._actors = [self.engine, *self._ranks]

    def travel(self, way: TransportName) -> None:
        """From now on weights go this way, between the same actors."""
        self.learner = LearnerGroup(
            self._ranks, self._settings, sync_dtype="float32", timeout_s=TIMEOUT_S, transport=way
        )
        carrier = transport(way, self.learner, [self.engine], workers=1, timeout_s=TIMEOUT_S)
        self.pool = RolloutPool([self.engine], carrier, places=self._places, timeout_s=TIMEOUT_S)

    async def start(self) -> None:
        await asyncio.gather(self.engine.start(), self._begin())

    def end(self) -> None:
        for one in self._actors:
            ray.kill(one.actor)

    async def kill_engine(self) -> None:
        os.kill(
            (await asyncio.wrap_future(self.engine.actor.process_info.remote().future())).pid,
            signal.SIGKILL,
        )

    def report(self, kind: str, message: str) -> None:
        self.events.append((kind, message))

    async def learn_and_deliver(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        await self.learner.step(Batch(examples=(Example(rows=(ROW,)),)), SFTLoss())
        snapshot = await self.learner.publish(version, stored=stored)
        await self.pool.update(snapshot)
        return snapshot

    async def write(self, version: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """A greedy answer, and its log-probs; the learner must agree."""
        sampling = Sampling(max_tokens=8, temperature=1.0)
        request = GenerateRequest(
            prompt_id="p", number=0, token_ids=(5, 6, 7), sampling=sampling, seeds=(1,)
        )
        ((answer,),) = await self.pool.generate([request], version=version)
        row = Row(prompt_id="p", sample=0, prompt_ids=(5, 6, 7), response_ids=answer.token_ids)
        (expected,) = await self.learner.outputs([row], temperature=1.0)
        assert answer.policy_version == version and list(answer.logprobs) == pytest.approx(
            expected.tolist(), abs=1e-4
        )
        return answer.token_ids, answer.logprobs


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Path]]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(
        ["Say something about 0123456789, please!"] * 4,
        POLICY_FORMAT,
        max_vocab=300,
        max_length=128,
    )
    new_model(SIZE, tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with ray_cluster("local", cpus=2), asyncio.Runner() as runner:
        yield runner, directory


@pytest.fixture(scope="module")
def stage(ground: tuple[asyncio.Runner, Path]) -> Iterator[tuple[asyncio.Runner, Stage]]:
    runner, directory = ground
    one = Stage(directory)
    runner.run(one.start())
    yield runner, one
    one.end()


def test_a_lost_engine_is_brought_up_from_the_learner_and_takes_part_in_the_next_broadcast(
    stage: tuple[asyncio.Runner, Stage],
) -> None:
    async def journey(one: Stage) -> None:
        first = await one.write(0)
        snapshot = await one.learn_and_deliver(1)
        assert snapshot.transport == "broadcast" and len(snapshot.buckets) > 5
        assert all(bucket.payload is None for bucket in snapshot.buckets)
        second = await one.write(1)
        assert first[1] != second[1]
        await one.kill_engine()
        assert await one.write(1) == second
        await one.learn_and_deliver(2)
        assert (await one.write(2))[1] != second[1]
        assert [kind for kind, _ in one.events] == ["fault", "recovered"]

    runner, one = stage
    runner.run(journey(one))


def test_an_engine_that_dies_in_the_middle_is_named_in_time(
    stage: tuple[asyncio.Runner, Stage],
) -> None:
    runner, one = stage
    started = time.monotonic()
    with pytest.raises(
        ActorLostError,
        match=r"sync: rollout engine 0 died|weights by broadcast, sending: .*[Cc]onnection",
    ):
        runner.run(one.learn_and_deliver(FATAL))
    assert time.monotonic() - started < TIMEOUT_S


@pytest.mark.timeout(600)
def test_with_lora_only_adapters_travel(ground: tuple[asyncio.Runner, Path]) -> None:
    async def journey(one: Stage, way: TransportName, last: int) -> None:
        one.travel(way)
        first = await one.write(last)
        snapshot = await one.learn_and_deliver(last + 1)
        names = [spec.name for bucket in snapshot.buckets for spec in bucket.tensors]
        assert snapshot.transport == way and len(names) == 4 * 7 * 2 and all(map(is_factor, names))
        second = await one.write(last + 1)
        assert first[1] != second[1]
        await one.kill_engine()
        assert await one.write(last + 1) == second
        whole = await one.learn_and_deliver(
            last + 2, stored=True
        )  # a round in which the reference moves
        assert whole.transport == "object_store" and len(whole.buckets) > 5
        assert (await one.write(last + 2))[1] != second[1]
        await one.learn_and_deliver(last + 3)
        await one.write(last + 3)
        assert [kind for kind, _ in one.events] == ["fault", "recovered"]
        one.events.clear()

    async def journeys(one: Stage) -> None:
        await one.start()
        await journey(one, "object_store", 0)
        await journey(one, "broadcast", 3)

    runner, directory = ground
    one = Stage(directory, "object_store", LoraConfig(rank=4, alpha=16))
    try:
        runner.run(journeys(one))
    finally:
        one.end()
