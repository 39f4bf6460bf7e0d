"""Estimates of each process's peak memory, before anything is started.

In: a model's shape and the config. Out: bytes. The estimates are of one process in steady state,
for dense decoders; tests/bench/memory.py compares them with measurements, and its results are in
tests/bench/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from rayhf.config.schema import (
    Dtype,
    LearnerConfig,
    LoraConfig,
    ReferenceConfig,
    RolloutConfig,
)
from rayhf.planning.shape import BYTES, Shape

GIB = 2**30
Device = Literal["cpu", "gpu"]

FRAMEWORK: dict[Device, dict[str, float]] = {
    "cpu": {
        "rollout": 0.75 * GIB,
        "learner": 0.6 * GIB,
        "reference": 0.45 * GIB,
        "scorer": 0.45 * GIB,
    },
    "gpu": {
        "rollout": 1.5 * GIB,
        "learner": 1.5 * GIB,
        "reference": 0.75 * GIB,
        "scorer": 0.75 * GIB,
    },
}
"""Memory of a process before any model is loaded.

CPU: its engine, Ray and torch, imported; the learner's was measured. GPU: CUDA's context and
workspaces, about 0.7 GiB, and NCCL's buffers or an engine's CUDA graphs; not measured.
"""
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits: one float32 scale for 64 of them."""
BUCKET = 500_000_000
"""Maximum elements of DeepSpeed's reduce_bucket_size and sub_group_size here."""
LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: gathered parameters that stage 3 keeps at a time."""
HEAP = 0.6
"""CPU: memory that glibc keeps after freeing, as a share of the activations; fitted to stage 0.

Blocks below 32 MiB are not returned to the system, and are filled badly again.
"""
HEAP_GATHERED = 1.05
"""The same where stage 3 gathers and frees parameters between activations; fitted to stage 3."""
HEAP_ENGINE = 1.1
"""CPU: memory that oneDNN and malloc hold, as a share of an engine's activations; fitted."""
LOGITS = 1 << 27
"""Elements of rayhf.models.forward.LOGITS_LIMIT; that file imports torch."""
CPU_CACHE = GIB / 4
"""Bytes of rayhf.rollout.vllm_build.CPU_KV_CACHE_GIB; that file imports vLLM."""
ENGINE_TOKENS = 16384
"""Maximum tokens of one engine step: vLLM's default on large GPUs, and ours on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process at its peak: on its GPU where it has one, else in RAM."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """Float32 masters and Adam's two moments."""
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    """DeepSpeed's gathered parameters, buckets and copies; memory that malloc cannot reuse."""
    cache: float = 0.0
    framework: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def logits_bytes(
    shape: Shape,
    dtype: Dtype,
    tokens: int,
    *,
    backward: bool,
    entropy: bool = False,
    scaled: bool = False,
    trained: bool = False,
) -> float:
    """Return the bytes of the language-model head, which computes LOGITS elements at a time.

    Forward: the logits, in bfloat16 also in float32 (so they are in float32 where they are `scaled`
    by a temperature), and one float32 tensor inside logsumexp; for the entropy two. Backward: the
    logits and their float32 gradient, in bfloat16 that gradient again in bfloat16. Where a
    `trained` head runs in pieces, the gradient of its weights from one piece, and their sum.
    """
    elements = min(tokens * shape.vocabulary, max(LOGITS, shape.vocabulary))
    own = 4 * (1 + scaled) if dtype == "float32" else 2 + 4
    forward = own + (8 if entropy else 4)
    back = 4 + 4 if dtype == "float32" else 2 + 4 + 4
    weights = 2 * BYTES[dtype] * shape.vocabulary * shape.hidden
    pieces = trained and tokens * shape.vocabulary > LOGITS
    return float(
        elements * (max(forward, back) if backward else forward) + (weights if pieces else 0)
    )


def learner_memory(
    shape: Shape,
    config: LearnerConfig,
    *,
    device: Device,
    critic: bool = False,
    lora: LoraConfig | None = None,
    entropy: bool = False,
    scaled: bool = False,
) -> Memory:
    """Return the memory of one learner rank; `scaled`: at a temperature that is not 1.

    The ZeRO arithmetic is Rajbhandari et al. 2020 (1910.02054), section 3, with what DeepSpeed 0.19
    adds to it:

    stage 0     float32 only: all gradients and moments, and the buckets in which gradients are
                added up over ranks stage 1     bfloat16: all gradients in float32 beside those of
                the backward pass stage 2     float32 gradients of this rank's part; in float32 a
                step copies them once more stage 3     parameters are sharded too; LIVE of them are
                gathered at a time; a step copies a sub-group
    """
    n = config.ranks
    s = BYTES[config.dtype]
    stage = max(1, config.zero_stage) if config.dtype == "bfloat16" else config.zero_stage
    parameters = shape.body + shape.hidden if critic else shape.parameters
    trained = shape.adapters(lora) if lora else parameters
    part = trained / n if stage else float(trained)
    quantized = shape.linear_weights if lora and lora.quantize else 0
    weights = (s * (parameters - quantized) + NF4_BYTES * quantized) / (n if stage == 3 else 1)
    masters = 0.0 if config.dtype == "float32" and stage in (0, 3) else 4 * part
    gradients = {0: 4.0 * trained, 1: (4.0 + s) * trained, 2: 4 * part, 3: 4 * part}[stage]
    optimizer = masters + 8 * part
    backward, step = _zero_buffers(parameters, trained, part, stage=stage, s=s, gpu=device == "gpu")
    if config.offload:
        optimizer = 0.0
        gradients = s * min(trained, BUCKET)
        step = 0.0
    tokens = config.token_budget
    kept = shape.kept_per_token(config.dtype) * shape.layers
    if config.activation_checkpointing:
        kept = s * shape.hidden * shape.layers + shape.kept_per_token(config.dtype)
    ends = 5 * s * shape.hidden  # embedding, last norm, hidden states at the predicting positions
    activations = tokens * (kept + ends + shape.transient_per_token(config.dtype))
    logits = (
        0.0
        if critic
        else logits_bytes(
            shape,
            config.dtype,
            tokens,
            backward=True,
            entropy=entropy,
            scaled=scaled,
            trained=lora is None,
        )
    )
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        buffers=_buffers(backward, step, activations, logits, stage=stage, device=device),
        framework=FRAMEWORK[device]["learner"],
    )


