"""Measurement of what a weight sync changes in the engines and what rounding loses.

In: each weight as the learner trains it and as it is sent. Out: two metrics of the last sync:

sync/changed_fraction  share of weights that have another value in the engines than after the sync
                       before
sync/update_lost       with u the learner's update since the start of the campaign and v the
                       engines', 1 - <u, v> / <u, u>: the share of the update, along its own
                       direction, that rounding has kept from the engines. 0 where nothing is lost
                       (unbiased rounding included), 1 where the engines have not moved.

Both are measured on a fixed sample of the weights, so that they cost neither time nor memory: all
weights of a model of up to SAMPLE, else evenly spaced ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 1 << 20
"""Weights in the sample; a share has a standard error of at most 0.0005."""


class SyncMeter:
    """Compares every sync with the one before and with the start.

    Args:
        numel: weights of the model.
        is_exact: whether the learner trains the weights that it sends; a bfloat16 learner rounds
            float32 masters itself, so that its own loss cannot be measured here.
    """

    def __init__(self, numel: int, *, is_exact: bool) -> None:
        self._stride = _stride(numel)
        self._is_exact = is_exact
        self._initial: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}
        """Values in the engines after the last sync."""
        self._reset()

    def start(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Remember weights before training, which the engines have loaded from the same model."""
        self._initial |= {name: self._sample(tensor) for name, tensor in tensors}

    def begin(self) -> None:
        """Begin with the first weight of a sync."""
        self._reset()

    def observe(self, name: str, trained: Tensor, sent: Tensor, dtype: torch.dtype) -> None:
        """Count one weight: as it is trained, and as it is sent, where it is rounded to `dtype`."""
        initial = self._initial[name]
        rounded_initial = initial.to(dtype)
        own = self._sample(trained)
        now = (own if sent is trained else self._sample(sent)).to(dtype)
        before = self._sent.get(name, rounded_initial)
        self._count += now.numel()
        self._changed += int((now != before).sum())
        update = own.double() - initial.double()
        moved = now.double() - rounded_initial.double()
        self._norm += float(update.square().sum())
        self._kept += float((update * moved).sum())
        self._sent[name] = now

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last sync; empty before the first one."""
        if not self._count:
            return {}
        metrics = {"sync/changed_fraction": self._changed / self._count}
        if self._is_exact and self._norm:
            metrics["sync/update_lost"] = 1.0 - self._kept / self._norm
        return metrics

    def _reset(self) -> None:
        self._count = 0
        self._changed = 0
        self._norm = 0.0
        self._kept = 0.0

    def _sample(self, tensor: Tensor) -> Tensor:
        # A copy, also where the stride is 1: the weights change in place.
        return tensor.detach().reshape(-1)[:: self._stride].cpu().clone()


def _stride(numel: int) -> int:
    """Return the distance of sampled weights: no factor of a usual row length divides it."""
    stride = max(1, math.ceil(numel / SAMPLE))
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return stride
