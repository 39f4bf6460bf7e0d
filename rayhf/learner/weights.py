"""The learner's weights on their way out: whole parameters under their Hugging Face names, LoRA merged, bucket by bucket.

Every rank walks the buckets in lockstep, since ZeRO-3 gathers each parameter from all of them; only rank 0 sees tensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayhf.learner.forward import base_model

SHARD_BYTES = 4 << 30
"""Largest file of an exported model."""

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)
"""What belongs to a model directory besides weights and config.json."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the model as the outside knows it."""

    name: str
    parameter: nn.Parameter
    adapted: Any = None
    """The PEFT layer whose adapter belongs to this parameter."""

    @property
    def needs(self) -> list[nn.Parameter]:
        """Parameters that must be whole before `merged` is called."""
        return [self.parameter] if self.adapted is None else list(self.adapted.parameters())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    def numel(self) -> int:
        return math.prod(self.shape)

    def merged(self) -> Tensor:
        """The parameter, plus its adapter's low-rank product (summed in float32)."""
        weight: Tensor = self.parameter.detach()
        if self.adapted is None:
            return weight
        delta = sum(self.adapted.get_delta_weight(name).detach().float() for name in self.adapted.active_adapters)
        merged: Tensor = (weight.float() + delta).to(weight.dtype)
        return merged


def weights_of(model: nn.Module) -> list[Weight]:
    """All parameters in the model's order. A tied head is not there: it is the embedding."""
    base = base_model(model)
    adapted = {id(layer.base_layer.weight): layer for layer in base.modules() if hasattr(layer, "get_delta_weight")}
    return [
        Weight(name.replace(".base_layer.", "."), parameter, adapted.get(id(parameter)))
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    ]


def buckets_of(weights: Sequence[Weight], *, limit_bytes: int, itemsize: int) -> list[list[Weight]]:
    """Cut the weights, in order, into buckets of at most `limit_bytes` (or one weight)."""
    buckets: list[list[Weight]] = []
    size = 0
    for weight in weights:
        need = weight.numel() * itemsize
        if not buckets or size + need > limit_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += need
    return buckets


def gathered(buckets: Sequence[Sequence[Weight]], *, sharded: bool, rank: int) -> Iterator[list[tuple[str, Tensor]]]:
    """For each bucket the whole tensors where `rank` is 0, nothing elsewhere; valid until the next bucket is asked for."""
    import deepspeed

    for bucket in buckets:
        needs = [parameter for weight in bucket for parameter in weight.needs]
        with deepspeed.zero.GatheredParameters(needs, enabled=sharded), torch.no_grad():
            yield [(weight.name, weight.merged()) for weight in bucket] if rank == 0 else []


def export_model(model: nn.Module, directory: Path, *, source: Path, sharded: bool, rank: int) -> None:
    """Write a Hugging Face model directory: safetensors, config and the source's tokenizer files. All ranks take part."""
    from safetensors.torch import save_file

    base: Any = base_model(model)
    buckets = buckets_of(weights_of(model), limit_bytes=SHARD_BYTES, itemsize=4)
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(gathered(buckets, sharded=sharded, rank=rank), start=1):
        if rank != 0:
            continue
        one = len(buckets) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(buckets):05d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, directory / file, {"format": "pt"})
        index.update({name: file for name, _ in tensors})
        size += sum(tensor.nbytes for _, tensor in tensors)
    if rank != 0:
        return
    if len(buckets) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    _write_config(base, directory, source)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def _write_config(base: Any, directory: Path, source: Path) -> None:
    """The source's config.json, changed only where the exported model differs from it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [type(base).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(base.dtype).removeprefix("torch.")
    if type(base).__name__.endswith("ForSequenceClassification"):
        labels = ["SCORE"] if base.num_labels == 1 else [f"SCORE_{i}" for i in range(base.num_labels)]
        config.pop("num_labels", None)
        config["id2label"], config["label2id"] = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    elif hasattr(base, "score"):
        config["id2label"], config["label2id"] = {"0": "VALUE"}, {"VALUE": 0}
        config["classifier_dropout"] = 0.0
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
