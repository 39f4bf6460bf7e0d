"""Real engines over tiny models, and what transformers computes with the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayhf.rollout.env import engine_env

os.environ.update(engine_env("cpu", 1))

from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rayhf.config.schema import RolloutConfig
from rayhf.rollout.engine import RolloutEngine
from rayhf.types import Completion, GenerateRequest, Probe, Sampling, WeightBucket, WeightSnapshot
from rayhf.weights.buckets import pack_bucket, snapshot_checksum

WORDS = ["<pad>", "<end>", "<turn>", *"abcdefghijklmnopqrstuvwxyz"]
END, TURN = 1, 2
LONG = tuple(3 + i * 7 % 26 for i in range(141))
"""Longer than a KV block of 128 tokens, so that a second request finds it in the prefix cache."""
MAX_LENGTH = 256


def make_model(
    directory: Path, *, tied: bool, dtype: torch.dtype = torch.float32
) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=END,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    # Like a chat model: the tokenizer names one end token, the generation config a second one.
    model.generation_config = GenerationConfig(eos_token_id=[END, TURN])
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.decoder = decoders.Fuse()
    special = {"additional_special_tokens": ["<turn>"]}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", **special
    ).save_pretrained(directory)


def perturb(model: Qwen2ForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logprobs_of(
    model: Qwen2ForCausalLM, token_ids: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    """Return the log-probs of every next token, shape (len(token_ids) - 1, vocabulary)."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1)


def snapshot_of(model: Qwen2ForCausalLM, version: int, *, buckets: int = 3) -> WeightSnapshot:
    named = list(model.named_parameters())
    size = -(-len(named) // buckets)
    packed = tuple(
        pack_bucket(named[i : i + size], model.dtype) for i in range(0, len(named), size)
    )
    ids = LONG[:40]
    chosen = logprobs_of(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    probe = Probe(token_ids=ids, logprobs=tuple(chosen.tolist()))
    return WeightSnapshot(
        version=version, buckets=packed, checksum=snapshot_checksum(packed), probe=probe
    )


def payloads_of(snapshot: WeightSnapshot) -> list[np.ndarray]:
    """Return read-only arrays, as a transport delivers them."""
    payloads = [bucket.payload.copy() for bucket in snapshot.buckets]
    for payload in payloads:
        payload.flags.writeable = False
    return payloads


def make_request(
    token_ids: tuple[int, ...] = (5, 6, 7),
    *,
    seeds: tuple[int, ...] = (1, 2, 3, 4),
    number: int = 0,
    **sampling: object,
) -> GenerateRequest:
    settings = Sampling(**({"max_tokens": 24} | sampling))  # type: ignore[arg-type]
    return GenerateRequest(
        prompt_id="p", number=number, token_ids=token_ids, sampling=settings, seeds=seeds
    )


def mean_gap(
    model: Qwen2ForCausalLM, request: GenerateRequest, completions: tuple[Completion, ...]
) -> float:
    gaps = []
    for completion in completions:
        logp = logprobs_of(
            model, (*request.token_ids, *completion.token_ids), request.sampling.temperature
        )
        logp = logp[len(request.token_ids) - 1 :].gather(
            1, torch.tensor(completion.token_ids.tolist())[:, None]
        )[:, 0]
        gaps += (logp - torch.tensor(completion.logprobs.tolist())).abs().tolist()
    return float(np.mean(gaps))


Start = Callable[..., tuple[RolloutEngine, Qwen2ForCausalLM]]


def build(
    directory: Path,
    *,
    tied: bool,
    dtype: str,
    tensor_parallel: int = 1,
    scaled_logprobs: bool = False,
    isolates_waves: bool = False,
    **rollout: Any,
) -> tuple[RolloutEngine, Qwen2ForCausalLM]:
    model = make_model(directory, tied=tied, dtype=getattr(torch, dtype))
    config = RolloutConfig(
        max_num_seqs=192,
        kv_cache_gib=0.05,
        mismatch_limit=0.2,
        tensor_parallel=tensor_parallel,
        **rollout,
    )
    engine = RolloutEngine(
        directory,
        config,
        dtype=dtype,  # type: ignore[arg-type]
        max_length=MAX_LENGTH,
        seed=0,
        device="cpu",
        scaled_logprobs=scaled_logprobs,
        isolates_waves=isolates_waves,
    )
    return engine, model


def rebuilt(
    buckets: tuple[WeightBucket, ...], snapshot: WeightSnapshot
) -> tuple[WeightSnapshot, list[np.ndarray]]:
    changed = replace(snapshot, buckets=buckets, checksum=snapshot_checksum(buckets))
    return changed, payloads_of(changed)


def without_one(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    first, *others = snapshot.buckets
    return rebuilt((replace(first, tensors=first.tensors[1:]), *others), snapshot)
