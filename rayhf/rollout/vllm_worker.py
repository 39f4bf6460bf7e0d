"""How new weights get into vLLM's layers; runs inside the vLLM worker.

In: buckets in checkpoint format, one `update_weights` each, between `start_weight_update` and
`finish_weight_update`. Their bytes are passed in (object store), opened here (CUDA IPC), or
received here by every worker of the engine (broadcast). With LoRA only adapters are sent: they are
kept until the end of the update, and the rest is read from the directory that the engine started
from. Out: a model that computes with the new weights.

Importing this file registers the backend "rayhf"; the engine names
`rayhf.rollout.vllm_worker.WorkerExtension` as worker_extension_cls so that the import happens in
the worker's process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from rayhf.errors import WeightSyncError
from rayhf.rollout.vllm_internals import BucketBytes, finish_reload, start_reload
from rayhf.types import WeightBucket
from rayhf.weights.broadcast import Receiver, Rendezvous
from rayhf.weights.buckets import device_checksum, format_checksum, unpack_bucket
from rayhf.weights.cuda_ipc import IpcExport, open_export
from rayhf.weights.lora import is_factor, merge_with_directory

BACKEND = "rayhf"


@dataclass
class BucketInit(WeightTransferInitInfo):  # type: ignore[misc]
    names: frozenset[str]
    """Parameters that every update must load."""
    directory: Path
    """Model directory of the parameters that an update by adapters does not send."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    bucket: WeightBucket
    payload: BucketBytes
    """Checked already, except for an IpcExport."""


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):  # type: ignore[misc]
    """Loads checksummed buckets with the model's own checkpoint loader."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self._expected = init_info.names
        self._directory = init_info.directory

    def start_weight_update(self) -> None:
        self._loaded: set[str] = set()
        self._factors: dict[str, torch.Tensor] = {}
        start_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        bucket = update_info.bucket
        payload = update_info.payload
        if isinstance(payload, IpcExport):
            payload = open_export(payload, self.device)
            received = format_checksum(int(device_checksum(payload)))
            if received != bucket.checksum:
                raise WeightSyncError(
                    f"a bucket on this GPU has checksum {received}, "
                    f"the learner computed {bucket.checksum}"
                )
        self._load(unpack_bucket(bucket, payload))

    def _load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole parameters and keep factors for later."""

        def whole() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                if is_factor(name):
                    # Copied: the bucket may be another process's memory.
                    self._factors[name] = tensor.to(self.device, copy=True)
                else:
                    self._loaded.add(name)
                    yield name, tensor.to(self.model_config.dtype)

        self.model.load_weights(whole())

    def finish_weight_update(self) -> None:
        if self._factors:
            # All parameters, also of layers without an adapter: the reload needs whole layers (q, k
            # and v are one), and an engine that slept may have no weights left.
            self._load(
                merge_with_directory(
                    self._directory,
                    self._expected - self._loaded,
                    self._factors,
                    device=self.device,
                )
            )
            self._factors = {}
        missing = self._expected - self._loaded
        if missing:
            # The reload reports no error for layers without weights: they keep the old ones.
            raise WeightSyncError(
                f"the update ended without {len(missing)} parameters, {min(missing)} among them"
            )
        finish_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing: there is no connection to close."""


class WorkerExtension:
    """Methods of a worker besides vLLM's own.

    vLLM mixes this class into its worker, which also makes the worker import this file.
    """

    _receiver: Receiver | None = None
    if TYPE_CHECKING:  # the worker's own; vLLM refuses an extension that defines them again
        rank: int
        device: torch.device

        def update_weights(self, update_info: dict[str, WeightBucket | BucketBytes]) -> None: ...

    def join_broadcast(self, rendezvous: Rendezvous, first_rank: int) -> None:
        """Join a new group; `first_rank` is the rank there of the engine's first worker."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = Receiver(rendezvous, first_rank + self.rank, self.device)

    def receive_broadcast(
        self, version: int, buckets: Sequence[WeightBucket]
    ) -> list[WeightBucket]:
        """Load the announced buckets as they arrive, and return them with their checksums."""
        if self._receiver is None:
            raise WeightSyncError("a broadcast was announced to a worker that joined none")
        received = []
        for bucket, flat in self._receiver.receive(version, buckets):
            self.update_weights({"bucket": bucket, "payload": flat})
            received.append(bucket)
        return received


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
