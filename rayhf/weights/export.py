"""A training model's parameters for other components: whole, named as in a directory, LoRA merged.

In: a Hugging Face model, possibly inside PEFT and sharded by ZeRO-3. Out: bucket after bucket of
(name, tensor), of all parameters or of what LoRA trains only; or a model directory, and the adapter
by itself in PEFT's format.

Synchronization: all ranks walk the buckets in lockstep, since ZeRO-3 gathers each parameter from
all of them; only rank 0 gets tensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rayhf.errors import ConfigError
from rayhf.models.peft import base_model
from rayhf.models.quantized import dequantize
from rayhf.models.weight_files import COMPANIONS
from rayhf.weights.deepspeed_internals import whole_shape
from rayhf.weights.lora import LORA_A, LORA_B, merge
from rayhf.weights.stored import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

FILE_BYTES = 4 << 30
"""Largest file of an exported model."""

ADAPTER = "adapter"
"""Directory with the adapter below an exported model."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One exported tensor: its name and shape, and how to compute it."""

    name: str
    """Name in a Hugging Face directory, with a suffix for a factor of an adapter."""
    shape: tuple[int, ...]
    parameters: list[Tensor]
    """Tensors that must be whole before `value` is called."""
    value: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Factor:
    """One of an adapter's two matrices, scaled and oriented as in the product B @ A."""

    parameter: nn.Parameter
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = whole_shape(self.parameter)
        return shape[::-1] if self.transposed else shape

    def value(self) -> Tensor:
        tensor = self.parameter.detach() * self.scale
        return tensor.T if self.transposed else tensor


def all_weights(model: nn.Module) -> list[Weight]:
    """Return all tensors of the model's directory in the model's order, adapters merged.

    A tied output head is not among them: it is the embedding. Buffers that a directory stores
    (the router bias of deepseek_v3) are.
    """
    return [
        Weight(
            stored.name,
            stored.shape,
            [tensor, *(factor.parameter for factor in factors)],
            partial(_merged_value, tensor, factors, stored),
        )
        for tensor, factors, parts in _tensors(model)
        for stored in parts
    ]


def trained_weights(model: nn.Module) -> list[Weight]:
    """Return what LoRA training changes: the adapters' factors, and parameters trained directly.

    Raises ConfigError for an adapter of a layer that the directory stores in parts.
    """
    weights: list[Weight] = []
    for tensor, factors, parts in _tensors(model):
        if not factors and tensor.requires_grad:
            weights += [
                Weight(
                    stored.name, stored.shape, [tensor], partial(_merged_value, tensor, (), stored)
                )
                for stored in parts
            ]
        if not factors:
            continue
        if len(parts) > 1:
            raise ConfigError(
                f"policy.lora.target_modules: the layer of {parts[0].name} is stored in "
                f"{len(parts)} parts, to which one adapter cannot be sent; leave it out"
            )
        for suffix, factor in zip((LORA_A, LORA_B), factors, strict=True):
            name = parts[0].name + suffix
            weights.append(Weight(name, factor.shape, [factor.parameter], factor.value))
    return weights


def _tensors(
    model: nn.Module,
) -> Iterator[tuple[Tensor, Sequence[_Factor], Sequence[StoredTensor]]]:
    """Yield every parameter and stored buffer of the base model.

    With it, its adapter's factors, and the tensors that a directory has of it.
    """
    base = base_model(model)
    adapted = {
        id(layer.base_layer.weight): layer for layer in base.modules() if hasattr(layer, "lora_A")
    }
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in [*base.named_parameters(), *_stored_buffers(base)]
        if ".lora_" not in name
    }
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    for name, parts in stored_tensors(base, shapes).items():
        layer = adapted.get(id(tensors[name]))
        yield tensors[name], () if layer is None else _factors(layer), parts


def _shape(tensor: Tensor) -> tuple[int, ...]:
    state = getattr(tensor, "quant_state", None)
    return whole_shape(tensor) if state is None else tuple(state.shape)


