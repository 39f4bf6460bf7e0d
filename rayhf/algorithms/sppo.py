"""SPPO: self-play against the current policy, as regression onto win probabilities.

Wu et al. 2024. The win matrix is kept as the scorer gave it (cycles included); P(win) is its row
mean. Metrics to watch: sppo/target_abs (the size of the targets), sppo/residual_abs (the error of
the regression) and, on the tiny game, game/exploitability_average.

With `payoff: log_odds` this is GPO, general preference optimization (Zhang et al. 2024,
2410.02197): the target is not P(win) - 1/2 but the preference score s(y beats the policy), the mean
over its samples y' of log(P(y beats y') / P(y' beats y)). For a general preference model that is
v_y^T R v_y' / temperature, for a reward model the difference of two rewards. In the authors' code
a table of scores (compute_score_from_raw.py) takes the place of the probabilities in SPPO; it has
s(y, y') - s(y', y), which is twice this score, with the same eta of 1000. Its loss is not part of
their repository, so that a bound of the targets (clamp_thres) could not be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_compare,
    scored,
    tie_share,
    with_ties,
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
from rayhf.types import Example, Group, Prompt, make_row, win_rates

MAX_LOG_ODDS = 10.0
"""The largest score of the authors' models: embeddings of norm 1, temperature 0.1 (GPO)."""


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
    payoff: Literal["win_rate", "log_odds"] = "win_rate"
    """What a comparison is worth. win_rate: P(win) - 1/2. log_odds: log(P(win) / P(loss)), the
    score of a general preference model (GPO, Zhang et al. 2024); not for verdicts of 0 and 1."""
    min_margin: NonNegativeFloat = 0.0
    """Difference between a prompt's best and worst payoff up to which it is a tie; ties are dropped
    and counted."""
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
        if self.payoff == "log_odds" and self.target == "hard":
            raise ValueError(
                "target hard replaces P(win) by 1 and 0, whose log-odds are infinite; payoff "
                "log_odds expects soft or single"
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
            usable = self._rated(group)
            if len(usable) < 2:
                small += 1
                continue
            # Of equals, max and min take the first: reproducible.
            best = max(usable, key=lambda rated: rated.payoff)
            worst = min(usable, key=lambda rated: rated.payoff)
            if best.payoff - worst.payoff <= self.config.min_margin:
                ties += 1
                continue
            spreads.append(best.payoff - worst.payoff)
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

    def _rated(self, group: Group) -> list[_Rated]:
        """Return the completions that have a win rate, with their payoffs."""
        if self.config.payoff == "win_rate":
            return [_Rated(i, rate, rate - 0.5) for i, _, rate in scored(group)]
        if group.compared is None:
            return []
        completions = [sample.completion.token_ids.tolist() for sample in group.samples]
        odds = log_odds(with_ties(group.compared.win, completions))
        payoffs = win_rates(odds, include_self=True)
        return [_Rated(i, rate, float(payoffs[i])) for i, _, rate in scored(group)]

    def _examples(
        self, group: Group, usable: Sequence[_Rated], best: _Rated, worst: _Rated
    ) -> list[Example]:
        if self.config.train_on == "all":
            return [self._example(group, [rated]) for rated in usable]
        if self.config.target == "soft":
            return [self._example(group, [best, worst])]
        payoff = 0.5
        if self.config.target == "single":
            assert group.compared is not None  # otherwise no sample would have a score
            win = float(group.compared.win[best.index, worst.index])
            if not np.isfinite(win):
                # The two were never compared with each other: only their payoffs are known.
                payoff = (best.payoff - worst.payoff) / 2.0
            else:
                payoff = float(log_odds(win)) if self.config.payoff == "log_odds" else win - 0.5
        pair = [replace(best, payoff=payoff), replace(worst, payoff=-payoff)]
        return [self._example(group, pair)]

    def _example(self, group: Group, rated: Sequence[_Rated]) -> Example:
        """Return one example with a row per completion; its target is the payoff."""
        rows = []
        for each in rated:
            row = make_row(group, each.index, score=each.rate)
            rows.append(replace(row, scalars={**row.scalars, "target": each.payoff}))
        return Example(rows=tuple(rows))

    def loss(self, objective: str = "policy") -> Loss:
        """Return SPPO's squared error."""
        return self._loss


@dataclass(frozen=True, slots=True)
class _Rated:
    """A completion's win rate and payoff against the policy."""

    index: int
    rate: float
    payoff: float


def log_odds(win: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return log(P / (1 - P)) of win probabilities, at most MAX_LOG_ODDS in size; NaN stays."""
    # clip() keeps NaN.
    least = 1.0 / (1.0 + np.exp(MAX_LOG_ODDS))
    probability = np.clip(np.asarray(win, dtype=np.float64), least, 1.0 - least)
    odds: npt.NDArray[np.float64] = np.log(probability) - np.log1p(-probability)
    return odds
