"""SPPO: self-play against the current policy, as regression onto win probabilities.

Wu et al. 2024. The win matrix is kept as the scorer gave it (cycles included); P(win) is its row
mean. Metrics to watch: sppo/target_abs (the size of the targets), sppo/residual_abs (the error of
the regression) and, on the tiny game, game/exploitability_average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

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
from rayhf.config.algorithms import (
    AlgorithmConfig,
    PreviousReference,
    ReferenceSchedule,
    refuse_staleness,
    require_win_rates,
)
from rayhf.config.schema import CampaignConfig
from rayhf.losses.base import Loss
from rayhf.losses.selfplay import SPPOLoss
from rayhf.types import Example, Group, Prompt, make_row


class SPPOConfig(AlgorithmConfig):
    """Self-play preference optimization (Wu et al. 2024)."""

    type: str = "sppo"
    samples: Annotated[int, Field(ge=2)] = 5
    """Completions per prompt; they represent the current policy as the opponent."""
    eta: PositiveFloat = 1000.0
    """Step size of the multiplicative-weights update; the authors' beta is 1 / eta."""
    target: Literal["soft", "single", "hard"] = "soft"
    """Win probability to regress onto. soft: P(win) against the current policy. single: P(best wins
    against worst). hard: 1 and 0. The last two need train_on: best_worst."""
    train_on: Literal["best_worst", "all"] = "best_worst"
    """Completions to train on. best_worst: two per prompt, as the authors' code. all: every one,
    which uses all comparisons."""
    min_margin: NonNegativeFloat = 0.0
    """Difference between a prompt's best and worst win probability up to which it is a tie; ties
    are dropped and counted."""
    pull: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the log-ratio to the initial policy that an iteration takes back. A step of 0 (the
    paper) lets an answer die out, which is then never sampled again: above 0 the last policy stays
    near a Nash policy with a pull. Expects reference: {type: initial}."""
    reference: ReferenceSchedule = PreviousReference()
    """Schedule of the reference."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse samples of earlier weights, and scores without win rates. Raises ConfigError."""
        refuse_staleness(campaign, "regresses onto win rates against the current policy's samples")
        require_win_rates(campaign)

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.pull and self.reference.type != "initial":
            raise ValueError(
                f"pull {self.pull:g} is toward the initial policy, and the reference is "
                f"{self.reference.type}; expected reference: {{type: initial}}"
            )
        if self.train_on == "all" and self.target != "soft":
            raise ValueError(
                f"target {self.target} is about a best and a worst completion; "
                "train_on all expects soft"
            )
        return self


class SPPO(AlgorithmBase):
    """SPPO: regression of log-ratios onto win rates against the policy itself (Wu et al. 2024)."""

    Config = SPPOConfig

    def __init__(self, config: SPPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self.needs_old_logp = config.pull > 0
        self._loss = SPPOLoss(eta=config.eta, pull=config.pull)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and compare each with every other."""
        return await sample_and_compare(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the completions to train on, each with its target P(win) - 1/2."""
        examples: list[Example] = []
        ties = 0
        small = 0
        spreads = []
        for group in groups:
            usable = [(i, rate) for i, _, rate in scored(group)]
            if len(usable) < 2:
                small += 1
                continue
            # Of equals, max and min take the first: reproducible.
            best = max(usable, key=lambda entry: entry[1])
            worst = min(usable, key=lambda entry: entry[1])
            if best[1] - worst[1] <= self.config.min_margin:
                ties += 1
                continue
            spreads.append(best[1] - worst[1])
            examples += self._examples(group, usable, best, worst)
        metrics = {
            "sppo/ties": float(ties),
            "sppo/dropped": float(small),
            "sppo/kept": float(len(spreads)),
        }
        if spreads:
            metrics["sppo/spread_mean"] = float(np.mean(spreads))
        no_signal = tie_share(len(spreads), ties)
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=no_signal)

    def _examples(
        self,
        group: Group,
        usable: Sequence[tuple[int, float]],
        best: tuple[int, float],
        worst: tuple[int, float],
    ) -> list[Example]:
        if self.config.train_on == "all":
            return [self._example(group, [(i, rate, rate - 0.5)]) for i, rate in usable]
        assert group.compared is not None  # otherwise no sample would have a score
        if self.config.target == "soft":
            best_target = best[1] - 0.5
            worst_target = worst[1] - 0.5
        elif self.config.target == "single":
            probability = float(group.compared.win[best[0], worst[0]])
            if not np.isfinite(probability):
                # The two were never compared with each other: only their rates are known.
                probability = 0.5 + (best[1] - worst[1]) / 2.0
            best_target = probability - 0.5
            worst_target = 0.5 - probability
        else:
            best_target = 0.5
            worst_target = -0.5
        return [self._example(group, [(*best, best_target), (*worst, worst_target)])]

    def _example(self, group: Group, rated: Sequence[tuple[int, float, float]]) -> Example:
        """Return one example with a row per (sample index, win rate, target)."""
        rows = []
        for index, rate, target in rated:
            row = make_row(group, index, score=rate)
            rows.append(replace(row, scalars={**row.scalars, "target": target}))
        return Example(rows=tuple(rows))

    def loss(self, objective: str = "policy") -> Loss:
        """Return SPPO's squared error."""
        return self._loss
