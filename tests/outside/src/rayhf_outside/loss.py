"""A preference loss: the squared distance of the margin from a target."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from torch import Tensor

import rayhf


class SquaredMarginConfig(rayhf.PairLossConfig):
    """The target of the margin."""

    type: str = "squared_margin"
    target: NonNegativeFloat = 1.0
    """Nats."""


class SquaredMargin(rayhf.PairLoss[SquaredMarginConfig]):
    """Squared distance of the pair's log-ratio margin from a target."""

    Config = SquaredMarginConfig

    def per_pair(self, pairs: rayhf.PairLogps) -> Tensor:
        return (self.config.beta * pairs.gap_P - self.config.target).square()
