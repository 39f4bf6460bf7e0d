"""Offline DPO: any loss of the preference family on given pairs.

Rafailov et al. 2023. Metrics to watch: dpo/accuracy, dpo/margin, dpo/chosen_logp (it often falls)
and, of an evaluation of type pair_accuracy, eval/<task>/pair_accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import NonNegativeFloat

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.given_rows import GivenRowsAlgorithm, GivenRowsConfig
from rayhf.config.algorithms import InitialReference, ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.data.chat import Chat
from rayhf.data.examples import EncodedExample, fits
from rayhf.data.preferences import encode_pair
from rayhf.data.readers import Row
from rayhf.losses.base import Loss
from rayhf.losses.pairs import PairLoss, PairLossConfig
from rayhf.losses.preference import SigmoidConfig
from rayhf.types import Group


class OfflineDPOConfig(GivenRowsConfig):
    """Offline DPO (Rafailov et al. 2023)."""

    type: str = "dpo"
    loss: Annotated[PairLossConfig, LOSSES.defaulting("sigmoid")] = SigmoidConfig()
    """A preference loss."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the chosen response's negative log-likelihood, mean per token (Pang et al.
    2024)."""
    reference: ReferenceSchedule = InitialReference()
    """Schedule of the reference; reference-free losses ignore it."""


class OfflineDPO(GivenRowsAlgorithm):
    """DPO on given pairs, with any preference loss (Rafailov et al. 2023)."""

    Config = OfflineDPOConfig

    def __init__(self, config: OfflineDPOConfig) -> None:
        super().__init__()
        self.config = config
        self._loss: PairLoss[PairLossConfig] = LOSSES.build(
            config.loss, importance_cap=None, nll_coef=config.nll_coef, sampled=False
        )
        self.reference: ReferenceSchedule | None = (
            config.reference if self._loss.needs_reference else None
        )

    def encode(self, row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
        """Return the pair of a row; none where both responses are the same."""
        example = encode_pair(row, where, chat)
        drop = self.config.too_long == "drop"
        return (example,) if example and fits(example.rows, chat, where, drop=drop) else ()

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the pairs of the iteration."""
        examples = self.examples_of(groups)
        lengths = [[len(row.response_ids) for row in example.rows] for example in examples]
        gaps = [chosen - rejected for chosen, rejected in lengths]
        return Selection(
            examples=examples,
            metrics={
                "pairs/given": float(len(examples)),
                "pairs/length_gap": float(np.mean(gaps)),
            },
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the configured preference loss."""
        return self._loss
