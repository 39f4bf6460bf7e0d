"""Weights of a reference, whole or sharded by ZeRO-3: updates, moving average, and checkpoints.

In: buckets of weights, a directory. Out: changed weights, a file.

Synchronization: of a sharded model all ranks call every method together. Rank 0 reads, writes, and
has the moving average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rayhf.errors import CheckpointError
from rayhf.types import WeightBucket
from rayhf.weights.buckets import Payload, check_complete, unpack_bucket, verify_bucket
from rayhf.weights.export import (
    Weight,
    all_weights,
    gather_buckets,
    split_into_buckets,
    whole_weights,
)

FILE = "reference.safetensors"
_GATHERED_BYTES = 1 << 30
"""Bytes that are whole at a time while a sharded model is read or written."""


class ReferenceWeights:
    """Base of reference engines: what changes and stores their weights.

    Args:
        model: Hugging Face model.
        sharded: whether ZeRO-3 shards it.
        rank: of this process.
    """

    def __init__(self, model: nn.Module, *, sharded: bool = False, rank: int = 0) -> None:
        self._sharded = sharded
        self._rank = rank
        # Their values are views into the parameters, named and shaped as the learner sends them.
        self.weights: dict[str, Weight] = {weight.name: weight for weight in all_weights(model)}
        self.averages = False
        """Whether a moving average began."""
        self.average: dict[str, Tensor] = {}
        """Of rank 0: the moving average, in float32 in host memory. In 16 bits, small steps would
        round to nothing."""

    @torch.no_grad()
    def update(self, buckets: Sequence[tuple[WeightBucket, Payload | None]], mix: float) -> None:
        """Set reference <- mix * snapshot + (1 - mix) * reference; mix 1 replaces it.

        TR-DPO, Gorbatovski et al. 2024, eq. 2-3. Only rank 0 needs payloads. Raises
        WeightSyncError, before anything changes, where parameters are missing or unknown or, on
        rank 0, a bucket is damaged.
        """
        check_complete(
            {name: weight.shape for name, weight in self.weights.items()},
            [bucket for bucket, _ in buckets],
        )
        for bucket, payload in buckets:
            if payload is not None:
                verify_bucket(bucket, payload)
        self.averages = mix < 1
        if mix == 1:
            self.average = {}
        for bucket, payload in buckets:
            weights = [self.weights[spec.name] for spec in bucket.tensors]
            with whole_weights(weights, sharded=self._sharded, changed=True):
                if payload is None:
                    continue
                for name, tensor in unpack_bucket(bucket, payload):
                    value = self.weights[name].value()
                    value.copy_(tensor if mix == 1 else self._mix(name, value, tensor, mix))

    def _mix(self, name: str, value: Tensor, tensor: Tensor, mix: float) -> Tensor:
        """Move one weight's average, which begins at its value, and return it."""
        if name not in self.average:
            self.average[name] = value.float().cpu().clone()
        return self.average[name].lerp_(tensor.float(), mix)

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Write reference.safetensors: the float32 average where there is one, else the weights."""
        from safetensors.torch import save_file

        tensors = self.average if self.averages else self._collect()
        if self._rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(
                tensors, directory / FILE, {"kind": "average" if self.averages else "weights"}
            )

    def _collect(self) -> dict[str, Tensor]:
        """Return all weights in host memory on rank 0, none elsewhere."""
        return {
            name: tensor.to("cpu", copy=self._sharded).contiguous()
            for part in gather_buckets(self._parts(), sharded=self._sharded, rank=self._rank)
            for name, tensor in part
        }

    def _parts(self) -> list[list[Weight]]:
        weights = list(self.weights.values())
        return split_into_buckets(weights, limit_bytes=_GATHERED_BYTES, itemsize=4)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Continue from `save`.

        Raises CheckpointError where the file is missing, unreadable or of another model.
        """
        with _open(directory) as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if shapes != {name: weight.shape for name, weight in self.weights.items()}:
                raise CheckpointError(
                    f"{directory / FILE} holds another model's parameters than policy.model"
                )
            self.averages = (file.metadata() or {}).get("kind") == "average"
            self.average = {}
            for part in self._parts():
                with whole_weights(part, sharded=self._sharded, changed=True):
                    for weight in part if self._rank == 0 else ():
                        tensor = file.get_tensor(weight.name)
                        if self.averages:
                            self.average[weight.name] = tensor.float()
                        weight.value().copy_(tensor)

    @torch.no_grad()
    def restore(self, average: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Continue the moving average of another engine that is not sharded, given as arrays."""
        self.averages = True
        self.average = {name: torch.tensor(array) for name, array in average.items()}
        for name, tensor in self.average.items():
            self.weights[name].value().copy_(tensor)


def _open(directory: Path) -> Any:
    """Open a checkpoint's file. Raises CheckpointError where it is missing or unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(directory / FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"no reference checkpoint in {directory}: {error}") from None
