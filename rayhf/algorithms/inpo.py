"""INPO: no-regret self-play with two references (Zhang et al. 2024).

One reference is fixed, the other is the policy at the start of the iteration. The second one is the
learner before its first step (old_logp), so it needs no copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_compare,
    scored,
    tie_share,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.pair_selection import best_worst
from rayhf.config.algorithms import (
    AlgorithmConfig,
    InitialReference,
    ReferenceSchedule,
    refuse_staleness,
    require_win_rates,
)
from rayhf.config.schema import CampaignConfig
from rayhf.losses.base import Loss
from rayhf.losses.selfplay import INPOLoss
from rayhf.types import Example, Group, Prompt, make_row


class INPOConfig(AlgorithmConfig):
    """Iterative Nash policy optimization (Zhang et al. 2024)."""

    type: str = "inpo"
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, each compared with every other."""
    eta: PositiveFloat = 0.0075
    """Step size (the source's setting)."""
    tau: NonNegativeFloat = 0.0025
    """Strength of the pull toward the fixed reference; eta / 3 in the source."""
    min_margin: NonNegativeFloat = 0.0
    """Difference of win probabilities up to which a pair is a tie."""
    reference: ReferenceSchedule = InitialReference()
    """Schedule of the fixed reference."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse samples of earlier weights, and scores without win rates. Raises ConfigError."""
        refuse_staleness(campaign, "regresses onto win rates against the current policy's samples")
        require_win_rates(campaign)

    @model_validator(mode="after")
    def _check_tau(self) -> Self:
        if self.tau > self.eta:
            raise ValueError(
                f"tau: {self.tau} must be between 0 and eta ({self.eta}); try {self.eta / 3:g}"
            )
        return self


class INPO(AlgorithmBase):
    """INPO: best-worst pairs with two references, toward a Nash policy (Zhang et al. 2024)."""

    Config = INPOConfig
    needs_old_logp = True

    def __init__(self, config: INPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self._loss = INPOLoss(eta=config.eta, tau=config.tau)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and compare each with every other."""
        return await sample_and_compare(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair each prompt's best completion with its worst."""
        examples: list[Example] = []
        ties = 0
        for group in groups:
            usable = scored(group)
            completions = [sample.completion.token_ids.tobytes() for _, sample, _ in usable]
            rates = [rate for _, _, rate in usable]
            selection = best_worst(rates, self.config.min_margin, completions)
            ties += selection.ties
            for pair in selection.pairs:
                rows = tuple(
                    make_row(group, usable[i][0], score=usable[i][2])
                    for i in (pair.chosen, pair.rejected)
                )
                examples.append(Example(rows=rows, scalars={"margin": pair.margin}))
        metrics = {"pairs/kept": float(len(examples)), "pairs/ties": float(ties)}
        if examples:
            margins = [example.scalars["margin"] for example in examples]
            metrics["pairs/margin_mean"] = float(np.mean(margins))
        no_signal = tie_share(len(examples), ties)
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=no_signal)

    def loss(self, objective: str = "policy") -> Loss:
        """Return INPO's squared error."""
        return self._loss
