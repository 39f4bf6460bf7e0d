"""Win rates against a baseline, raw and length-controlled, and a ranking of several policies.

In: per prompt the probability that the policy's answer beats the baseline's (1/2 is a tie), and the
answers' lengths in characters. Out: estimates with bootstrap intervals over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayhf.evaluation.statistics import LEVEL, RESAMPLES, Array, Estimate, Indices, bootstrap

_RIDGE = 1e-3
"""Penalty on squared coefficients other than the intercept, in log-odds per comparison: it keeps
the fit finite where lengths or difficulties separate wins from losses."""
_STEPS = 50
_TOLERANCE = 1e-10
_LC_RESAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Duels:
    """Comparisons of a policy's answers with a baseline's, one row each."""

    win_D: Array
    """Probability that the policy's answer is better."""
    length_gap_D: Array
    """Characters of the policy's answer minus those of the baseline's."""
    prompt_D: Indices
    """Index of the prompt, from 0; every prompt has a comparison."""
    difficulty_D: Array | None = None
    """Difficulty of the instruction, estimated elsewhere; None leaves the term out."""

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return int(self.prompt_D.max()) + 1 if len(self.prompt_D) else 0


def win_rate(duels: Duels) -> Estimate:
    """Return the mean win probability; a tie counts one half."""
    rows = _rows_by_prompt(duels)

    def mean(chosen: Indices) -> float:
        return float(duels.win_D[_taken(rows, chosen)].mean())

    return bootstrap(mean, duels.prompts)


def ties(duels: Duels) -> float:
    """Return the share of comparisons without a better answer."""
    return float(np.isclose(duels.win_D, 0.5).mean())


def length_controlled(duels: Duels) -> Estimate:
    """Return the win rate that answers of the baseline's lengths would have.

    Dubois et al. 2024 (2404.04475), eq. 2, for one policy and one baseline. A logistic regression
    on all comparisons,

        logit P(win) = theta + phi tanh(gap / std(gap)) + psi difficulty,

    where gap is the difference of the lengths in characters and std its sample standard deviation;
    the win rate is the mean of sigmoid(theta + psi difficulty), the fit with a gap of 0. Targets
    are win probabilities. As in AlpacaEval 2.0 the intercept is not penalized. Different from it:
    phi and psi have a small fixed ridge penalty, where AlpacaEval selects an L1 penalty by
    cross-validation; its two artificial baselines, which exist for its own prompts only, are left
    out; and the difficulty term is left out where no difficulties are given.

    The bootstrap repeats the fit and the standardization.
    """
    return bootstrap(_controlled_rate(duels), duels.prompts, resamples=_LC_RESAMPLES)


def length_controlled_difference(before: Duels, after: Duels) -> Estimate:
    """Return the change of the length-controlled win rate, paired by prompt.

    Both have the same prompts under the same indices. The bootstrap draws prompts, and fits both
    win rates to the same draw.
    """
    earlier = _controlled_rate(before)
    later = _controlled_rate(after)

    def change(chosen: Indices) -> float:
        return later(chosen) - earlier(chosen)

    return bootstrap(change, after.prompts, resamples=_LC_RESAMPLES)


def _controlled_rate(duels: Duels) -> Callable[[Indices], float]:
    """Return the length-controlled win rate as a function of prompts, which may repeat."""
    rows = _rows_by_prompt(duels)

    def controlled(chosen: Indices) -> float:
        taken = _taken(rows, chosen)
        gap = duels.length_gap_D[taken]
        spread = float(gap.std(ddof=1)) if len(gap) > 1 else 0.0
        terms = [np.ones(len(gap)), np.tanh(gap / spread) if spread else np.zeros(len(gap))]
        if duels.difficulty_D is not None:
            terms.append(duels.difficulty_D[taken])
        design = np.stack(terms, axis=1)
        coefficients = logistic_fit(design, duels.win_D[taken])
        design[:, 1] = 0.0
        return float(sigmoid(design @ coefficients).mean())

    return controlled


