"""A reference sharded over two ranks: the numbers and files of one that is whole."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ray
import torch
from ranks import Ranks, make_examples
from safetensors.torch import load_file

from actors.environment import process_env
from actors.sharded_reference import ShardedReference, ShardedReferenceActor
from actors.supervise import SupervisedActor
from launch.local import ray_cluster
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.errors import ActorLostError, CheckpointError, WeightSyncError
from rayhf.learner.build import deepspeed_config
from rayhf.reference.engine import ReferenceEngine
from rayhf.reference.weights import FILE
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Probe, Row, WeightBucket, WeightSnapshot
from rayhf.weights.buckets import pack_bucket

CONFIG = ReferenceConfig(ranks=2, token_budget=64, threads=1)
LEARNER = LearnerConfig(collective_timeout_s=60)
ROWS = [row for example in make_examples(9) for row in example.rows]
SHARES = (ROWS[:13], ROWS[13:])
"""Rows of each rank: three forward passes and one."""


def moved(model: Path, seed: int) -> list[WeightBucket]:
    """Return other weights of a model, in two buckets."""
    generator = torch.Generator().manual_seed(seed)
    tensors = sorted(load_file(model / "model.safetensors").items())
    named = [(n, t + 0.05 * torch.randn(t.shape, generator=generator)) for n, t in tensors]
    return [pack_bucket(part, torch.float32) for part in (named[:5], named[5:])]


def take(engine: Any, buckets: list[WeightBucket], mix: float, *, rank: int = 0) -> None:
    engine.update([(b, b.payload if rank == 0 else None) for b in buckets], mix)


def start(keywords: dict[str, Any], model: Path, dtype: str) -> Any:
    from rayhf.reference import sharded

    def all_sharded(*arguments: Any, **more: Any) -> dict[str, Any]:
        """Return DeepSpeed's settings, with small weights sharded too, which are usually whole."""
        settings = deepspeed_config(*arguments, **more)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    with patch.object(sharded, "deepspeed_config", all_sharded):
        return sharded.ShardedReferenceEngine(
            model, CONFIG, dtype=dtype, learner=LEARNER, **keywords
        )


def kept(engine: Any) -> float:
    """Return the share of the weights that a rank keeps between two forward passes."""
    parameters = list(engine.engine.module.parameters())
    own = sum(p.ds_tensor.numel() + p.numel() for p in parameters)
    return float(own / sum(p.ds_numel for p in parameters))


