"""DeepSpeed's internals that rayhf relies on, all in this file; read from deepspeed 0.19.

In: an engine. Out: the part of it that rayhf calls (`DeepSpeedEngine`), the float32 masters of the
trained parameters at every ZeRO stage and on which rank they are, the storages of all its tensors,
and settings that DeepSpeed offers no argument for. tests/integration/test_learner_internals.py
fails where another version of DeepSpeed behaves differently.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayhf.models.forward import Entropy, HeadOutput, Inputs


class DeepSpeedEngine(Protocol):
    """What rayhf uses of a deepspeed.DeepSpeedEngine around one of its heads."""

    module: nn.Module
    optimizer: Any
    """DeepSpeed's wrapper, of another class at each ZeRO stage; at stage 0 torch's optimizer."""
    basic_optimizer: torch.optim.Optimizer
    """torch's optimizer, which steps this rank's masters."""
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    device: torch.device
    global_steps: int
    skipped_steps: int

    def __call__(
        self, inputs: Inputs, temperature: float, entropy: Entropy = "off", top_k: int = 0
    ) -> HeadOutput: ...

    def train(self) -> object: ...

    def eval(self) -> object: ...

    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def get_lr(self) -> list[float]: ...

    def get_global_grad_norm(self) -> float | None: ...

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]: ...

    def zero_optimization_stage(self) -> int: ...

    def destroy(self) -> None: ...


# --------------------------------------------------------------------------------- start and step


def skip_shm_build() -> None:
    """Stop init_distributed from compiling its C++ shared-memory collectives, which takes 30 s."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_default_timeout(timeout_s: float) -> None:
    """Limit the collectives of every process group that is created from now on.

    DeepSpeed passes its timeout to the world group only; its sub-groups get torch's default.
    """
    import torch.distributed.distributed_c10d as c10d

    timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def step_was_skipped(engine: DeepSpeedEngine) -> bool:
    """Return whether ZeRO skipped the last step because the gradient norm was not finite."""
    return bool(engine.optimizer.overflow)


# ------------------------------------------------------------------------------- parameter shards


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape; ZeRO-3 leaves an empty tensor between uses and keeps it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """This rank's part of one parameter: elements first : first + numel of it, in row order."""

    flat: Tensor
    """The float32 tensor that the optimizer steps, and the key of its state."""
    start: int
    """Position in `flat` of the part's first element."""
    first: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of the part in `flat`, or in a moment, which has the same layout."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True, slots=True)
class TrainedParameter:
    """A parameter with a gradient."""

    name: str
    shape: tuple[int, ...]
    shard: ParameterShard | None
    """None on a rank that steps no element of the parameter."""

    def numel(self) -> int:
        return math.prod(self.shape)

    def range(self) -> tuple[int, int]:
        """Return the first element that this rank steps, and how many it steps."""
        return (self.shard.first, self.shard.numel) if self.shard else (0, 0)


def trained_parameters(engine: DeepSpeedEngine) -> list[TrainedParameter]:
    """Return the trained parameters in the model's order; ranks differ in the shards only.

    DeepSpeed's own safe_get_full_* could read them, but they sum over ranks, which loses the sign
    of a zero, gather every tensor on every rank, and fail for moments before the first step;
    safe_set_full_* need whole tensors on every rank.
    """
    shards = _shards(engine)
    return [
        TrainedParameter(name, whole_shape(parameter), shards.get(id(parameter)))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def _shards(engine: DeepSpeedEngine) -> dict[int, ParameterShard]:
    """Return this rank's shards by id of the parameter."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        # float32 only: the optimizer steps the parameters themselves, whole on every rank.
        return {
            id(parameter): ParameterShard(parameter, 0, 0, parameter.numel())
            for parameter in parameters
        }
    return _partition_shards(engine) if stage == 3 else _linked_shards(engine, parameters)


def _linked_shards(engine: DeepSpeedEngine, parameters: list[Any]) -> dict[int, ParameterShard]:
    """Return the shards of stages 1 and 2, which DeepSpeed links to each parameter.

    An optimizer group's parameters are concatenated in one flat tensor, which is cut into equal
    parts regardless of parameter boundaries; a rank's optimizer has its own part only. bfloat16 at
    stage 1 uses another optimizer class with the same links.
    """
    shards: dict[int, ParameterShard] = {}
    for parameter in parameters:
        if (mapping := parameter._hp_mapping) is not None:
            flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
            start = mapping.hp_fragment_address.start
            part = mapping.lp_fragment_address
            shards[id(parameter)] = ParameterShard(flat, start, part.start, part.numel)
    return shards


def _partition_shards(engine: DeepSpeedEngine) -> dict[int, ParameterShard]:
    """Return the shards of stage 3.

    Each parameter is cut into equal parts, the last ones padded; a rank's parts of a sub-group are
    concatenated.
    """
    shards: dict[int, ParameterShard] = {}
    for flat, members in zip(
        engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_groups, strict=True
    ):
        start = 0
        for parameter in members:
            size = parameter.partition_numel()
            first = size * dist.get_rank()
            if first < parameter.ds_numel:
                numel = min(size, parameter.ds_numel - first)
                shards[id(parameter)] = ParameterShard(flat, start, first, numel)
            start += size
    return shards


def update_model(engine: DeepSpeedEngine) -> None:
    """Copy the masters to the parameters that the model computes with, as DeepSpeed's step does."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # Small parameters stay whole between steps: partition them, and gather them again after.
        optimizer.checkpoint_event_prologue()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()


# --------------------------------------------------------------------------------------- storages


def device_storages(engine: DeepSpeedEngine) -> list[torch.UntypedStorage]:
    """Return the storages of all the engine's tensors on its device, each once.

    A storage that is a mapped file (weights on CPU) cannot be resized and is left out.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    roots = [
        list(engine.module.parameters()),
        dict(engine.basic_optimizer.state),
        engine.basic_optimizer.param_groups,
        vars(engine.optimizer),
    ]
    for tensor in _tensors(roots, set()):
        storage = tensor.untyped_storage()
        if storage.device.type == engine.device.type and storage.nbytes() and storage.resizable():
            storages[storage._cdata] = storage
    return list(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in `value`, their gradients and their ZeRO-3 partitions.

    Looks into containers and dataclasses at any depth, each once: `seen` has their ids. Every value
    that is looked into belongs to the engine, so that no id is used again meanwhile.
    """
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        yield value
        yield from _tensors(getattr(value, "ds_tensor", None), seen)
        yield from _tensors(value.grad if value.is_leaf else None, seen)
    elif isinstance(value, dict):
        seen.add(id(value))
        for key, part in value.items():
            yield from _tensors(key, seen)
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple | set | deque):
        seen.add(id(value))
        for part in value:
            yield from _tensors(part, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value), seen)
