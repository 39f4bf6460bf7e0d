"""Weight sync between real actors: a learner of two ranks (ZeRO-3) and one or two vLLM engines.

By broadcast to two engines, also when one dies, and with LoRA through the object store.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.environment import process_env
from actors.learner import LearnerActor, LearnerClient
from actors.rollout import RolloutActor, RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import make_transport
from launch.local import ray_cluster
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, LoraConfig, RolloutConfig
from rayhf.errors import ActorLostError
from rayhf.losses.sft import SFTLoss
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
    token_array,
)
from rayhf.weights import broadcast as channel
from rayhf.weights.lora import is_factor

SIZE = ModelSize(hidden=256, layers=4, intermediate=512)
"""About ten buckets of a MiB: more than sockets hold, so that a sender notices a lost receiver."""
TIMEOUT_S = 60.0
FATAL = 99
ROW = Row(
    prompt_id="p",
    sample=0,
    prompt_ids=token_array((5, 6, 7)),
    response_ids=token_array((8, 9, 10, 11)),
)


class Mortal(RolloutActor):
    """RolloutActor that dies in the middle of weights FATAL."""

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
    """Engines and their learner."""

    def __init__(
        self,
        model: ModelName,
        transport: TransportName = "broadcast",
        lora: LoraConfig | None = None,
        *,
        engines: int = 1,
    ) -> None:
        self.events: list[tuple[str, str]] = []
        rollout, learner = (
            RolloutConfig(kv_cache_gib=0.1),
            LearnerConfig(dtype="float32", zero_stage=3, bucket_mib=1, threads=1),
        )
        remote = ray.remote(Mortal).options(
            num_cpus=0.25,
            max_concurrency=100,
            runtime_env={"env_vars": process_env("cpu", 1, vllm=True)},
        )
        settings = {"dtype": "float32", "max_length": 128, "seed": 0, "device": "cpu"}

        async def build(actor: Any) -> None:
            await asyncio.wrap_future(actor.build.remote(model, rollout, **settings).future())

        limits = SupervisionLimits(stall_s=TIMEOUT_S, restarts=3)
        self.engines = [
            SupervisedActor(
                f"rollout engine {i}", remote.remote, build, limits=limits, report=self.report
            )
            for i in range(engines)
        ]
        self.engine = self.engines[0]
        env = process_env("cpu", 1, vllm=False)
        rank = ray.remote(LearnerActor).options(num_cpus=0.25, runtime_env={"env_vars": env})
        self._ranks, self._settings = (
            [SupervisedActor(f"learner rank {i}", rank.remote) for i in range(2)],
            learner,
        )
        self._max_num_seqs = rollout.max_num_seqs
        self.use(transport)
        self._begin = partial(self.learner.start, model, lr=1e-2, total_steps=10, lora=lora)
        self._actors = [*self.engines, *self._ranks]

    def use(self, transport: TransportName) -> None:
        """Sync with this transport from now on, between the same actors."""
        self.learner = LearnerClient(
            self._ranks,
            self._settings,
            sync_dtype="float32",
            timeout_s=TIMEOUT_S,
            transport=transport,
        )
        way = make_transport(transport, self.learner, self.engines, workers=1, timeout_s=TIMEOUT_S)
        self.pool = RolloutPool(
            self.engines, way, max_num_seqs=self._max_num_seqs, timeout_s=TIMEOUT_S
        )

    async def start(self) -> None:
        await asyncio.gather(*(engine.start() for engine in self.engines), self._begin())

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

    async def train_and_deliver(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        await self.learner.step(Batch(examples=(Example(rows=(ROW,)),)), SFTLoss())
        snapshot = await self.learner.publish(version, stored=stored)
        await self.pool.update(snapshot)
        return snapshot

    async def generate(self, version: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return a completion and its log-probs, with which every engine and the learner agree."""
        sampling = Sampling(max_tokens=8, temperature=1.0)
        request = GenerateRequest(
            prompt_id="p", number=0, token_ids=(5, 6, 7), sampling=sampling, seeds=(1,)
        )
        # Several requests of one call are dealt out to the engines in turn.
        answers = await self.pool.generate([request] * len(self.engines), version=version)
        ((completion,), *others) = answers
        for (other,) in others:
            assert list(other.token_ids) == list(completion.token_ids)
            assert list(other.logprobs) == list(completion.logprobs)
        row = Row(
            prompt_id="p",
            sample=0,
            prompt_ids=token_array((5, 6, 7)),
            response_ids=completion.token_ids,
        )
        (expected,) = await self.learner.outputs([row], temperature=1.0)
        assert completion.policy_version == version and list(completion.logprobs) == pytest.approx(
            expected.tolist(), abs=1e-4
        )
        return tuple(completion.token_ids.tolist()), tuple(completion.logprobs.tolist())


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
    one = Stage(ModelName(str(directory)), engines=2)
    runner.run(one.start())
    yield runner, one
    one.end()


def test_replaced_engine_gets_weights_and_joins_the_broadcast(
    stage: tuple[asyncio.Runner, Stage],
) -> None:
    async def scenario(one: Stage) -> None:
        first = await one.generate(0)
        snapshot = await one.train_and_deliver(1)
        assert snapshot.transport == "broadcast" and len(snapshot.buckets) > 5
        assert all(bucket.payload is None for bucket in snapshot.buckets)
        second = await one.generate(1)
        assert first[1] != second[1]
        await one.kill_engine()
        assert await one.generate(1) == second
        await one.train_and_deliver(2)
        assert (await one.generate(2))[1] != second[1]
        assert [kind for kind, _ in one.events] == ["fault", "recovered"]

    runner, one = stage
    runner.run(scenario(one))


def test_engine_that_dies_in_a_broadcast_is_named(
    stage: tuple[asyncio.Runner, Stage],
) -> None:
    runner, one = stage
    with pytest.raises(
        ActorLostError,
        match=r"sync: rollout engine \d died|weights by broadcast, sending: .*[Cc]onnection",
    ):
        runner.run(one.train_and_deliver(FATAL))


@pytest.mark.timeout(600)
def test_with_lora_only_adapters_are_sent(ground: tuple[asyncio.Runner, Path]) -> None:
    async def scenario(one: Stage, transport: TransportName, last: int) -> None:
        one.use(transport)
        first = await one.generate(last)
        snapshot = await one.train_and_deliver(last + 1)
        names = [spec.name for bucket in snapshot.buckets for spec in bucket.tensors]
        assert (
            snapshot.transport == transport
            and len(names) == 4 * 7 * 2
            and all(map(is_factor, names))
        )
        second = await one.generate(last + 1)
        assert first[1] != second[1]
        await one.kill_engine()
        assert await one.generate(last + 1) == second
        whole = await one.train_and_deliver(last + 2, stored=True)  # the reference moves
        assert whole.transport == "object_store" and len(whole.buckets) > 5
        assert (await one.generate(last + 2))[1] != second[1]
        await one.train_and_deliver(last + 3)
        await one.generate(last + 3)
        assert [kind for kind, _ in one.events] == ["fault", "recovered"]
        one.events.clear()

    async def scenarios(one: Stage) -> None:
        await one.start()
        await scenario(one, "object_store", 0)
        await scenario(one, "broadcast", 3)

    runner, directory = ground
    one = Stage(ModelName(str(directory)), "object_store", LoraConfig(rank=4, alpha=16))
    try:
        runner.run(scenarios(one))
    finally:
        one.end()