def _buffers(
    backward: float, step: float, activations: float, logits: float, *, stage: int, device: Device
) -> float:
    """Return what comes on top of activations and logits.

    A step begins when they are freed. On CPU only the logits really are: malloc keeps the memory of
    the activations, and of what stage 3 had gathered.
    """
    if device == "gpu":
        return max(backward, step - activations - logits)
    if stage == 3:
        return HEAP_GATHERED * activations + backward + step
    return HEAP * activations + max(backward, step - logits)


def _zero_buffers(
    parameters: int, trained: int, part: float, *, stage: int, s: int, gpu: bool
) -> tuple[float, float]:
    """Return DeepSpeed's own memory during the backward pass, and during a step."""
    bucket = min(trained, BUCKET)
    if stage == 0:
        return 0.0, 4.0 * bucket
    if stage == 3:
        return s * (min(parameters, LIVE) + bucket), 4 * min(part, LIVE)
    staged = 2 if gpu else 1  # two buckets where reduction overlaps the backward pass
    return s * bucket * staged, 4 * part if s == 4 else 0.0


def reference_memory(
    shape: Shape,
    config: ReferenceConfig,
    *,
    dtype: Dtype,
    device: Device,
    scaled: bool = False,
    averages: bool = False,
    past: bool = False,
) -> Memory:
    """Return the memory of a replica, or of a rank, of the reference.

    scaled: at a temperature that is not 1. averages: with a moving average, which is in host
    memory in float32. past: with a past policy beside it.
    """
    tokens = config.token_budget
    sharded = config.ranks > 1
    activations = tokens * (shape.transient_per_token(dtype) + 5 * BYTES[dtype] * shape.hidden)
    buffers = 4.0 * shape.parameters if averages and device == "cpu" else 0.0
    if past:
        buffers += BYTES[dtype] * shape.parameters
    if sharded:
        buffers += BYTES[dtype] * min(shape.parameters, LIVE)
        buffers += HEAP_GATHERED * activations if device == "cpu" else 0.0
    return Memory(
        weights=BYTES[dtype] * shape.parameters / config.ranks,
        activations=activations,
        logits=logits_bytes(shape, dtype, tokens, backward=False, scaled=scaled),
        buffers=buffers,
        framework=FRAMEWORK[device]["learner" if sharded else "reference"],
    )


def classifier_memory(shape: Shape, tokens: int, *, dtype: Dtype) -> Memory:
    """Return a reward or preference model's, without the framework: processes hold several."""
    return Memory(
        weights=BYTES[dtype] * shape.body, activations=tokens * shape.transient_per_token(dtype)
    )


def engine_memory(
    shape: Shape,
    config: RolloutConfig,
    *,
    dtype: Dtype,
    device: Device,
    gpu_bytes: float | None = None,
) -> Memory:
    """Return the memory of a vLLM engine on each of its GPUs.

    Without kv_cache_gib the cache gets what memory_fraction of a GPU leaves (0 here where
    `gpu_bytes` is unknown): vLLM measures it, so an engine fits by itself or refuses to start. The
    activations of a step and the sampler's float32 logits (three times a batch's) come off first.
    """
    weights = BYTES[dtype] * shape.parameters / config.tensor_parallel
    activations = ENGINE_TOKENS * shape.transient_per_token(dtype) / config.tensor_parallel
    logits = 3 * 4.0 * config.max_num_seqs * shape.vocabulary
    framework = FRAMEWORK[device]["rollout"]
    cache = 0.0
    if config.kv_cache_gib is not None:
        cache = config.kv_cache_gib * GIB
    elif device == "cpu":
        cache = CPU_CACHE
    elif gpu_bytes is not None:
        cache = config.memory_fraction * gpu_bytes - weights - activations - logits - framework
    buffers = HEAP_ENGINE * activations if device == "cpu" else 0.0
    return Memory(
        weights=weights,
        activations=activations,
        logits=logits,
        buffers=buffers,
        cache=cache,
        framework=framework,
    )


def sequences_in_cache(
    shape: Shape, cache: float, *, dtype: Dtype, length: int, tensor_parallel: int
) -> float:
    """Return how many sequences of `length` tokens an engine holds; vLLM needs at least 1."""
    return max(0.0, cache) * tensor_parallel / (shape.cache_per_token(dtype) * length)
