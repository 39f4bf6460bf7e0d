"""Which of one prompt's scored answers become preference pairs. Pure functions: scores in, indices
out.

A pair whose scores differ by at most `min_margin`, or whose answers are the same, is a tie: an
equal score is no preference. Ties are dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayhf.algorithms.advantages import finite
from rayhf.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """Indices into the scores, and how much better the chosen one is (above min_margin)."""

    chosen: int
    rejected: int
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSelection:
    pairs: tuple[ScoredPair, ...]
    ties: int
    """Pairs that were considered and dropped: margin at most min_margin, or the same answer
    twice."""


class _Group:
    """One prompt's scores and answers, and the one rule for what is a pair."""

    def __init__(
        self, scores: npt.ArrayLike, min_margin: float, answers: Sequence[Hashable] | None
    ) -> None:
        # A prompt has a handful of scores: numpy would take ten times as long to look at them.
        self.scores: list[float]
        if isinstance(scores, list) and all(map(math.isfinite, scores)):
            self.scores = scores
        else:
            self.scores = finite(scores, "scores").tolist()
        if not (math.isfinite(min_margin) and min_margin >= 0.0):
            raise ConfigError(
                f"algorithm.min_margin: {min_margin} must be finite and at least 0; try 0.0"
            )
        if answers is not None and len(answers) != len(self.scores):
            raise ValueError(f"{len(answers)} answers for {len(self.scores)} scores")
        self.min_margin = min_margin
        self.answers = answers

    def pair(self, better: int, worse: int) -> ScoredPair | None:
        """None for a tie."""
        margin = self.scores[better] - self.scores[worse]
        same = self.answers is not None and self.answers[better] == self.answers[worse]
        return (
            None
            if same or margin <= self.min_margin
            else ScoredPair(chosen=better, rejected=worse, margin=margin)
        )

    def ranking(self) -> list[int]:
        """Best first; equal scores in the order they came, so that the result is reproducible."""
        return sorted(range(len(self.scores)), key=self.scores.__getitem__, reverse=True)


def best_worst(
    scores: npt.ArrayLike, min_margin: float = 0.0, answers: Sequence[Hashable] | None = None
) -> PairSelection:
    """The highest against the lowest score: one pair, or one tie. Fewer than two samples give
    neither.

    `answers` (for example the token ids) makes a pair of identical answers a tie, whatever a noisy
    scorer said of them.
    """
    group = _Group(scores, min_margin, answers)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    ranking = group.ranking()
    pair = group.pair(ranking[0], ranking[-1])
    return PairSelection(pairs=(), ties=1) if pair is None else PairSelection(pairs=(pair,), ties=0)


def all_pairs(
    scores: npt.ArrayLike, min_margin: float = 0.0, answers: Sequence[Hashable] | None = None
) -> PairSelection:
    """Every better against every worse score: at most K * (K - 1) / 2 pairs, best chosen first,
    then lowest rejected last.
    """
    group = _Group(scores, min_margin, answers)
    ranking = group.ranking()
    candidates = [
        group.pair(better, worse) for i, better in enumerate(ranking) for worse in ranking[i + 1 :]
    ]
    pairs = tuple(pair for pair in candidates if pair is not None)
    return PairSelection(pairs=pairs, ties=len(candidates) - len(pairs))


def best_random(
    scores: npt.ArrayLike,
    rng: np.random.Generator,
    min_margin: float = 0.0,
    answers: Sequence[Hashable] | None = None,
) -> PairSelection:
    """The highest score against a uniformly drawn other one of those it beats: one pair, or one tie
    where it beats none.

    `rng` comes from a derived seed (campaign seed, iteration, prompt id), so that arrival order
    cannot matter.
    """
    group = _Group(scores, min_margin, answers)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    best, *others = group.ranking()
    beaten = [pair for pair in (group.pair(best, other) for other in others) if pair is not None]
    if not beaten:
        return PairSelection(pairs=(), ties=1)
    return PairSelection(pairs=(beaten[int(rng.integers(len(beaten)))],), ties=0)


def best_second(
    scores: npt.ArrayLike, min_margin: float = 0.0, answers: Sequence[Hashable] | None = None
) -> PairSelection:
    """The highest against the second highest score, answers equal to the best skipped: one pair, or
    one tie."""
    group = _Group(scores, min_margin, answers)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    best, *others = group.ranking()
    if answers is not None:
        others = [other for other in others if answers[other] != answers[best]] or others
    pair = group.pair(best, others[0])
    return PairSelection(pairs=(), ties=1) if pair is None else PairSelection(pairs=(pair,), ties=0)


def length_penalized(scores: npt.ArrayLike, lengths: Sequence[int], penalty: float) -> list[float]:
    """score - penalty * length, against the drift of best-of-n pairs towards length (RLHFlow's
    max_min_p; lengths in tokens here, in characters there)."""
    values = finite(scores, "scores")
    if len(lengths) != values.size:
        raise ValueError(f"{len(lengths)} lengths for {values.size} scores")
    return [float(v - penalty * n) for v, n in zip(values, lengths, strict=True)]


def rso_accept(
    scores: npt.ArrayLike, temperature: float, keep: int, rng: np.random.Generator
) -> list[int]:
    """Statistical rejection sampling: indices of `keep` answers that follow the optimum of the
    KL-regularized reward.

    Liu et al. 2023 (RSO), algorithm 1: draw a candidate uniformly from those left, accept it with
    probability exp((score - best score left) / temperature), until `keep` are accepted or none is
    left. A low temperature keeps the best ones, a high one a random subset. Always ends: the best
    candidate left is accepted whenever it is drawn.
    """
    values = finite(scores, "scores")
    left = list(range(values.size))
    accepted: list[int] = []
    while left and len(accepted) < keep:
        best = max(values[i] for i in left)
        candidate = left[int(rng.integers(len(left)))]
        if rng.random() < np.exp((values[candidate] - best) / temperature):
            accepted.append(candidate)
            left.remove(candidate)
    return accepted


def adjacent_pairs(
    order: Sequence[int],
    scores: npt.ArrayLike,
    min_margin: float = 0.0,
    answers: Sequence[Hashable] | None = None,
) -> PairSelection:
    """Neighbours of `order`, two by two, the better over the worse ("first-round" ranking of RSO,
    section 3.3)."""
    group = _Group(scores, min_margin, answers)
    found: list[ScoredPair] = []
    ties = 0
    for first, second in zip(order[0::2], order[1::2], strict=False):
        better, worse = (
            (first, second) if group.scores[first] >= group.scores[second] else (second, first)
        )
        pair = group.pair(better, worse)
        found += [pair] if pair else []
        ties += pair is None
    return PairSelection(pairs=tuple(found), ties=ties)
