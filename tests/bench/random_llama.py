"""Llama models of any size with random weights, and rows to train on; both follow from seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.config.schema import Packing
from rayhf.learner.packing import plan_micro_batches
from rayhf.types import Row, token_array

MICROS = 4
"""Approximate number of micro-batches in a step."""
SHARD = 2 << 30
"""Bytes of one weight file, and of host memory while it is written."""


@dataclass(frozen=True, kw_only=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    longest: int = 2048
    """Tokens of the longest row."""
    budget: int = 16384
    """Padded tokens of a micro-batch."""


def write_model(size: Size, directory: Path, *, seed: int, device: str) -> None:
    """Write a Llama in bfloat16 whose logits have about unit variance.

    Only one file's weights are in memory at a time.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayhf.weights.export import Weight, all_weights, split_into_buckets

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.longest,
        tie_word_embeddings=size.tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(seed)

    def random(weight: Weight) -> Any:
        values = torch.ones(weight.shape, dtype=torch.bfloat16, device=device)
        if len(weight.shape) > 1:  # the weights of norms stay 1
            values.normal_(std=size.hidden**-0.5, generator=generator)
        return values.cpu()

    config.save_pretrained(directory)
    shards = split_into_buckets(all_weights(model), limit_bytes=SHARD, itemsize=2)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {weight.name: random(weight) for weight in shard}, directory / file, {"format": "pt"}
        )
        file_of.update({weight.name: file for weight in shard})
    index = {"metadata": {}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of one word, for engines that get token ids only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)


def make_rows(size: Size, seed: int) -> list[Row]:
    """Return a step's rows: a quarter of each is prompt; lengths are uniform from a quarter of the
    longest to the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(
        size.longest // 4, size.longest + 1, MICROS * size.budget // (size.longest * 5 // 8)
    )

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, size.vocabulary, count).tolist())

    return [
        Row(
            prompt_id=str(i),
            sample=0,
            prompt_ids=token_array(ids(n // 4)),
            response_ids=token_array(ids(n - n // 4)),
        )
        for i, n in enumerate(lengths.tolist())
    ]


def micro_batches(rows: Sequence[Row], budget: int, *, packing: Packing = "off") -> list[list[Row]]:
    """Plan rows as the learner does on a single rank."""
    (packed,) = plan_micro_batches(
        [(row,) for row in rows], packing=packing, ranks=1, budget=budget
    )
    return [[rows[i] for i in micro] for micro in packed]
