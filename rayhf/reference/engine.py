"""Frozen log-probs: one model without gradient, refreshed from weight snapshots.

In: rows and a temperature; buckets of weights where the algorithm's schedule refreshes the
reference. Out: one float32 array of log-probs per row, by the same forward pass as the learner's.

Synchronization: none, every method is local to this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.errors import CheckpointError
from rayhf.models.architectures import packing_of
from rayhf.models.forward import PolicyHead, build_inputs, prepare_config
from rayhf.models.packing import pack_examples
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA
from rayhf.types import FloatArray, Row, WeightBucket
from rayhf.weights.buckets import Payload, check_complete, unpack_bucket, verify_bucket
from rayhf.weights.export import all_weights

FILE = "reference.safetensors"


class ReferenceEngine:
    """The reference policy on one device.

    Args:
        model: Hugging Face model directory.
        config: settings of the section `reference`.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda[:index]".
        learner: settings of the section `learner`; `packing` and `attention` are the reference's.
    """

    def __init__(
        self,
        model: Path,
        config: ReferenceConfig,
        *,
        dtype: str,
        device: str = "cpu",
        learner: LearnerConfig | None = None,
    ) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = torch.device(device)
        model_config = transformers.AutoConfig.from_pretrained(str(model), **AS_DATA)
        self.packing = packing_of(model_config.model_type, learner or LearnerConfig())
        prepare_config(model_config, attention="sdpa", packing=self.packing)
        causal: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            str(model),
            config=model_config,
            dtype=getattr(torch, dtype),
            **WEIGHTS_AS_DATA,
        )
        self.policy = PolicyHead(causal.to(self.device)).eval().requires_grad_(False)
        # Views into the parameters, named and shaped as the learner sends them.
        self.weights: dict[str, Tensor] = {
            weight.name: weight.value() for weight in all_weights(causal)
        }
        self.average: dict[str, Tensor] = {}
        """Float32 copy in host memory, once a moving average began: in 16 bits, small steps would
        round to nothing."""

    @torch.inference_mode()
    def logprobs(self, rows: Sequence[Row], temperature: float) -> list[FloatArray]:
        """Return the log-probs of each row's response tokens at this temperature, in nats.

        float32 arrays of shape (len(response_ids),).
        """
        results: dict[int, FloatArray] = {}
        batches = pack_examples(
            [(row,) for row in rows], packing=self.packing, budget=self.config.token_budget
        )
        for batch in [batch.examples for batch in batches]:
            inputs = build_inputs([rows[i] for i in batch], self.device, packing=self.packing)
            logp_T, _ = self.policy(inputs, temperature)
            parts = torch.split(logp_T.cpu(), [len(rows[i].response_ids) for i in batch])
            results.update((i, part.numpy().copy()) for i, part in zip(batch, parts, strict=True))
        return [results[i] for i in range(len(rows))]

    @torch.no_grad()
    def update(self, buckets: Sequence[tuple[WeightBucket, Payload]], mix: float) -> None:
        """Set reference <- mix * snapshot + (1 - mix) * reference; mix 1 replaces it.

        TR-DPO, Gorbatovski et al. 2024, eq. 2-3. Raises WeightSyncError, before anything changes,
        where a bucket is damaged or parameters are missing or unknown.
        """
        check_complete(
            {name: tuple(p.shape) for name, p in self.weights.items()},
            [bucket for bucket, _ in buckets],
        )
        for bucket, payload in buckets:
            verify_bucket(bucket, payload)
        if mix < 1 and not self.average:
            self.average = {name: p.float().cpu().clone() for name, p in self.weights.items()}
        if mix == 1:
            self.average = {}
        for bucket, payload in buckets:
            for name, tensor in unpack_bucket(bucket, payload):
                if mix < 1:
                    tensor = self.average[name].lerp_(tensor.float(), mix)
                self.weights[name].copy_(tensor)

    def save(self, directory: Path) -> None:
        """Write reference.safetensors: the float32 average where there is one, else the weights."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        kind = "average" if self.average else "weights"
        tensors = {name: p.cpu().contiguous() for name, p in (self.average or self.weights).items()}
        save_file(tensors, directory / FILE, {"kind": kind})

    def load(self, directory: Path) -> None:
        """Continue from `save`.

        Raises CheckpointError where the file is missing, unreadable or of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(directory / FILE, framework="pt") as file:
                kind = (file.metadata() or {}).get("kind")
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"no reference checkpoint in {directory}: {error}") from None
        shapes = {name: tuple(p.shape) for name, p in self.weights.items()}
        if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
            raise CheckpointError(
                f"{directory / FILE} holds another model's parameters than policy.model"
            )
        self._set(tensors)
        self.average = {name: t.float() for name, t in tensors.items()} if kind == "average" else {}

    def restore(self, average: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Continue the moving average of another engine, given as its float32 arrays."""
        self.average = {name: torch.tensor(array) for name, array in average.items()}
        self._set(self.average)

    @torch.no_grad()
    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.weights[name].copy_(tensor)
