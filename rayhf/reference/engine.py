"""Frozen log-probs: one model without gradient, refreshed from weight snapshots.

In: rows and a temperature; buckets of weights where the algorithm's schedule refreshes the
reference. Out: one float32 array of log-probs per row, by the same forward pass as the learner's;
or, for distillation, also the likeliest tokens at each position.

Synchronization: none, every method is local to this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.models.architectures import packing_of
from rayhf.models.forward import Inputs, PolicyHead, build_inputs, prepare_config
from rayhf.models.outputs import Result, split_rows, split_top
from rayhf.models.packing import pack_examples
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA
from rayhf.reference.weights import ReferenceWeights
from rayhf.types import FloatArray, Row, TopLogprobs

if TYPE_CHECKING:
    import transformers


class ReferenceEngine(ReferenceWeights):
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
        self._dtype = dtype
        self.policy, causal = self._load(model)
        self._other: tuple[Path, PolicyHead] | None = None
        """The model besides the reference that was used last, and its directory."""
        super().__init__(causal)

    def _load(self, model: Path) -> tuple[PolicyHead, transformers.PreTrainedModel]:
        """Return a frozen model, and its Hugging Face module."""
        import transformers

        model_config = transformers.AutoConfig.from_pretrained(str(model), **AS_DATA)
        prepare_config(model_config, attention="sdpa", packing=self.packing)
        causal: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            str(model),
            config=model_config,
            dtype=getattr(torch, self._dtype),
            **WEIGHTS_AS_DATA,
        )
        return PolicyHead(causal.to(self.device)).eval().requires_grad_(False), causal

    def _policy(self, model: Path | None) -> PolicyHead:
        """Return the reference, or another model of the same architecture."""
        if model is None:
            return self.policy
        if self._other is None or self._other[0] != model:
            self._other = None  # before the next one is loaded: there is memory for one
            self._other = model, self._load(model)[0]
        return self._other[1]

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: Path | None = None
    ) -> list[FloatArray]:
        """Return the log-probs of each row's response tokens at this temperature, in nats.

        float32 arrays of shape (len(response_ids),). With `model` they are another model's, which
        is kept until the next one is used.
        """
        return self._over_batches(
            rows,
            lambda inputs, lengths: split_rows(
                self._policy(model)(inputs, temperature)[0], lengths
            ),
        )

    def top_logprobs(
        self, rows: Sequence[Row], temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        """Return the same, and the top_k likeliest tokens at each position."""
        return self._over_batches(
            rows,
            lambda inputs, lengths: split_top(
                self.policy(inputs, temperature, "off", top_k), lengths
            ),
        )

    @torch.inference_mode()
    def _over_batches(
        self, rows: Sequence[Row], compute: Callable[[Inputs, Sequence[int]], list[Result]]
    ) -> list[Result]:
        """Return what `compute` makes of each row, given inputs and response lengths."""
        results: dict[int, Result] = {}
        batches = pack_examples(
            [(row,) for row in rows], packing=self.packing, budget=self.config.token_budget
        )
        for batch in [batch.examples for batch in batches]:
            inputs = build_inputs([rows[i] for i in batch], self.device, packing=self.packing)
            parts = compute(inputs, [len(rows[i].response_ids) for i in batch])
            results.update(zip(batch, parts, strict=True))
        return [results[i] for i in range(len(rows))]
