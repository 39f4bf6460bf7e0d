"""XPO: online DPO with an exploration bonus on the initial policy's completions.

Xie et al. 2024 (2405.21046), algorithm 1: of each prompt one completion is the policy's and one the
initial policy's; the two are a preference pair, and the loss has the term alpha * log p(y) of the
initial policy's (rayhf/losses/xpo.py). The initial policy generates with engines of its own, whose
weights never change (rollout.engines of them).

What differs from the paper: an iteration trains on its own pairs only (the paper's on those of all
iterations so far, TRL's as here), and a tie has neither pair nor bonus. Metrics to watch:
xpo/initial_chosen (falls below 1/2 as the policy improves) and xpo/initial_logp.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import NonNegativeFloat, model_validator

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.online_dpo import PairedAlgorithm, PairedConfig, Rng
from rayhf.algorithms.pair_selection import PairSelection, best_worst
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.xpo import XPOLoss
from rayhf.types import Example, Group, Prompt, Row, Sample, TokenArray

INITIAL = "initial"
"""Name of the frozen policy, and kind of its samples."""


class XPOConfig(PairedConfig):
    """Exploratory preference optimization (Xie et al. 2024)."""

    type: str = "xpo"
    samples: Literal[2] = 2
    """Completions per prompt: one of the policy and one of the initial policy."""
    alpha: NonNegativeFloat = 1e-5
    """Weight of the exploration bonus (TRL's default); 0 is online DPO against the initial
    policy."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference.type != "initial":
            raise ValueError(
                f"reference: xpo compares with the initial policy, and {self.reference.type} "
                "moves; expected {type: initial}"
            )
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a reference that is not the initial policy. Raises ConfigError."""
        model = campaign.reference.model
        if model not in (None, campaign.policy.model):
            raise ConfigError(
                f"reference.model is {model}, but xpo's reference is the initial policy, which "
                "generates the completions to compare with; expected to be left out"
            )


class XPO(PairedAlgorithm):
    """XPO: online DPO with an exploration bonus, against the initial policy (Xie et al. 2024)."""

    Config = XPOConfig
    frozen_policies = (INITIAL,)

    def __init__(self, config: XPOConfig) -> None:
        super().__init__(config)
        self.config = config
        self._bonus_loss = XPOLoss(self._loss, config.alpha)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw a completion of the policy and one of the initial policy, and score them."""
        own, initial = await asyncio.gather(context.sample(1), context.sample(1, policy=INITIAL))
        outcomes = await context.score((*own, *initial))
        samples = zip(("answer", INITIAL), (*own, *initial), outcomes, strict=True)
        return Group(
            prompt=prompt,
            samples=tuple(Sample(completion=c, outcome=o, kind=kind) for kind, c, o in samples),
        )

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair the two completions of each prompt; add the pairs that people labeled."""
        selection = super().select(groups, context)
        return replace(selection, examples=tuple(map(_marked, selection.examples)))

    @property
    def pairing(self) -> str:
        """Name of the pairing rule."""
        return INITIAL

    def pairs(
        self, scores: list[float], completions: Sequence[TokenArray], rng: Rng
    ) -> PairSelection:
        """Pair the two completions, the better one first."""
        keys = [completion.tobytes() for completion in completions]
        return best_worst(scores, self.config.min_margin, keys)

    def loss(self, objective: str = "policy") -> Loss:
        """Return the preference loss with the exploration bonus."""
        return self._bonus_loss


def _marked(example: Example) -> Example:
    """Say which of the rows is the initial policy's; its sampling is not to be corrected for."""
    chosen, rejected = (float(row.sample == 1) for row in example.rows)
    return replace(
        example,
        rows=tuple(_not_own(row) if row.sample == 1 else row for row in example.rows),
        scalars={**example.scalars, "chosen_initial": chosen, "rejected_initial": rejected},
    )


def _not_own(row: Row) -> Row:
    return row.with_tokens(behavior_logp=np.full(len(row.response_ids), np.nan, dtype=np.float32))
