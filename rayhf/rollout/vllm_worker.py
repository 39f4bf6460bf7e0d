"""How new weights get into vLLM's layers; runs inside the vLLM worker.

In: buckets in checkpoint format, one `update_weights` each, between `start_weight_update` and
`finish_weight_update`. Their bytes are handed over (object store), opened here (CUDA IPC), or
received here by every worker of the engine (broadcast). With LoRA only adapters come: they are kept
until the end of the update, and the rest is read from the directory that the engine started from.
Out: a model that computes with them. Importing this file registers the backend "rayhf"; the engine
names `rayhf.rollout.vllm_worker.WorkerExtension` as worker_extension_cls so that the import happens
in the worker's process.

Written against vllm 0.32, where three things go wrong otherwise:
1. CPU kernels repack weights after loading, so `model.load_weights` alone fails: the layerwise
   reload brings the original layout back and repacks at the end.
2. With tied embeddings, the CPU output head keeps a packed copy that the reload does not know
   (`repack_tied_head`).
3. The prefix cache holds keys and values of the old weights: the engine resets it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rayhf.errors import WeightSyncError
from rayhf.types import WeightBucket
from rayhf.weights.broadcast import Receiver, Rendezvous
from rayhf.weights.buckets import device_checksum, hexadecimal, unpack_bucket
from rayhf.weights.cuda_ipc import IpcExport, opened
from rayhf.weights.lora import is_factor, with_base

BACKEND = "rayhf"


@dataclass
class BucketInit(WeightTransferInitInfo):  # type: ignore[misc]
    names: frozenset[str]
    """Parameters that every update must load."""
    directory: Path
    """Where those lie that do not come, for an update by adapters."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    bucket: WeightBucket
    payload: Any
    """numpy uint8 array or a tensor on this device, verified already; or an ipc.IpcExport."""


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):  # type: ignore[misc]
    """Loads checksummed buckets with the model's own checkpoint loader."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self._expected, self._directory = init_info.names, init_info.directory

    def start_weight_update(self) -> None:
        self._loaded: set[str] = set()
        self._factors: dict[str, torch.Tensor] = {}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        bucket, payload = update_info.bucket, update_info.payload
        if isinstance(payload, IpcExport):
            payload = opened(payload, self.device)
            found = hexadecimal(int(device_checksum(payload)))
            if found != bucket.checksum:
                raise WeightSyncError(
                    f"a bucket on this GPU has checksum {found}, the learner computed {bucket.checksum}"
                )
        self._load(unpack_bucket(bucket, payload))

    def _load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        def whole() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                if is_factor(name):
                    self._factors[name] = tensor.to(
                        self.device, copy=True
                    )  # their bucket may be somebody else's memory
                else:
                    self._loaded.add(name)
                    yield name, tensor.to(self.model_config.dtype)

        self.model.load_weights(whole())

    def finish_weight_update(self) -> None:
        if self._factors:
            # All of them, also layers without an adapter: the reload wants whole layers (q, k and v
            # are one), and an engine that slept may have nothing left.
            self._load(
                with_base(
                    self._directory,
                    self._expected - self._loaded,
                    self._factors,
                    device=self.device,
                )
            )
            self._factors = {}
        missing = self._expected - self._loaded
        if missing:
            # Layers that got nothing would keep the old weights without a word.
            raise WeightSyncError(
                f"the update ended without {len(missing)} parameters, {min(missing)} among them"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Holds no connection."""


def repack_tied_head(model: torch.nn.Module) -> None:
    """Give a tied output head the new embedding. Only CPU kernels keep a copy of their own
    (`cpu_linear`)."""
    head = getattr(model, "lm_head", None)
    config: Any = model.config
    if (
        head is None
        or not hasattr(head, "cpu_linear")
        or not getattr(config, "tie_word_embeddings", False)
    ):
        return
    embedding = next(
        (module for name, module in model.named_modules() if name.endswith("embed_tokens")), None
    )
    if embedding is None:
        raise WeightSyncError(
            f"{type(model).__name__}: tied output head, but no module named embed_tokens"
        )
    if head is not embedding:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


class WorkerExtension:
    """What a worker can do besides vLLM's own. Naming this class also makes the worker import this
    file."""

    _receiver: Receiver | None = None
    if TYPE_CHECKING:  # the worker's own; vLLM refuses an extension that has what it has
        rank: int
        device: torch.device

        def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def join_broadcast(self, meeting: Rendezvous, first: int) -> None:
        """Take this worker's place in a new group; `first` is the place of the engine's first
        worker."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = Receiver(meeting, first + self.rank, self.device)

    def receive_broadcast(
        self, version: int, buckets: Sequence[WeightBucket]
    ) -> list[WeightBucket]:
        """Load the announced buckets as they come; the same with their checksums."""
        if self._receiver is None:
            raise WeightSyncError("a broadcast was announced to a worker that joined none")
        received = []
        for bucket, flat in self._receiver.arrivals(version, buckets):
            self.update_weights({"bucket": bucket, "payload": flat})
            received.append(bucket)
        return received


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
