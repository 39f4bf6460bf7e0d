"""A policy's weights on their way to the engines: gathered, rounded, and measured.

Synchronization: all ranks gather together, since ZeRO-3 needs all of them for each weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rayhf.config.schema import LearnerConfig
from rayhf.types import derive_seed
from rayhf.weights.export import Weight, all_weights, gather_buckets, split_into_buckets
from rayhf.weights.rounding import round_stochastic
from rayhf.weights.sync_metrics import SyncMeter


class OutgoingWeights:
    """Source of every weight sync of one learner.

    Args:
        model: in training.
        config: of the learner.
        seed: the campaign's.
        sharded: whether ZeRO-3 shards the model.
        is_measured: whether syncs are measured; not where the engines round, as they do with LoRA.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        *,
        seed: int,
        sharded: bool,
        is_measured: bool,
    ) -> None:
        self._config = config
        self._seed = seed
        self._sharded = sharded
        self._meter = self._start_meter(model) if is_measured else None

    def _start_meter(self, model: nn.Module) -> SyncMeter:
        weights = all_weights(model)
        numel = sum(weight.numel() for weight in weights)
        meter = SyncMeter(numel, is_exact=self._config.dtype == "float32")
        limit = self._config.bucket_mib << 20
        buckets = split_into_buckets(weights, limit_bytes=limit, itemsize=4)
        # Every rank keeps the sample: by CUDA IPC, each of them sends to an engine of its own.
        for tensors in gather_buckets(buckets, sharded=self._sharded, rank=0):
            meter.start(tensors)
        return meter

    def gather(
        self, plan: Sequence[Sequence[Weight]], target: torch.dtype, *, version: int, rank: int
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield each planned bucket's tensors where `rank` is 0, and an empty list elsewhere.

        Rounded where learner.sync_rounding is stochastic: the bits depend on the campaign's seed,
        `version` and the weight's name only. Otherwise the receiver of the tensors rounds them.
        Tensors are valid until the next bucket is requested.
        """
        if self._meter is not None:
            self._meter.begin()
        for tensors in gather_buckets(plan, sharded=self._sharded, rank=rank):
            yield [(name, self._round(name, tensor, target, version)) for name, tensor in tensors]

    def _round(self, name: str, tensor: Tensor, target: torch.dtype, version: int) -> Tensor:
        sent = tensor
        if self._config.sync_rounding == "stochastic" and tensor.dtype != target:
            seed = derive_seed(self._seed, "sync", version, name)
            sent = round_stochastic(tensor, target, seed=seed)
        if self._meter is not None:
            self._meter.observe(name, tensor, sent, target)
        return sent

    def metrics(self) -> dict[str, float]:
        """Return what the last sync changed and lost; empty where it is not measured."""
        return {} if self._meter is None else self._meter.metrics()
