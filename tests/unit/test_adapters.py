"""LoRA weight sync: an engine merges to the learner's bits, and PEFT agrees."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from rayhf.errors import WeightSyncError
from rayhf.weights.buckets import checkpoint_shapes, pack_bucket, unpack_bucket
from rayhf.weights.export import all_weights, split_into_buckets, trained_weights
from rayhf.weights.lora import (
    LORA_A,
    LORA_B,
    check_adapters,
    is_factor,
    merge,
    merge_with_directory,
)

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"intermediate_size": 40, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "qwen2": (
        "Qwen2",
        {"intermediate_size": 40, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2", {}),
}


def adapted(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """Return a model with adapters that differs from the directory it was loaded from."""
    torch.manual_seed(0)
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        directory, max_shard_size="20KB"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **lora}), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sync(
    directory: Path, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Pack, check, unpack and merge as learner and engine do."""
    weights = trained_weights(model)
    dtype = next(model.parameters()).dtype
    cut = split_into_buckets(weights, limit_bytes=300, itemsize=dtype.itemsize)
    buckets = [
        pack_bucket([(weight.name, weight.value()) for weight in bucket], dtype) for bucket in cut
    ]
    assert len(buckets) > 1 and [spec.shape for bucket in buckets for spec in bucket.tensors] == [
        w.shape for w in weights
    ]
    check_adapters(shapes, buckets)
    sent = {
        name: tensor for bucket in buckets for name, tensor in unpack_bucket(bucket, bucket.payload)
    }
    whole = {name: tensor for name, tensor in sent.items() if not is_factor(name)}
    factors = {name: tensor for name, tensor in sent.items() if is_factor(name)}
    return whole | dict(
        merge_with_directory(directory, shapes.keys() - whole.keys(), factors, device=CPU)
    )


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "up_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["v_proj"]}),
        ("qwen2", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": ["k_proj"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_the_directory_give_the_learners_weights(
    tmp_path: Path, kind: str, lora: dict[str, Any], dtype: torch.dtype
) -> None:
    model = adapted(tmp_path, kind, dtype=dtype, **lora)
    shapes = checkpoint_shapes(tmp_path, tied=kind != "llama")
    received = sync(tmp_path, model, shapes)
    sent = {weight.name: weight.value() for weight in all_weights(model)}
    assert received.keys() == sent.keys() == shapes.keys()
    for name, tensor in sent.items():
        assert torch.equal(received[name], tensor) and received[name].dtype == dtype
    # PEFT's own arithmetic, which rounds in between.
    by_peft = dict(model.merge_and_unload().named_parameters())
    gap = max(float((sent[name] - by_peft[name]).abs().max()) for name in sent)
    assert gap < (1e-6 if dtype == torch.float32 else 1e-2)
    start = {weight.name: weight.value() for weight in all_weights(load(tmp_path, dtype))}
    moved = {name for name in sent if not torch.equal(start[name], sent[name])}
    assert moved and (lora["target_modules"] != "all-linear" or len(moved) == 14)


def load(directory: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def test_only_adapters_are_sent(tmp_path: Path) -> None:
    model = adapted(tmp_path, "llama", target_modules=["q_proj"])
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert [weight.name for weight in trained_weights(model)] == [
        name + factor for name in names for factor in (LORA_A, LORA_B)
    ]


def test_number_of_threads_does_not_change_a_bit() -> None:
    """Runs in a new process: one that ran an engine cannot change its number of threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(merge_with, (1, 2, 4)))
    assert all(np.array_equal(result, results[0]) for result in results)
    base, a, b = base_and_factors()
    torch.testing.assert_close(torch.from_numpy(results[0]), base + b @ a)


def base_and_factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(97, 33), torch.randn(16, 33), torch.randn(97, 16)


def merge_with(threads: int) -> np.ndarray:
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    return merge(*base_and_factors()).numpy()


EXPECTED = {"v": (3,), "w": (4, 5)}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            {"w" + LORA_A: (2, 5)},
            r"adapter of w: factors of shapes none and \(2, 5\) have no product",
        ),
        (
            {"w" + LORA_A: (2, 5), "w" + LORA_B: (4, 3)},
            r"adapter of w: factors of shapes \(4, 3\) and \(2, 5\) have no product",
        ),
        (
            {"w" + LORA_A: (2, 4), "w" + LORA_B: (5, 2)},
            r"w was sent with shape \(5, 4\), the model has \(4, 5\)",
        ),
        (
            {"u" + LORA_A: (2, 5), "u" + LORA_B: (4, 2)},
            r"u was sent with shape \(4, 5\), the model has None",
        ),
        (
            {"w" + LORA_A: (2, 5), "w" + LORA_B: (4, 2), "v": (4,)},
            r"v was sent with shape \(4,\), the model has \(3,\)",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    sent: dict[str, tuple[int, ...]], message: str
) -> None:
    good = pack_bucket(
        [
            ("w" + LORA_A, torch.zeros(2, 5)),
            ("w" + LORA_B, torch.zeros(4, 2)),
            ("v", torch.zeros(3)),
        ],
        torch.float32,
    )
    check_adapters(EXPECTED, [good])
    bucket = pack_bucket(
        [(name, torch.zeros(shape)) for name, shape in sent.items()], torch.float32
    )
    with pytest.raises(WeightSyncError, match=message):
        check_adapters(EXPECTED, [bucket])
    with pytest.raises(WeightSyncError, match="was sent twice"):
        check_adapters(EXPECTED, [bucket, bucket])