def live(keywords: dict[str, Any], model: Path, directory: Path) -> dict[str, Any]:
    """Let one rank take weights, save and load; return the log-probs after each event."""
    rank = keywords["rank"]
    engine = start(keywords, model, "float32")
    logprobs: dict[str, Any] = {"whole": engine.outputs(ROWS if rank else [], 0.7)}
    logprobs["top"] = engine.top_logprobs(SHARES[rank], 0.7, 3)

    def note(event: str) -> None:
        logprobs[event] = engine.outputs(SHARES[rank], 0.7)

    note("start")
    engine.save(directory / "start")
    take(engine, moved(model, 1), 1.0, rank=rank)
    note("replaced")
    engine.save(directory / "replaced")
    for seed in (2, 3):
        take(engine, moved(model, seed), 0.25, rank=rank)
    note("mixed")
    engine.save(directory / "mixed")
    engine.load(directory / "start")
    note("loaded")
    engine.load(directory / "mixed")
    take(engine, moved(model, 4), 0.25, rank=rank)
    note("mixed again")
    engine.save(directory / "mixed again")
    for refused, error in ((directory / "none", CheckpointError), (moved(model, 5)[:1], None)):
        with pytest.raises(error or WeightSyncError):
            engine.load(refused) if error else take(engine, refused, 1.0, rank=rank)
    return logprobs | {"kept": kept(engine)}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_sharded_reference_is_the_whole_one(
    two: Ranks, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(kind)
    by_rank = two.call(live, model, tmp_path / "sharded")
    engine = ReferenceEngine(model, CONFIG, dtype="float32", learner=LEARNER)
    assert_close(by_rank[1]["whole"], engine.logprobs(ROWS, 0.7))
    tops = [*by_rank[0]["top"], *by_rank[1]["top"]]
    whole = engine.top_logprobs(ROWS, 0.7, 3)
    for field in ("sampled", "top"):
        assert_close([getattr(t, field) for t in tops], [getattr(t, field) for t in whole])
    assert_close([t.sampled for t in whole], engine.logprobs(ROWS, 0.7), 0.0)
    assert all(0.5 <= each["kept"] < 0.55 for each in by_rank)

    def compare(event: str, *, saved: bool = True) -> None:
        ours = [*by_rank[0][event], *by_rank[1][event]]
        assert_close(ours, engine.logprobs(ROWS, 0.7))
        if saved:
            engine.save(tmp_path / "whole" / event)
            files = [load_file(tmp_path / each / event / FILE) for each in ("sharded", "whole")]
            assert files[0].keys() == files[1].keys()
            assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    compare("start")
    take(engine, moved(model, 1), 1.0)
    compare("replaced")
    for seed in (2, 3):
        take(engine, moved(model, seed), 0.25)
    compare("mixed")
    engine.load(tmp_path / "sharded" / "start")
    compare("loaded", saved=False)
    engine.load(tmp_path / "sharded" / "mixed")
    take(engine, moved(model, 4), 0.25)
    compare("mixed again")


def start_and_compute(keywords: dict[str, Any], model: Path, dtype: str) -> list[FloatArray]:
    return start(keywords, model, dtype).outputs(SHARES[keywords["rank"]], 1.0)  # type: ignore[no-any-return]


def test_bfloat16(two: Ranks, untied: Path) -> None:
    first, second = two.call(start_and_compute, untied, "bfloat16")
    engine = ReferenceEngine(untied, CONFIG, dtype="bfloat16", learner=LEARNER)
    assert_close([*first, *second], engine.logprobs(ROWS, 1.0), 0.03)


def assert_close(values: list[FloatArray], expected: list[FloatArray], atol: float = 1e-5) -> None:
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        assert value.shape == other.shape
        np.testing.assert_allclose(value, other, rtol=0, atol=atol)


class Unguarded(EpochGuard):
    """An epoch guard that never refuses."""

    def check(self) -> None: ...


def test_ranks_in_actors(tied: Path, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    remote = ray.remote(num_cpus=0.25, runtime_env={"env_vars": process_env("cpu", 1, vllm=False)})(
        ShardedReferenceActor
    )
    engine = ReferenceEngine(tied, CONFIG, dtype="float32", learner=LEARNER)
    buckets = moved(tied, 1)
    take(engine, buckets, 1.0)
    expected = engine.logprobs(ROWS, 0.7)

    async def scenario() -> None:
        actors = [SupervisedActor(f"reference rank {i}", remote.remote) for i in range(2)]
        group = ShardedReference(actors, CONFIG, timeout_s=120)
        await group.start(
            ModelName(str(tied)),
            dtype="float32",
            device="cpu",
            learner=LEARNER,
            epoch_guard=Unguarded(tmp_path, 0),
        )
        stored = tuple(replace(b, payload=ray.put(b.payload)) for b in buckets)
        probe = Probe(token_ids=(), logprobs=())
        snapshot = WeightSnapshot(version=1, buckets=stored, checksum="", probe=probe)
        await group.update(snapshot, mix=1.0)
        # As when they are streamed: requests of several prompts at the same time.
        parts: list[list[Row]] = [ROWS[i : i + 5] for i in range(0, len(ROWS), 5)]
        values = await asyncio.gather(*(group.logprobs(part, temperature=0.7) for part in parts))
        assert_close([value for part in values for value in part], expected)
        await group.save(tmp_path / "checkpoint")
        await group.load(tmp_path / "checkpoint")
        assert_close(await group.logprobs(ROWS, temperature=0.7), expected)
        process = await actors[1].actor.process_info.remote()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ActorLostError, match=r"reference rank 1 died|ranks lost their"):
            await group.logprobs(ROWS, temperature=0.7)
        for actor in actors:
            await actor.kill(stacks=False)

    with ray_cluster("local", cpus=2):
        asyncio.run(scenario())