def logistic_fit(design_DF: Array, target_D: Array, *, ridge: float = _RIDGE) -> Array:
    """Return the coefficients of a logistic regression: (D, F), (D,) -> (F,).

    Newton's method on the mean cross-entropy with targets in [0, 1], plus ridge / 2 times the
    squares of all coefficients but the first. Where all targets are 0 or all are 1 the first grows
    until its effect is below the tolerance.
    """
    count, features = design_DF.shape
    coefficients: Array = np.zeros(features)
    penalty = np.full(features, ridge)
    penalty[0] = 0.0
    for _ in range(_STEPS):
        predicted = sigmoid(design_DF @ coefficients)
        gradient = design_DF.T @ (predicted - target_D) / count + penalty * coefficients
        weights = predicted * (1.0 - predicted)
        hessian = (design_DF.T * weights) @ design_DF / count + np.diag(penalty + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        # Newton's step overshoots far from the solution: at most 2 in log-odds at a time.
        coefficients = coefficients - step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(gradient).max() < _TOLERANCE:
            break
    return coefficients


def sigmoid(values: Array) -> Array:
    """Return the logistic function without overflow."""
    result: Array = np.exp(-np.logaddexp(0.0, -values))
    return result


# ----------------------------------------------------------------------------------------- ranking


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A policy's place in a ranking."""

    name: str
    strength: Estimate
    """Log-odds; the mean over all policies is 0."""

    @property
    def rating(self) -> float:
        """The strength as an Elo number: 1000 is the mean, 400 points are odds of 10."""
        return 1000.0 + 400.0 / math.log(10.0) * self.strength.value


def bradley_terry(
    wins_PMM: Array, names: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Ranked]:
    """Return the policies by strength, the best first: (P, M, M).

    wins_PMM[p, i, j] is how often i beat j on prompt p, a tie one half for each; 0 in both
    directions where they were not compared. Maximum likelihood of P(i beats j) =
    sigmoid(strength_i - strength_j) (Bradley and Terry 1952) by Newton's method. Every compared
    pair has one tie more than it was given, so that a policy that wins every comparison has a
    finite strength. Intervals: bootstrap over prompts.

    Raises ValueError where some policies were never compared, directly or through others.
    """
    total = wins_PMM.sum(0)
    compared = (total + total.T) > 0
    if missing := _unconnected(compared):
        apart = ", ".join(names[index] for index in missing)
        raise ValueError(f"{apart} shares no comparison with the others, directly or through them")
    strengths = _strengths(total, compared)
    prompts = len(wins_PMM)
    if prompts == 1:
        low = high = np.full(len(names), math.nan)
    else:
        random = np.random.default_rng(seed)
        draws = [
            _strengths(wins_PMM[random.integers(prompts, size=prompts)].sum(0), compared)
            for _ in range(resamples)
        ]
        low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    ranked = [
        Ranked(
            name=name,
            strength=Estimate(
                value=float(strengths[i]), low=float(low[i]), high=float(high[i]), count=prompts
            ),
        )
        for i, name in enumerate(names)
    ]
    return sorted(ranked, key=lambda each: -each.strength.value)


def _strengths(wins_MM: Array, compared_MM: npt.NDArray[np.bool_]) -> Array:
    wins = wins_MM + 0.5 * compared_MM
    np.fill_diagonal(wins, 0.0)
    return fit_strengths(wins)


def fit_strengths(wins_MM: Array) -> Array:
    """Return Bradley-Terry strengths in log-odds, with mean 0: (M, M) -> (M,).

    wins_MM[i, j] is how often i beat j, 0 on the diagonal. Everyone must be connected to everyone
    by a chain of wins, and by one of losses: otherwise the strengths are not finite.
    """
    size = len(wins_MM)
    games = wins_MM + wins_MM.T
    strength: Array = np.zeros(size)
    for _ in range(_STEPS):
        probability = sigmoid(strength[:, None] - strength[None, :])
        expected = games * probability
        gradient = wins_MM.sum(1) - expected.sum(1)
        weights = expected * (1.0 - probability)
        hessian = np.diag(weights.sum(1)) - weights
        # The likelihood does not depend on the mean strength: 0 is added as a constraint.
        step = np.linalg.solve(hessian + 1.0 / size, gradient)
        strength = strength + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(gradient).max() < 1e-9:
            break
    centered: Array = strength - strength.mean()
    return centered


def _unconnected(compared_MM: npt.NDArray[np.bool_]) -> list[int]:
    """Return the policies that no chain of comparisons connects to the first."""
    reached = {0}
    frontier = [0]
    while frontier:
        here = frontier.pop()
        for other in np.flatnonzero(compared_MM[here]):
            if int(other) not in reached:
                reached.add(int(other))
                frontier.append(int(other))
    return [index for index in range(len(compared_MM)) if index not in reached]


def win_summary(duels: Duels) -> Mapping[str, Estimate]:
    """Return the raw and the length-controlled win rate."""
    return {"win_rate": win_rate(duels), "win_rate_length_controlled": length_controlled(duels)}


def _rows_by_prompt(duels: Duels) -> list[Indices]:
    return [np.flatnonzero(duels.prompt_D == prompt) for prompt in range(duels.prompts)]


def _taken(rows: Sequence[Indices], chosen: Indices) -> Indices:
    """Return the rows of the chosen prompts, a prompt's rows as often as it was chosen."""
    return np.concatenate([rows[prompt] for prompt in chosen])