def _stored_buffers(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def _factors(layer: LoraLayer) -> Sequence[_Factor]:
    """Return the factors A and B of a PEFT layer.

    The layer adds scale * B @ A, or its transpose where it is an embedding or stores its weight
    transposed.
    """
    (name,) = layer.active_adapters
    is_linear = name in layer.lora_A
    a = layer.lora_A[name].weight if is_linear else layer.lora_embedding_A[name]
    b = layer.lora_B[name].weight if is_linear else layer.lora_embedding_B[name]
    transposed = not is_linear or bool(layer.fan_in_fan_out)
    first = _Factor(a, 1.0, transposed)
    second = _Factor(b, layer.scaling[name], transposed)
    return (second, first) if transposed else (first, second)


def _merged_value(tensor: Tensor, factors: Sequence[_Factor], stored: StoredTensor) -> Tensor:
    weight = dequantize(tensor)
    if factors:
        weight = merge(weight, *(factor.value() for factor in factors))
    return stored.of(weight)


def split_into_buckets(
    weights: Sequence[Weight], *, limit_bytes: int, itemsize: int
) -> list[list[Weight]]:
    """Split the weights, in order, into buckets of at most `limit_bytes`, or of one weight."""
    buckets: list[list[Weight]] = []
    size = 0
    for weight in weights:
        nbytes = weight.numel() * itemsize
        if not buckets or size + nbytes > limit_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += nbytes
    return buckets


def gather_buckets(
    buckets: Sequence[Sequence[Weight]], *, sharded: bool, rank: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield each bucket's whole tensors where `rank` is 0, and an empty list elsewhere.

    Tensors are valid until the next bucket is requested.
    """
    for bucket in buckets:
        with whole_weights(bucket, sharded=sharded), torch.no_grad():
            yield [(weight.name, weight.value()) for weight in bucket] if rank == 0 else []


@contextmanager
def whole_weights(
    weights: Iterable[Weight], *, sharded: bool, changed: bool = False
) -> Iterator[None]:
    """Make weights whole on every rank for as long as the block runs.

    `changed`: rank 0 writes into them in the block, and all ranks have its values afterwards.
    """
    if not sharded:
        yield
        return
    import deepspeed

    # Several stored tensors may be views into one parameter.
    tensors = list(dict.fromkeys(tensor for weight in weights for tensor in weight.parameters))
    with deepspeed.zero.GatheredParameters(tensors, modifier_rank=0 if changed else None):
        yield
    for tensor in tensors:
        if changed and not hasattr(tensor, "ds_id"):  # a buffer, which is not sharded
            torch.distributed.broadcast(tensor, 0)


def export_model(
    model: nn.Module, directory: Path, *, source: Path, sharded: bool, rank: int
) -> None:
    """Write a Hugging Face model directory: safetensors, config and the source's tokenizer files.

    LoRA is merged, and written to the directory `adapter` too where nothing else was trained. All
    ranks take part; rank 0 writes.
    """
    from safetensors.torch import save_file

    base = base_model(model)
    buckets = split_into_buckets(all_weights(model), limit_bytes=FILE_BYTES, itemsize=4)
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained and all(".lora_" in name for name in trained):
        _export_adapter(model, directory / ADAPTER, sharded=sharded, rank=rank)
    files: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(gather_buckets(buckets, sharded=sharded, rank=rank), start=1):
        if rank != 0:
            continue
        file = (
            "model.safetensors"
            if len(buckets) == 1
            else f"model-{number:05d}-of-{len(buckets):05d}.safetensors"
        )
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors},
            directory / file,
            {"format": "pt"},
        )
        files.update({name: file for name, _ in tensors})
        size += sum(tensor.nbytes for _, tensor in tensors)
    if rank != 0:
        return
    if len(buckets) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )
    _write_config(base, directory, source)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def _export_adapter(model: nn.Module, directory: Path, *, sharded: bool, rank: int) -> None:
    """Write a PEFT adapter directory. All ranks take part; rank 0 writes."""
    import deepspeed
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with deepspeed.zero.GatheredParameters([*factors.values()], enabled=sharded), torch.no_grad():
        if rank != 0:
            return
        # save_embedding_layers "auto" would look the base model up on the hub.
        tensors = get_peft_model_state_dict(
            model,
            state_dict={name: p.detach().cpu().contiguous() for name, p in factors.items()},
            save_embedding_layers=False,
        )
        directory.mkdir()
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (settings,) = cast(Any, model).peft_config.values()
    settings.save_pretrained(str(directory))


def _write_config(base: PreTrainedModel, directory: Path, source: Path) -> None:
    """Write the source's config.json, changed only where the exported model differs from it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [type(base).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(base.dtype).removeprefix("torch.")
    if type(base).__name__.endswith("ForSequenceClassification"):
        labels = (
            ["SCORE"] if base.num_labels == 1 else [f"SCORE_{i}" for i in range(base.num_labels)]
        )
        config.pop("num_labels", None)
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    elif hasattr(base, "score"):
        config["id2label"] = {"0": "VALUE"}
        config["label2id"] = {"VALUE": 0}
        config["classifier_dropout"] = 0.0
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
