"""What a campaign will need before anything is started: memory per process, bytes on disk, time per
round. Plain arithmetic.

In: a model's shape, from its config.json alone (no weights are read), and the config. Out: bytes.
Estimates are of the peak of one process in steady state, for dense decoders (llama, qwen, mistral
...); tests/bench/memory.py compares them with measurements.

H is the hidden size, I the MLP's, s the bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rayhf.config.schema import (
    CampaignConfig,
    Dtype,
    LearnerConfig,
    LoraConfig,
    ReferenceConfig,
    RolloutConfig,
    RunConfig,
)
from rayhf.errors import ConfigError
from rayhf.models.source import AS_DATA

GIB = 2**30
Device = Literal["cpu", "gpu"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}

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
"""Before any model. CPU: a process that has imported its engine, Ray and torch; the learner's is in
tests/bench/RESULTS.md. GPU: CUDA's context and workspaces, about 0.7 GiB, and NCCL's buffers or an
engine's CUDA graphs; not measured yet."""
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size and sub-group sizes end here (elements)."""
LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: gathered parameters that stage 3 keeps at a time."""
HEAP = 0.6
"""CPU: glibc keeps freed blocks below 32 MiB and fills them badly. Of activations; fitted to stage
0 (tests/bench/RESULTS.md)."""
HEAP_GATHERED = 1.05
"""The same where stage 3 gathers and frees parameters between them; fitted to stage 3."""
HEAP_ENGINE = 1.1
"""CPU: what oneDNN and malloc hold beside an engine's activations. Of those; fitted
(tests/bench/RESULTS.md)."""
LOGITS = 1 << 27
"""rayhf.models.forward.LOGITS_LIMIT; that file imports torch."""
CPU_CACHE = GIB / 4
"""rayhf.rollout.vllm_driver.CPU_KV_CACHE_GIB; that file imports vLLM."""
ENGINE_TOKENS = 16384
"""Of one step of an engine, whose activations are then as large as they get: vLLM's default on
large GPUs, and ours on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a dense decoder."""

    body: int
    """Parameters without the output head."""
    tied: bool
    """The output head is the embedding."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of every linear layer of the body: what LoRA adapts."""

    @property
    def parameters(self) -> int:
        """Of a language model."""
        return self.body + (0 if self.tied else self.vocabulary * self.hidden)

    def adapters(self, lora: LoraConfig) -> int:
        """Parameters of LoRA: A is rank x inputs, B is outputs x rank."""
        wanted = lora.target_modules
        adapted = [
            (a, b)
            for name, a, b in self.linears
            if wanted == "all-linear" or any(name.endswith(target) for target in wanted)
        ]
        return sum(lora.rank * (a + b) for a, b in adapted)

    def cache_per_token(self, dtype: Dtype) -> int:
        """Keys and values of one token in all layers, in bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    def layer(self, dtype: Dtype) -> float:
        """What one layer keeps of one token for its backward pass, in bytes; as transformers
        computes it, with SDPA.

        Each of two norms: its input and its normalized input (both float32 in bfloat16 models: the
        norm is computed so, and the normalized one again in bfloat16 for the product with the
        weight), and its output for the linear layers behind it: 3 H. Attention: rotated queries and
        keys, values, and the output, which the next linear layer reads; a log-sum-exp per head.
        MLP: gate, activation, up and their product, each for the operation that reads it: 4 I.
        """
        s, query, key = BYTES[dtype], self.heads * self.head_dim, self.kv_heads * self.head_dim
        norm = 3 * s * self.hidden if dtype == "float32" else (4 + 2 + 2) * self.hidden
        return 2 * norm + s * (2 * query + 2 * key + 4 * self.intermediate) + 4 * self.heads

    def passing(self, dtype: Dtype) -> float:
        """What one token needs while it passes through a layer, forward only or backward, in bytes:
        the residual and two tensors of its size, and three of the MLP's."""
        return BYTES[dtype] * (3 * self.hidden + 3 * self.intermediate)


