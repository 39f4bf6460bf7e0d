"""How new weights get into vLLM's layers; runs inside the vLLM worker.

In: buckets in checkpoint format, one `update_weights` each, between `start_weight_update` and `finish_weight_update`.
Out: a model that computes with them. Importing this file registers the backend "rayhf"; the engine names
`rayhf.rollout.transfer.WorkerExtension` as worker_extension_cls so that the import happens in the worker's process.

Written against vllm 0.32, where three things go wrong otherwise:
1. CPU kernels repack weights after loading, so `model.load_weights` alone fails: the layerwise reload brings the
   original layout back and repacks at the end.
2. With tied embeddings, the CPU output head keeps a packed copy that the reload does not know (`repack_tied_head`).
3. The prefix cache holds keys and values of the old weights: the engine resets it afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rayhf.errors import WeightSyncError
from rayhf.experience import WeightBucket
from rayhf.rollout.weights import unpack_bucket

BACKEND = "rayhf"


@dataclass
class BucketInit(WeightTransferInitInfo):  # type: ignore[misc]
    names: frozenset[str]
    """Parameters that every update must bring."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    bucket: WeightBucket
    payload: Any
    """numpy uint8 array, verified by the engine."""


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):  # type: ignore[misc]
    """Loads checksummed buckets with the model's own checkpoint loader."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self._expected = init_info.names
        self._received: set[str] = set()

    def start_weight_update(self) -> None:
        self._received = set()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        self._received.update(spec.name for spec in update_info.bucket.tensors)
        self.model.load_weights(unpack_bucket(update_info.bucket, update_info.payload))

    def finish_weight_update(self) -> None:
        missing = self._expected - self._received
        if missing:
            # Layers that got nothing would keep the old weights without a word.
            raise WeightSyncError(f"the update ended without {len(missing)} parameters, {min(missing)} among them")
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Holds no connection."""


def repack_tied_head(model: torch.nn.Module) -> None:
    """Give a tied output head the new embedding. Only CPU kernels keep a copy of their own (`cpu_linear`)."""
    head = getattr(model, "lm_head", None)
    config: Any = model.config
    if head is None or not hasattr(head, "cpu_linear") or not getattr(config, "tie_word_embeddings", False):
        return
    embedding = next((module for name, module in model.named_modules() if name.endswith("embed_tokens")), None)
    if embedding is None:
        raise WeightSyncError(f"{type(model).__name__}: tied output head, but no module named embed_tokens")
    if head is not embedding:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


class WorkerExtension:
    """Adds nothing to the worker: naming it makes the worker import this file."""


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
