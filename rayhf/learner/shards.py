"""Where DeepSpeed (0.19) keeps the float32 masters of the trained parameters, at every ZeRO stage,
and on which rank.

Its own safe_get_full_* would do for reading, but they add up over ranks, which loses the sign of a
zero, gather every tensor on every rank, and know no moments before the first step; safe_set_full_*
want whole tensors on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of one parameter: elements `first : first + numel` of it, row by row, lie at
    `start` in `flat`."""

    flat: Tensor
    """The float32 tensor that the optimizer steps, and by which it keys its state."""
    start: int
    first: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The shard's place in `flat`, or in a moment, which has the same layout."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter with a gradient. `shard` is None on a rank that steps no element of it."""

    name: str
    shape: tuple[int, ...]
    shard: Shard | None

    def numel(self) -> int:
        return math.prod(self.shape)

    def range(self) -> tuple[int, int]:
        """The first element that this rank steps, and how many."""
        return (self.shard.first, self.shard.numel) if self.shard else (0, 0)


def trained(engine: Any) -> list[Trained]:
    """The trained parameters in the model's order, the same on every rank but for the shards."""
    shards = _shards(engine)
    return [
        Trained(
            name, tuple(getattr(parameter, "ds_shape", parameter.shape)), shards.get(id(parameter))
        )
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def _shards(engine: Any) -> dict[int, Shard]:
    """This rank's shards by id of the parameter."""
    stage = engine.zero_optimization_stage()
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if (
        stage == 0
    ):  # float32 only: the optimizer steps the parameters themselves, whole on every rank
        return {
            id(parameter): Shard(parameter, 0, 0, parameter.numel()) for parameter in parameters
        }
    shards: dict[int, Shard] = {}
    if stage < 3:
        # An optimizer group's parameters lie end to end in one flat tensor, which is cut into equal
        # parts wherever that falls; a rank's optimizer knows its part only. bfloat16 at stage 1 has
        # an optimizer of its own, linked alike.
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, inside = mapping.hp_fragment_address.start, mapping.lp_fragment_address
                shards[id(parameter)] = Shard(flat, start, inside.start, inside.numel)
        return shards
    # Each parameter is cut into equal parts, the last ones padded; a rank's parts of a sub-group
    # lie end to end.
    for flat, members in zip(
        engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_groups, strict=True
    ):
        start = 0
        for parameter in members:
            size = parameter.partition_numel()
            first = size * dist.get_rank()
            if first < parameter.ds_numel:
                shards[id(parameter)] = Shard(
                    flat, start, first, min(size, parameter.ds_numel - first)
                )
            start += size
    return shards


def update_model(engine: Any) -> None:
    """Bring the parameters that the model computes with up to the masters, as the end of
    DeepSpeed's step does."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # small parameters stay whole between steps: give them up, ...
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()  # ... and gather them again