def read_shape(model: Path, *, key: str) -> Shape:
    """From config.json, with parameters counted on a model without memory (torch's meta device).
    Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(model), **AS_DATA)
        with torch.device("meta"):
            body: Any = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{key}: {model}: no estimate from its config.json ({str(error).splitlines()[0]})"
        ) from None
    text = config.get_text_config()
    modules = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return Shape(
        body=sum(parameter.numel() for parameter in body.parameters()),
        tied=bool(text.tie_word_embeddings),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        linears=tuple((name, module.in_features, module.out_features) for name, module in modules),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one process at its peak, in bytes: on its GPU where it has one, else in RAM."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """Float32 masters and Adam's two moments."""
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    """Of DeepSpeed: gathered parameters, buckets, what a step copies. Of malloc: what it cannot use
    again."""
    cache: float = 0.0
    framework: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def logits_bytes(
    shape: Shape, dtype: Dtype, tokens: int, *, backward: bool, entropy: bool = False
) -> float:
    """Of the language-model head, which runs on at most LOGITS elements at a time
    (rayhf/models/forward.py).

    Forward: the logits, in bfloat16 also in float32, and one float32 tensor inside logsumexp; for
    the entropy two. Backward: the logits and their float32 gradient, in bfloat16 that gradient
    again in bfloat16 and the float32 logits.
    """
    elements = min(tokens * shape.vocabulary, max(LOGITS, shape.vocabulary))
    own = 4 if dtype == "float32" else 2 + 4
    forward = own + (8 if entropy else 4)
    back = 4 + 4 if dtype == "float32" else 2 + 4 + 4
    return float(elements * (max(forward, back) if backward else forward))


