"""Over-optimization of a proxy scorer by best-of-n sampling (Gao et al. 2022, 2210.10760).

In: scores of N samples of each prompt by the proxy and by a held-out judge. Out: for each n the
expected score, under both, of the sample that the proxy prefers among n, at the KL divergence
log n - (n - 1) / n from the policy that sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayhf.evaluation.statistics import Array, Estimate, mean_estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """One point of the curve."""

    n: int
    kl: float
    """Nats."""
    proxy: Estimate
    judge: Estimate
    gain: Estimate
    """The judge's score above that of one random sample (n = 1), prompt by prompt."""


def best_of_n_curve(proxy_PN: Array, judge_PN: Array, sizes: Sequence[int]) -> list[BestOfN]:
    """Return a point for each n of `sizes`: (P, N), (P, N).

    Unbiased: over all subsets of n of the N samples, the one with rank j by the proxy (from 0, the
    worst) is the best with probability C(j, n - 1) / C(N, n). Equal proxy scores are in the
    samples' order, which is random. Raises ValueError for an n above N.
    """
    samples = proxy_PN.shape[1]
    order = np.argsort(proxy_PN, axis=1, kind="stable")
    proxy = np.take_along_axis(proxy_PN, order, axis=1)
    judge = np.take_along_axis(judge_PN, order, axis=1)
    points = []
    for n in sizes:
        if not 0 < n <= samples:
            raise ValueError(f"best of {n} needs at least {n} samples, and there are {samples}")
        total = math.comb(samples, n)
        weights = np.array([math.comb(j, n - 1) / total for j in range(samples)])
        points.append(
            BestOfN(
                n=n,
                kl=math.log(n) - (n - 1) / n,
                proxy=mean_estimate(proxy @ weights),
                judge=mean_estimate(judge @ weights),
                gain=mean_estimate(judge @ weights - judge.mean(1)),
            )
        )
    return points
