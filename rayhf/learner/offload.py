"""A learner's tensors out of its GPU and back, while somebody else needs the memory.

Every tensor keeps its place for whoever holds it: only storages are emptied and filled again, so
DeepSpeed's many views of the same memory stay true, at every ZeRO stage, and not a bit is lost.
(DeepSpeed's own offload_states wants its FusedAdam at stage 3 and knows nothing of stage 0.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DEPTH = 5
"""How deep tensors lie in a DeepSpeed optimizer's attributes."""


class Offloader:
    """Where the tensors of a DeepSpeed engine are."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        """Emptied storages and their bytes, in pinned host memory where there is a GPU."""

    def leave(self) -> None:
        """Between steps: parameters, masters, moments and buffers to host memory. Nothing where
        they are there already."""
        if self._away:
            return
        for storage in _storages(self._engine):
            on_gpu = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            host.copy_(_bytes(storage), non_blocking=True)
            self._away.append((storage, host))
        self._settle()
        for storage, _ in self._away:
            storage.resize_(0)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Nothing where they never left. Raises torch's OutOfMemoryError where the memory is
        taken."""
        while self._away:
            storage, host = self._away[-1]
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
            self._away.pop()
        self._settle()

    def _settle(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(engine: Any) -> list[torch.UntypedStorage]:
    """What the engine's tensors lie in on its device, each once. Memory that is a file's (weights
    on CPU) cannot be emptied."""
    found: dict[int, torch.UntypedStorage] = {}
    roots = [
        list(engine.module.parameters()),
        dict(engine.basic_optimizer.state),
        engine.basic_optimizer.param_groups,
    ]
    for tensor in _tensors([*roots, vars(engine.optimizer)], _DEPTH):
        storage = tensor.untyped_storage()
        if storage.device.type == engine.device.type and storage.nbytes() and storage.resizable():
            found[storage._cdata] = storage
    return list(found.values())


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        yield from _tensors(
            [getattr(value, "ds_tensor", None), value.grad if value.is_leaf else None], depth
        )
    elif depth and isinstance(value, dict):
        yield from _tensors([*value.keys(), *value.values()], depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value), depth - 1)