def learner_memory(
    shape: Shape,
    config: LearnerConfig,
    *,
    device: Device,
    critic: bool = False,
    lora: LoraConfig | None = None,
    entropy: bool = False,
) -> Memory:
    """One rank. The ZeRO arithmetic is Rajbhandari et al. 2020 (1910.02054), section 3, with what
    DeepSpeed 0.19 adds to it:

    stage 0     float32 only: gradients and moments whole, and the buckets in which gradients are
                added up over ranks
    stage 1     bfloat16: float32 gradients whole beside those of the backward pass
    stage 2     float32 gradients of this rank's part; in float32 a step copies them once more
    stage 3     parameters too are cut; LIVE of them are gathered at a time; a step copies a
                sub-group
    """
    n, s = config.ranks, BYTES[config.dtype]
    stage = max(1, config.zero_stage) if config.dtype == "bfloat16" else config.zero_stage
    parameters = shape.body + shape.hidden if critic else shape.parameters
    trained = shape.adapters(lora) if lora else parameters
    part = trained / n if stage else float(trained)
    weights = s * parameters / (n if stage == 3 else 1)
    masters = 0.0 if config.dtype == "float32" and stage in (0, 3) else 4 * part
    gradients = {0: 4.0 * trained, 1: (4.0 + s) * trained, 2: 4 * part, 3: 4 * part}[stage]
    optimizer = masters + 8 * part
    backward, step = _zero_buffers(parameters, trained, part, stage=stage, s=s, gpu=device == "gpu")
    if config.offload:
        optimizer, gradients, step = 0.0, s * min(trained, BUCKET), 0.0
    tokens = config.token_budget
    kept = shape.layer(config.dtype) * shape.layers
    if config.activation_checkpointing:
        kept = s * shape.hidden * shape.layers + shape.layer(config.dtype)
    ends = 5 * s * shape.hidden  # embedding, last norm, hidden states at the predicting positions
    activations = tokens * (kept + ends + shape.passing(config.dtype))
    logits = (
        0.0 if critic else logits_bytes(shape, config.dtype, tokens, backward=True, entropy=entropy)
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
    """What comes on top of activations and logits. A step begins when they are gone; on CPU only
    the logits really are, since malloc keeps what the activations leave behind, and what stage 3
    had gathered."""
    if device == "gpu":
        return max(backward, step - activations - logits)
    if stage == 3:
        return HEAP_GATHERED * activations + backward + step
    return HEAP * activations + max(backward, step - logits)


def _zero_buffers(
    parameters: int, trained: int, part: float, *, stage: int, s: int, gpu: bool
) -> tuple[float, float]:
    """DeepSpeed's own memory during the backward pass and during a step."""
    bucket = min(trained, BUCKET)
    if stage == 0:
        return 0.0, 4.0 * bucket
    if stage == 3:
        return s * (min(parameters, LIVE) + bucket), 4 * min(part, LIVE)
    staged = (
        s * bucket * (2 if gpu else 1)
    )  # two buckets where reduction overlaps the backward pass
    return staged, 4 * part if s == 4 else 0.0


def host_memory(shape: Shape, config: LearnerConfig, *, lora: LoraConfig | None = None) -> float:
    """Of one rank with learner.offload, in RAM: masters, moments and float32 gradients of its part,
    and a bfloat16 copy."""
    trained = shape.adapters(lora) if lora else shape.parameters
    return (12 + 4 + 2) * trained / config.ranks if config.offload else 0.0


def reference_memory(
    shape: Shape, config: ReferenceConfig, *, dtype: Dtype, device: Device
) -> Memory:
    tokens = config.token_budget
    return Memory(
        weights=BYTES[dtype] * shape.parameters,
        activations=tokens * (shape.passing(dtype) + 5 * BYTES[dtype] * shape.hidden),
        logits=logits_bytes(shape, dtype, tokens, backward=False),
        framework=FRAMEWORK[device]["reference"],
    )


def classifier_memory(shape: Shape, tokens: int, *, dtype: Dtype) -> Memory:
    """A reward or preference model, without the framework: one process may hold several."""
    return Memory(weights=BYTES[dtype] * shape.body, activations=tokens * shape.passing(dtype))


def engine_memory(
    shape: Shape,
    config: RolloutConfig,
    *,
    dtype: Dtype,
    device: Device,
    gpu_bytes: float | None = None,
) -> Memory:
    """A vLLM engine, on each of its GPUs.

    Without kv_cache_gib the cache gets what memory_fraction of a GPU leaves (0 here where
    `gpu_bytes` is not known): vLLM measures, and so an engine fits by itself or refuses to start. A
    step's activations and the sampler's float32 logits (three of a batch's size) come off first.
    """
    weights = BYTES[dtype] * shape.parameters / config.tensor_parallel
    activations = ENGINE_TOKENS * shape.passing(dtype) / config.tensor_parallel
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
    """How many sequences of `length` tokens an engine can hold at once. Below 1 vLLM refuses to
    start."""
    return max(0.0, cache) * tensor_parallel / (shape.cache_per_token(dtype) * length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What a run directory takes, in bytes."""

    checkpoint: float
    """One."""
    kept: int
    """How many checkpoints stay at most."""
    policies: float
    """The exported models."""
    samples: float
    """Of one round, before compression: an upper bound."""
    rounds: int
    """Whose samples are kept, and those in the journal, which waits for the next checkpoint."""

    @property
    def total(self) -> float:
        """At most, at one moment: while a checkpoint and the exported models are being replaced."""
        return (self.kept + 1) * self.checkpoint + 2 * self.policies + self.samples * self.rounds


def disk(
    run: RunConfig,
    *,
    trained: Sequence[int],
    reference: float,
    exported: float,
    responses: int,
    tokens: int,
    length: int,
) -> Disk:
    """`trained`: parameters of each learner; a checkpoint has 12 bytes for each, float32 weights
    and two moments.

    `reference` and `exported` are bytes; `responses` of a round have at most `tokens`, with their
    prompt at most `length`.
    """
    every = run.checkpoint_every or run.iterations
    written = math.ceil(run.iterations / every)
    kept = (
        run.keep_checkpoints
        + (run.iterations // math.lcm(every, run.keep_every) if run.keep_every else 0)
        + run.keep_best
    )
    # A token of a response is an id, a log-prob and some characters of text; of its prompt an id.
    # Training examples again.
    per_response = 2 * (12 * tokens + 4 * (length - tokens)) + 200
    return Disk(
        checkpoint=12.0 * sum(trained) + reference,
        kept=min(kept, written),
        policies=exported,
        samples=float(responses * per_response),
        rounds=run.iterations + min(every, run.iterations),
    )


def seconds_per_round(
    config: CampaignConfig, *, responses: int, writes: float | None, learns: float | None
) -> dict[str, float]:
    """At most, were every response as long as it may be and trained on: of writing and of learning,
    where a rate is known.

    `writes`: tokens per second of one engine; `learns`: of one learner rank. Scoring, reference and
    sync come on top.
    """
    tokens = responses * config.rollout.max_tokens
    seconds = {}
    if writes:
        seconds["rollout"] = tokens / (config.rollout.engines * writes)
    if learns:
        seconds["learner"] = tokens * config.learner.epochs / (config.learner.ranks * learns)
    return seconds
