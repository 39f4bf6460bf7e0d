"""Two real reference actors: one is killed, and its replacement has the same weights to the bit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ranks import make_examples, make_model
from safetensors.numpy import load_file

from actors.environment import process_env
from actors.process import CONCURRENCY_GROUPS
from actors.reference import ReferenceActor, ReferencePool
from actors.supervise import SupervisedActor, SupervisionLimits
from launch.local import ray_cluster
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import Probe, Row, WeightSnapshot
from rayhf.weights.buckets import pack_bucket

CONFIG = ReferenceConfig(replicas=2, token_budget=64, threads=1)


class Unguarded(EpochGuard):
    """An epoch guard that never refuses."""

    def check(self) -> None: ...


class Mortal(ReferenceActor):
    """ReferenceActor that dies with the chunk of sample 0 where there is a directory `marker`."""

    marker = Path()

    def mark(self, marker: Path) -> None:
        self.marker = marker

    def logprobs(self, rows: Any, temperature: float, model: Path | None) -> Any:
        if self.marker.is_dir() and any(row.sample == 0 for row in rows):
            self.marker.rmdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().logprobs(rows, temperature, model)


def snapshot(model: Path, shift: float) -> WeightSnapshot:
    import torch
    from safetensors.torch import load_file as load_tensors

    tensors = load_tensors(model / "model.safetensors")
    generator = torch.Generator().manual_seed(round(100 * shift))
    moved = [
        (name, tensor + shift * torch.randn(tensor.shape, generator=generator))
        for name, tensor in sorted(tensors.items())
    ]
    bucket = pack_bucket(moved, torch.float32)
    return WeightSnapshot(
        version=1,
        buckets=(replace(bucket, payload=ray.put(bucket.payload)),),
        checksum="",
        probe=Probe(token_ids=(), logprobs=()),
    )


def test_killed_reference_is_replaced_with_the_same_average(tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    model = make_model(tmp_path / "model", tied=False, kind="llama")
    marker = tmp_path / "kill"
    rows = [row for example in make_examples(20) for row in example.rows]
    events: list[str] = []
    remote = ray.remote(
        num_cpus=0.25,
        concurrency_groups=CONCURRENCY_GROUPS,
        runtime_env={"env_vars": process_env("cpu", 1, vllm=False)},
    )(Mortal)

    async def build(actor: Any) -> None:
        settings = {"dtype": "float32", "device": "cpu", "learner": LearnerConfig()}
        guard = Unguarded(tmp_path, 0)
        name = ModelName(str(model))
        call = actor.build.remote(name, CONFIG, **settings, epoch_guard=guard)
        await asyncio.wrap_future(call.future())
        await asyncio.wrap_future(actor.mark.remote(marker).future())

    async def scenario() -> None:
        limits = SupervisionLimits(stall_s=60.0, restarts=2)
        members = [
            SupervisedActor(
                f"reference {number}",
                remote.remote,
                build,
                limits=limits,
                report=lambda kind, message: events.append(kind),
            )
            for number in range(2)
        ]
        await asyncio.gather(*(member.start() for member in members))
        pool = ReferencePool(members, token_budget=CONFIG.token_budget, timeout_s=60.0)
        for shift in (0.1, 0.2):
            await pool.update(snapshot(model, shift), mix=0.25)
        before = await pool.logprobs(rows, temperature=0.7)
        marker.mkdir()
        assert_equal(rows, await pool.logprobs(rows, temperature=0.7), before)
        assert events == ["fault", "recovered"]
        await pool.update(snapshot(model, 0.3), mix=0.25)
        tensors = []
        for number, member in enumerate(members):
            directory = tmp_path / str(number)
            await asyncio.wrap_future(member.actor.save.remote(directory).future())
            tensors.append(load_file(directory / "reference.safetensors"))
        first, second = tensors
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)
        for member in members:
            await member.kill(stacks=False)

    with ray_cluster("local", cpus=2):
        asyncio.run(scenario())


def assert_equal(rows: list[Row], values: list[Any], expected: list[Any]) -> None:
    assert len(values) == len(rows)
    for row, value, other in zip(rows, values, expected, strict=True):
        assert value.shape == row.response_ids.shape
        np.testing.assert_array_equal(value, other)
