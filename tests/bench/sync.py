"""Time of a whole weight sync: a learner's weights into a vLLM engine, both real, on CPU.

Part of `python -m tests.bench.transport`. A random Llama with the shapes of SmolLM2-135M, learner
in float32, engine in bfloat16, through the object store. Every turn measures, one after the other,
a plain copy of the weights' bytes and a probe in the engine's process, and a sync. Stages are timed
by wrapping the functions that do them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import ray

from actors.environment import process_env
from actors.learner import LearnerActor, LearnerClient
from actors.rollout import RolloutActor, RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import make_transport
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, RolloutConfig
from tests.bench.random_llama import Size, write_model, write_tokenizer

SMOLLM2_135M = Size(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152, tied=True
)
TURNS = 9
WARM_UP = 3
"""Turns before those: new memory is slow when it is first written."""
CORES = os.cpu_count() or 1
THREADS = {"learner": CORES, "engine": max(1, CORES // 2)}
"""As in a campaign without overlap."""
TIMEOUT_S = 600.0

STAGES = {
    "plan": "plan the buckets",
    "learner probe": "probe in the learner: 64 tokens, float32",
    "meter": "sync/changed_fraction and sync/update_lost",
    "pack": "cast to bfloat16 and pack",
    "checksum": "checksums",
    "put": "copy into the object store, beside packing",
    "verify": "verify checksums, in threads",
    "start": "vLLM: restore the layers' checkpoint layout",
    "load": "vLLM: load the layers",
    "repack": "of it: repack weights for its CPU kernels",
    "finish": "vLLM: end the update, repack the tied head",
    "engine probe": "probe in the engine",
    "calls": "Ray calls, waiting, everything else",
}


class Stages:
    """Seconds in wrapped functions since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Replace a function by one that adds its seconds to a stage."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        seconds = self._seconds
        self._seconds = {}
        return seconds


class TimedLearner(LearnerActor):
    def build(self, *args: Any, **kwargs: Any) -> Any:
        from rayhf.learner.engine import LearnerEngine
        from rayhf.weights import buckets
        from rayhf.weights.sync_metrics import SyncMeter

        self.stages = Stages()
        self.stages.wrap(LearnerEngine, "plan_buckets", "plan")
        self.stages.wrap(LearnerEngine, "probe", "learner probe")
        self.stages.wrap(SyncMeter, "observe", "meter")
        self.stages.wrap(buckets, "fill_bucket", "pack")
        self.stages.wrap(buckets, "checksum", "checksum")
        self.stages.wrap(ray, "put", "put")
        return super().build(*args, **kwargs)

    def take(self) -> dict[str, float]:
        return self.stages.take()


class TimedEngine(RolloutActor):
    def build(self, *args: Any, **kwargs: Any) -> None:
        super().build(*args, **kwargs)
        import torch
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from rayhf.rollout import engine, vllm_internals
        from rayhf.rollout.vllm_driver import VllmDriver

        self.stages = Stages()
        self.stages.wrap(engine, "verify_buckets", "verify")
        self.stages.wrap(vllm_internals, "start_update", "start")
        self.stages.wrap(vllm_internals, "load_bucket", "load")
        self.stages.wrap(UnquantizedLinearMethod, "process_weights_after_loading", "repack")
        self.stages.wrap(vllm_internals, "finish_update", "finish")
        self.stages.wrap(VllmDriver, "probe_logprobs", "engine probe")
        shapes = self.engine._driver.shapes.values()
        self.source = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
        self.target = [torch.zeros_like(tensor) for tensor in self.source]

    async def copy(self) -> float:
        """Return the seconds of a plain copy of the weights' bytes, tensor by tensor."""
        started = time.perf_counter()
        for target, source in zip(self.target, self.source, strict=True):
            target.copy_(source)
        return time.perf_counter() - started

    async def take(self) -> dict[str, float]:
        return self.stages.take()


