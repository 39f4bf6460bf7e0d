"""The table of architectures: transformers, the learner and vLLM compute the same log-probs.

Each entry is a random tiny model in float32. `make test` covers the most used; `make architectures`
all, and that what the table refuses still does not work.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LONG, MAX_LENGTH, make_request, payloads_of
from tiny_models import SETTINGS, WINDOW, save_tiny_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry

from rayhf.config.schema import LearnerConfig, LoraConfig, RolloutConfig
from rayhf.learner.build import load_model
from rayhf.models.architectures import ARCHITECTURES, ENGINE_CLASSES
from rayhf.models.forward import PolicyHead, build_inputs
from rayhf.rollout.engine import RolloutEngine
from rayhf.types import Probe, Row, WeightSnapshot, token_array
from rayhf.weights.buckets import pack_bucket, snapshot_checksum
from rayhf.weights.export import Weight, all_weights, trained_weights

TOLERANCE = 1e-4
"""Nats, largest difference; about 2e-6 is measured."""
OFTEN = (
    "qwen3_moe",
    "mixtral",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "glm4",
)
REST = tuple(name for name in ARCHITECTURES if name not in OFTEN)


def row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    return Row(
        prompt_id="p", sample=0, prompt_ids=token_array(prompt), response_ids=token_array(response)
    )


@torch.no_grad()
def logprobs(head: PolicyHead, rows: Sequence[Row]) -> Tensor:
    """Return the learner's log-probs of all rows, in one batch."""
    result: Tensor = head(build_inputs(rows, "cpu", packing=head.packing), 1.0)[0]
    return result


def learner(directory: Path, *, lora: LoraConfig | None = None) -> PolicyHead:
    settings = {"zero_optimization": {"stage": 0}}
    config = LearnerConfig(dtype="float32")
    head = load_model(directory, config, head="policy", lora=lora, settings=settings)
    assert isinstance(head, PolicyHead)
    for module in head.modules():
        # Where vLLM has no implementation of its own, it wraps transformers' classes in this
        # process, and then its wrapper looks for this attribute of every instance.
        module.do_not_compile = True  # type: ignore[assignment]
    return head.eval()


def snapshot(head: PolicyHead, version: int, weights: Sequence[Weight]) -> WeightSnapshot:
    buckets = (pack_bucket([(weight.name, weight.value()) for weight in weights], torch.float32),)
    ids = LONG[:40]
    probe = Probe(token_ids=ids, logprobs=tuple(logprobs(head, [row(ids[:1], ids[1:])]).tolist()))
    return WeightSnapshot(
        version=version, buckets=buckets, checksum=snapshot_checksum(buckets), probe=probe
    )


def move(head: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def gap(engine: RolloutEngine, head: PolicyHead, version: int) -> float:
    """Return the largest difference to the learner, rows in one batch and alone."""
    requests = [make_request(LONG), make_request((5, 6, 7), number=1, seeds=(5, 6))]
    completions = engine.generate(requests, version=version)
    rows = [
        row(request.token_ids, completion.token_ids)
        for request, group in zip(requests, completions, strict=True)
        for completion in group
    ]
    sampled = torch.tensor([x for group in completions for c in group for x in c.logprobs])
    together = logprobs(head, rows)
    alone = torch.cat([logprobs(head, [one]) for one in rows])
    return max(float((sampled - other).abs().max()) for other in (together, alone))


def engine_of(directory: Path, name: str) -> RolloutEngine:
    lazy = ModelRegistry.models[name]
    if hasattr(lazy, "load_model_cls"):
        # vLLM would import it in a process of its own to look at it, which takes 20 s.
        ModelRegistry.register_model(name, lazy.load_model_cls())
    config = RolloutConfig(max_num_seqs=16, kv_cache_gib=0.02)
    return RolloutEngine(
        directory, config, dtype="float32", max_length=MAX_LENGTH, seed=0, device="cpu"
    )


def measure(model_type: str, directory: Path, **settings: Any) -> dict[str, float]:
    """Return the largest differences of log-probs, in nats, by what was compared."""
    full = save_tiny_model(model_type, directory, **settings).eval()
    full.config._attn_implementation = "eager"
    whole = learner(directory)
    adapted = learner(directory, lora=LoraConfig(rank=4, alpha=6))
    with torch.no_grad():
        expected = full(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor(LONG[1:])[:, None])[:, 0]
    ours = logprobs(whole, [row(LONG[:1], LONG[1:]), row((5, 6), (7,))])[:-1]
    gaps = {"forward": float((ours - expected).abs().max())}
    engine = engine_of(directory, full.config.architectures[0])
    try:
        gaps["start"] = gap(engine, whole, 0)
        move(adapted, 0.1)
        adapters = snapshot(adapted, 1, trained_weights(adapted.model))
        engine.update(adapters, payloads_of(adapters))
        gaps["adapters"] = gap(engine, adapted, 1)
        move(whole, 0.05)
        weights = snapshot(whole, 2, all_weights(whole.model))
        engine.update(weights, payloads_of(weights))
        gaps["weights"] = gap(engine, whole, 2)
    finally:
        engine.close()
    return gaps


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[bool, ProcessPoolExecutor]]:
    """Yield a process for mixtures of experts, and one for all others.

    vLLM sets up the group of the experts with a process's first engine only. And where it has no
    implementation of its own, it wraps transformers' classes for the rest of the process.
    """
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context) as mixtures,
        ProcessPoolExecutor(1, context) as others,
    ):
        yield {True: mixtures, False: others}


Measure = Callable[..., dict[str, float]]


@pytest.fixture
def measured(processes: dict[bool, ProcessPoolExecutor], tmp_path: Path) -> Measure:
    def run(model_type: str, **settings: Any) -> dict[str, float]:
        is_mixture = any("expert" in name for name in SETTINGS[model_type])
        return processes[is_mixture].submit(measure, model_type, tmp_path, **settings).result()

    return run


def check(model_type: str, measured: Measure) -> None:
    entry = ARCHITECTURES[model_type]
    if entry.refused:
        with pytest.raises(Exception):  # noqa: B017 (whatever fails first)
            assert max(measured(model_type).values()) < TOLERANCE
        return
    settings = {"sliding_window": MAX_LENGTH} if entry.whole_window else {}
    gaps = measured(model_type, **settings)
    assert all(difference < TOLERANCE for difference in gaps.values()), gaps


@pytest.mark.parametrize("model_type", OFTEN)
def test_learner_and_engine_agree(model_type: str, measured: Measure) -> None:
    check(model_type, measured)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REST)
def test_rest_of_the_table(model_type: str, measured: Measure) -> None:
    check(model_type, measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name, entry in ARCHITECTURES.items() if entry.whole_window]
)
def test_beyond_the_window_they_disagree(model_type: str, measured: Measure) -> None:
    with pytest.raises(Exception):  # noqa: B017
        assert max(measured(model_type, **WINDOW).values()) < TOLERANCE


def test_class_names_are_those_of_vllm_and_transformers() -> None:
    supported = set(ModelRegistry.get_supported_archs())
    assert supported & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == ENGINE_CLASSES
    assert set(SETTINGS) == set(ARCHITECTURES)
    for name, entry in ARCHITECTURES.items():
        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == entry.engine
        assert entry.refused or entry.engine in ENGINE_CLASSES
