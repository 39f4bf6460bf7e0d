"""MNPO: INPO against a population of past policies instead of the current one alone.

Wu et al. 2025 (2509.23102), Multiplayer Nash Preference Optimization, the time-dependent form
TD-MNPO of section 3.2, with squared distance. With gap(q) = log q(chosen) - log q(rejected), the
current policy p_0 (that before the iteration), past ones p_1, p_2, ..., and weights w with sum 1:

    H    = gap(p) - tau/eta * gap(p_ref) - (1 - tau/eta) * sum_j w_j gap(p_j)
    loss = (H - 1 / (2 eta))^2

It is that of the authors' code (mnpo_trainer.py; there tau / eta is `ratio`), and INPO's where the
current policy is the only opponent. The opponents enter through their log-probs: as there, the
current policy's samples are compared with each other, none are drawn from past policies.

What differs from that code, which was read, not run:
- As long as there are fewer past policies, the initial policy has the place of those that lack. The
  code normalizes the weights of those that there are; it has no opponent in its first iteration,
  and after more than two it reads the oldest policies, not the newest.
- Log-probs are summed over a completion's tokens, as in the paper; the code takes their mean.
- The loss is scaled as INPO's (rayhf/losses/selfplay.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import NonNegativeFloat, model_validator

from rayhf.algorithms.inpo import INPO, INPOConfig
from rayhf.config.algorithms import PopulationConfig
from rayhf.losses.selfplay import INPOLoss
from rayhf.types import Example, Row

OPPONENT = "opponent_logp"
"""Token value: weighted mean of the opponents' log-probs, in nats."""


class MNPOConfig(INPOConfig):
    """Multiplayer Nash preference optimization (Wu et al. 2025, TD-MNPO).

    eta and tau are those of the authors' configs: 0.0075, and a third of it.
    """

    type: str = "mnpo"
    population: PopulationConfig = PopulationConfig()
    """Past policies. The authors' configs have two opponents in all (max_history_t)."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Weights of the opponents, the current policy's first, then those of the past ones, newest
    first; scaled to add up to 1. Default: equal, as in the authors' code."""

    @property
    def shares(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Weights that add up to 1: (1 + population.size,)."""
        weights = self.weights or (1.0,) * (1 + self.population.size)
        return np.array([weight / sum(weights) for weight in weights])

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        opponents = 1 + self.population.size
        if self.weights is not None and (
            len(self.weights) != opponents or not sum(self.weights) > 0
        ):
            raise ValueError(
                f"weights: {list(self.weights)} are {len(self.weights)} with the sum "
                f"{sum(self.weights):g}; expected {opponents} with a sum above 0: of the current "
                f"policy and population.size {self.population.size}"
            )
        return self


class MNPO(INPO):
    """MNPO: INPO against a population of past policies (Wu et al. 2025)."""

    Config = MNPOConfig

    def __init__(self, config: MNPOConfig) -> None:
        super().__init__(config)
        self.population = config.population
        self._shares = config.shares
        self._loss = INPOLoss(eta=config.eta, tau=config.tau, opponent=OPPONENT, name="mnpo")

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Add the opponents' weighted mean log-prob to every token."""
        credited = [
            replace(example, rows=tuple(map(self._with_opponent, example.rows)))
            for example in examples
        ]
        past = [len(_opponents(row)) - 1 for example in examples[:1] for row in example.rows[:1]]
        return credited, {"mnpo/past": float(past[0])} if past else {}

    def _with_opponent(self, row: Row) -> Row:
        opponents = _opponents(row)
        # The oldest one that there is is the initial policy where any lack.
        opponents += [opponents[-1]] * (len(self._shares) - len(opponents))
        mean = np.tensordot(self._shares, np.array(opponents, dtype=np.float64), axes=1)
        return row.with_tokens(**{OPPONENT: mean.astype(np.float32)})


def _opponents(row: Row) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Return the log-probs of the current policy and of the past ones, newest first: (T,) each."""
    past = [name for name in row.tokens if name.startswith("past_logp_")]
    return [row.tokens[name] for name in ("old_logp", *sorted(past, key=_number))]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
