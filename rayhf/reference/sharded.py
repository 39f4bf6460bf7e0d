"""Frozen log-probs of a model that is too large for one device: ZeRO-3 inference over ranks.

Like ReferenceEngine, with 1/world of the weights on each rank: every forward pass gathers one layer
after the other, and the layer's part of every other rank is freed after it.

Synchronization: all ranks call every method together; each has rows of its own, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.learner.build import deepspeed_config, join_process_group, load_model, start_frozen
from rayhf.learner.rank import RankEngine
from rayhf.models.forward import Inputs
from rayhf.models.outputs import split_top
from rayhf.reference.weights import ReferenceWeights
from rayhf.types import Row, TopLogprobs


class ShardedReferenceEngine(RankEngine, ReferenceWeights):
    """One rank of the reference policy.

    Args:
        model: Hugging Face model directory.
        config: settings of the section `reference`.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda[:index]".
        learner: settings of the section `learner`; `packing` and `collective_timeout_s` are the
            reference's.
        rank, world, master: this rank, the number of ranks, host and port of rank 0.
    """

    def __init__(
        self,
        model: Path,
        config: ReferenceConfig,
        *,
        dtype: str,
        device: str = "cpu",
        learner: LearnerConfig,
        rank: int,
        world: int,
        master: tuple[str, int],
    ) -> None:
        self.token_budget = config.token_budget
        self.device = torch.device(device)
        self.stage = 3
        self.world = world
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        join_process_group(
            rank=rank,
            world=world,
            master=master,
            device=self.device,
            timeout_s=learner.collective_timeout_s,
        )
        frozen = LearnerConfig(
            zero_stage=3, packing=learner.packing, attention=learner.attention
        ).model_copy(update={"dtype": dtype})
        settings = deepspeed_config(frozen, device=self.device)
        if dtype == "float16":
            settings["fp16"] = {"enabled": True}
        loaded = load_model(model, frozen, head="policy", lora=None, settings=settings)
        self.packing = loaded.packing
        self.engine = start_frozen(loaded, settings)
        ReferenceWeights.__init__(self, loaded.model, sharded=True, rank=rank)

    def top_logprobs(
        self, rows: Sequence[Row], temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        """Return log-probs as `outputs` does, and the top_k likeliest tokens at each position."""

        def compute(inputs: Inputs, lengths: Sequence[int]) -> list[TopLogprobs]:
            self.engine.eval()
            return split_top(self.engine(inputs, temperature, "off", top_k), lengths)

        return self._over_batches(rows, compute)
