"""Estimates with confidence intervals, and what several samples of a prompt say.

Completions of one prompt are not independent, so that every interval is a bootstrap over prompts:
the percentile interval of Efron 1979, 95 %, with a fixed seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
LEVEL = 0.95
RESAMPLES = 2_000
_BOUNDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_DRAWN = 1_000_000
"""Prompts that are drawn at a time: they are in memory together."""
_SUBSETS = 200
"""Random subsets of a prompt's samples for maj@k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    """NaN, as `high`, where there is only one prompt: nothing is known about the spread."""
    high: float
    count: int
    """Prompts that it is an estimate from."""

    @property
    def interval(self) -> str:
        """The interval as text."""
        return "unknown" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"

    def to_json(self) -> dict[str, float | int | None]:
        """Return JSON values; an unknown bound is null."""
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {k: None if math.isnan(v) else v for k, v in bounds.items()} | {"count": self.count}


def bootstrap(
    statistic: Callable[[Indices], float],
    count: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of prompts and its interval.

    Args:
        statistic: figure of the prompts with these indices, which may repeat.
        count: number of prompts.
        resamples: number of draws of `count` prompts.
        seed: of the draws.

    Raises ValueError for no prompts.
    """
    if not count:
        raise ValueError("an estimate needs at least one prompt")
    value = statistic(np.arange(count))
    if count == 1:
        return Estimate(value=value, low=math.nan, high=math.nan, count=1)
    random = np.random.default_rng(seed)
    draws = [statistic(random.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.nanquantile(draws, _BOUNDS)
    return Estimate(value=value, low=float(low), high=float(high), count=count)


def mean_estimate(values_P: npt.ArrayLike, weights_P: npt.ArrayLike | None = None) -> Estimate:
    """Return the (weighted) mean over prompts with its interval: (P,), (P,).

    Raises ValueError for no prompts.
    """
    values = np.asarray(values_P, dtype=np.float64)
    weights = np.ones_like(values) if weights_P is None else np.asarray(weights_P, np.float64)
    return mean_estimates(values[None], weights[None])[0]


def mean_estimates(values_MP: Array, weights_MP: Array) -> list[Estimate]:
    """Return the weighted means of several figures of as many prompts: (M, P), (M, P).

    Together they take little longer than one of them. Raises ValueError for no prompts.
    """
    count = values_MP.shape[1]
    if not count:
        raise ValueError("an estimate needs at least one prompt")
    sums_M = weights_MP.sum(axis=1)
    means_M = np.where(sums_M > 0, (values_MP * weights_MP).sum(axis=1), math.nan) / sums_M
    if count == 1:
        return [Estimate(value=float(m), low=math.nan, high=math.nan, count=1) for m in means_M]
    bounds = np.nanquantile(mean_draws(values_MP, weights_MP), _BOUNDS, axis=0)
    return [
        Estimate(value=float(mean), low=float(low), high=float(high), count=count)
        for mean, low, high in zip(means_M, *bounds, strict=True)
    ]


def difference_of_means(before: Sequence[Array], after: Sequence[Array]) -> Estimate:
    """Return the change of a weighted mean between different prompts, with its interval.

    Args:
        before: values and weights of the first prompts, (P,) each, at least two.
        after: the same of the others.
    """
    draws = []
    means = []
    for seed, (values, weights) in enumerate((before, after)):
        draws.append(mean_draws(values[None], weights[None], seed=seed)[:, 0])
        means.append(float(np.average(values, weights=weights)))
    low, high = np.quantile(draws[1] - draws[0], _BOUNDS)
    count = len(after[0])
    return Estimate(value=means[1] - means[0], low=float(low), high=float(high), count=count)


def mean_draws(values_MP: Array, weights_MP: Array, *, seed: int = 0) -> Array:
    """Return the weighted means of RESAMPLES draws of P prompts: (M, P), (M, P) -> (R, M)."""
    count = values_MP.shape[1]
    random = np.random.default_rng(seed)
    total_MP = values_MP * weights_MP
    size = max(1, _DRAWN // count)
    means = []
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        chosen = random.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count)
        with np.errstate(invalid="ignore"):  # a draw without weight: NaN
            means.append((times @ total_MP.T) / (times @ weights_MP.T))
    drawn: Array = np.concatenate(means)
    return drawn


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of P(at least one of k samples is correct).

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (2107.03374), eq. 1. Raises ValueError for k > n.
    """
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, and there are {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(
    answers: Sequence[Hashable | None], scores: Sequence[float], k: int, *, seed: int = 0
) -> float:
    """Return the expected score of the most frequent answer among k samples.

    Self-consistency (Wang et al. 2022, 2203.11171). A sample without an answer (None) does not
    vote; without any vote the score is 0, and answers with equal votes count by their mean. For
    k < n: the mean over 200 seeded subsets without replacement. Raises ValueError for k > n.
    """
    samples = len(answers)
    if not 0 < k <= samples:
        raise ValueError(f"maj@{k} needs at least {k} samples, and there are {samples}")
    if k == samples:
        return _majority(answers, scores, range(samples))
    random = np.random.default_rng(seed)
    subsets = (random.choice(samples, size=k, replace=False) for _ in range(_SUBSETS))
    return float(np.mean([_majority(answers, scores, subset) for subset in subsets]))


def _majority(
    answers: Sequence[Hashable | None], scores: Sequence[float], chosen: Sequence[int] | Indices
) -> float:
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for index in chosen:
        answer = answers[index]
        if answer is not None:
            votes[answer].append(scores[index])
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(own) for own in votes.values() if len(own) == most]))
