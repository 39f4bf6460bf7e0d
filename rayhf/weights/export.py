"""The learner's weights on their way out, bucket by bucket: whole parameters under their Hugging
Face names, LoRA merged; or only what LoRA trains, for those who have the rest.

Every rank walks the buckets in lockstep, since ZeRO-3 gathers each parameter from all of them; only
rank 0 sees tensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayhf.learner.forward import base_model
from rayhf.weights.lora import A, B, merged

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
    """One tensor as the outside knows it."""

    name: str
    shape: tuple[int, ...]
    needs: list[nn.Parameter]
    """Parameters that must be whole before `value` is called."""
    value: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Factor:
    """One of an adapter's two matrices, as it takes part in the product."""

    parameter: nn.Parameter
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = _shape(self.parameter)
        return shape[::-1] if self.transposed else shape

    def value(self) -> Tensor:
        tensor = self.parameter.detach() * self.scale
        return tensor.T if self.transposed else tensor


def weights_of(model: nn.Module) -> list[Weight]:
    """All parameters in the model's order, adapters merged. A tied head is not there: it is the
    embedding."""
    return [
        Weight(
            name,
            _shape(parameter),
            [parameter, *(factor.parameter for factor in factors)],
            partial(_value, parameter, factors),
        )
        for name, parameter, factors in _parameters(model)
    ]


def trained_of(model: nn.Module) -> list[Weight]:
    """What training changes: both factors of each adapter, and parameters that are trained
    themselves."""
    weights: list[Weight] = []
    for name, parameter, factors in _parameters(model):
        if not factors and parameter.requires_grad:
            weights.append(Weight(name, _shape(parameter), [parameter], parameter.detach))
        for suffix, factor in zip((A, B), factors, strict=False):
            weights.append(Weight(name + suffix, factor.shape, [factor.parameter], factor.value))
    return weights


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Sequence[_Factor]]]:
    """Every parameter of the model as it was before it got adapters, and the factors A and B of its
    own."""
    base = base_model(model)
    adapted = {
        id(layer.base_layer.weight): layer for layer in base.modules() if hasattr(layer, "lora_A")
    }
    for name, parameter in base.named_parameters():
        if ".lora_" not in name:
            layer = adapted.get(id(parameter))
            yield (
                name.replace(".base_layer.", "."),
                parameter,
                () if layer is None else _factors(layer),
            )


def _factors(layer: Any) -> Sequence[_Factor]:
    """Of a PEFT layer: it adds scale * B @ A, or that transposed where it is an embedding or keeps
    its weight transposed."""
    (name,) = layer.active_adapters
    scale, plain = layer.scaling[name], name in layer.lora_A
    a = layer.lora_A[name].weight if plain else layer.lora_embedding_A[name]
    b = layer.lora_B[name].weight if plain else layer.lora_embedding_B[name]
    transposed = not plain or bool(layer.fan_in_fan_out)
    first, second = _Factor(a, 1.0, transposed), _Factor(b, scale, transposed)
    return (second, first) if transposed else (first, second)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Also of one that ZeRO-3 has cut."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _value(parameter: nn.Parameter, factors: Sequence[_Factor]) -> Tensor:
    weight: Tensor = parameter.detach()
    return merged(weight, *(factor.value() for factor in factors)) if factors else weight


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


def gathered(
    buckets: Sequence[Sequence[Weight]], *, sharded: bool, rank: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """For each bucket the whole tensors where `rank` is 0, nothing elsewhere; valid until the next
    bucket is asked for."""
    import deepspeed

    for bucket in buckets:
        needs = [parameter for weight in bucket for parameter in weight.needs]
        with deepspeed.zero.GatheredParameters(needs, enabled=sharded), torch.no_grad():
            yield [(weight.name, weight.value()) for weight in bucket] if rank == 0 else []


def export_model(
    model: nn.Module, directory: Path, *, source: Path, sharded: bool, rank: int
) -> None:
    """Write a Hugging Face model directory: safetensors, config and the source's tokenizer files.
    All ranks take part."""
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
        file = (
            "model.safetensors" if one else f"model-{number:05d}-of-{len(buckets):05d}.safetensors"
        )
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors},
            directory / file,
            {"format": "pt"},
        )
        index.update({name: file for name, _ in tensors})
        size += sum(tensor.nbytes for _, tensor in tensors)
    if rank != 0:
        return
    if len(buckets) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(content, indent=2), encoding="utf-8"
        )
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
        labels = (
            ["SCORE"] if base.num_labels == 1 else [f"SCORE_{i}" for i in range(base.num_labels)]
        )
        config.pop("num_labels", None)
        config["id2label"], config["label2id"] = (
            dict(enumerate(labels)),
            {label: i for i, label in enumerate(labels)},
        )
    elif hasattr(base, "score"):
        config["id2label"], config["label2id"] = {"0": "VALUE"}, {"VALUE": 0}
        config["classifier_dropout"] = 0.0
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