async def _syncs(model: ModelName, turns: int) -> list[dict[str, float]]:
    """Return the seconds of each turn, by stage, and the bytes."""
    remote: Any = ray.remote
    engine_env = process_env("cpu", THREADS["engine"], vllm=True)
    learner_env = process_env("cpu", THREADS["learner"], vllm=False)
    engine_class = remote(num_cpus=0, max_concurrency=100)(TimedEngine)
    learner_class = remote(num_cpus=0)(TimedLearner)
    settings = {"dtype": "bfloat16", "max_length": 128, "seed": 0, "device": "cpu"}

    async def build(actor: Any) -> None:
        await actor.build.remote(model, RolloutConfig(kv_cache_gib=0.1), **settings)

    engine = SupervisedActor(
        "rollout engine 0",
        engine_class.options(runtime_env={"env_vars": engine_env}).remote,
        build,
        limits=SupervisionLimits(stall_s=TIMEOUT_S, restarts=0),
        report=print,
    )
    rank = SupervisedActor(
        "learner rank 0", learner_class.options(runtime_env={"env_vars": learner_env}).remote
    )
    config = LearnerConfig(dtype="float32", zero_stage=0, threads=THREADS["learner"])
    learner = LearnerClient([rank], config, sync_dtype="bfloat16", timeout_s=TIMEOUT_S)
    transport = make_transport("object_store", learner, [engine], workers=1, timeout_s=TIMEOUT_S)
    pool = RolloutPool([engine], transport, max_num_seqs=8, timeout_s=TIMEOUT_S)
    await learner.start(model, lr=1e-6, total_steps=10)
    await engine.start()
    results: list[dict[str, float]] = []
    for version in range(1, turns + WARM_UP + 1):
        copy_s = await engine.actor.copy.remote()
        started = time.perf_counter()
        await pool.verify(await learner.probe())
        both_s = time.perf_counter() - started
        probes = await rank.actor.take.remote() | await engine.actor.take.remote()
        started = time.perf_counter()
        snapshot = await learner.publish(version)
        published_s = time.perf_counter() - started
        await pool.update(snapshot)
        total_s = time.perf_counter() - started
        stages = await rank.actor.take.remote() | await engine.actor.take.remote()
        beside = stages["put"] + stages["repack"]
        stages["calls"] = total_s - (sum(stages.values()) - beside)
        results.append(
            stages
            | {"copy": copy_s, "probe": probes["engine probe"], "both probes": both_s}
            | {"publish": published_s, "total": total_s}
        )
    for actor in (engine, rank):
        ray.kill(actor.actor)
    return results[WARM_UP:]


def measure_sync(turns: int = TURNS) -> dict[str, float]:
    """Return medians over the turns, in seconds. Ray is running."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="rayhf-sync-") as scratch:
        write_model(SMOLLM2_135M, Path(scratch), seed=0, device="cpu")
        write_tokenizer(Path(scratch))
        rows = asyncio.run(_syncs(ModelName(scratch), turns))
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def sync_report(medians: Mapping[str, float]) -> str:
    """Return the tables of RESULTS.md."""
    copy_s = medians["copy"]
    probe_s = medians["probe"]
    limit_s = 3 * copy_s + probe_s
    lines: Sequence[str] = [
        f"A sync of SmolLM2-135M's shapes (269 MB in bfloat16, learner in float32) through the "
        f"object store; learner with {THREADS['learner']} threads, engine with "
        f"{THREADS['engine']}; medians of {TURNS} turns.",
        "",
        "| figure | s |",
        "|---|--:|",
        f"| plain copy of the bytes, in the engine's process | {copy_s:.3f} |",
        f"| probe in the engine alone | {probe_s:.3f} |",
        f"| 3 copies and a probe | {limit_s:.3f} |",
        f"| sync | {medians['total']:.3f} |",
        f"| of it the learner's part, until everything is in the object store | "
        f"{medians['publish']:.3f} |",
        "",
        f"The sync takes {medians['total'] / limit_s:.2f} times 3 copies and a probe, and "
        f"{medians['total'] / (copy_s + probe_s):.2f} times a copy and a probe.",
        "",
        "| stage | s | copies |",
        "|---|--:|--:|",
        *(
            f"| {text} | {medians[stage]:.3f} | {medians[stage] / copy_s:.1f} |"
            for stage, text in STAGES.items()
        ),
    ]
    return "\n".join(lines)
