"""Pairing rules: from one prompt's scored completions to preference pairs, as pure functions.

In: scores, optionally the completions. Out: indices. A pair whose scores differ by at most
`min_margin`, or whose completions are the same, is a tie: an equal score is no preference. Ties are
dropped and counted.
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
    """A pair of completions, as indices into the scores."""

    chosen: int
    rejected: int
    margin: float
    """Difference of the scores, above min_margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSelection:
    """Pairs of one prompt."""

    pairs: tuple[ScoredPair, ...]
    ties: int
    """Number of pairs dropped because of their margin or because both completions are the same."""


class _Group:
    """One prompt's scores and completions, and the definition of a tie."""

    def __init__(
        self, scores: npt.ArrayLike, min_margin: float, completions: Sequence[Hashable] | None
    ) -> None:
        # A prompt has few scores: checking them with numpy would take ten times as long.
        self.scores: list[float]
        if isinstance(scores, list) and all(map(math.isfinite, scores)):
            self.scores = scores
        else:
            self.scores = finite(scores, "scores").tolist()
        if not (math.isfinite(min_margin) and min_margin >= 0.0):
            raise ConfigError(
                f"algorithm.min_margin: {min_margin} must be finite and at least 0; try 0.0"
            )
        if completions is not None and len(completions) != len(self.scores):
            raise ValueError(f"{len(completions)} completions for {len(self.scores)} scores")
        self.min_margin = min_margin
        self.completions = completions

    def pair(self, better: int, worse: int) -> ScoredPair | None:
        """Return the pair; None for a tie."""
        margin = self.scores[better] - self.scores[worse]
        texts = self.completions
        same = texts is not None and texts[better] == texts[worse]
        if same or margin <= self.min_margin:
            return None
        return ScoredPair(chosen=better, rejected=worse, margin=margin)

    def ranking(self) -> list[int]:
        """Return the indices, best first; equal scores keep their order, for reproducibility."""
        return sorted(range(len(self.scores)), key=self.scores.__getitem__, reverse=True)


def best_worst(
    scores: npt.ArrayLike, min_margin: float = 0.0, completions: Sequence[Hashable] | None = None
) -> PairSelection:
    """Pair the highest with the lowest score: one pair, or one tie.

    Fewer than two samples give neither. With `completions` (for example the token ids), a pair of
    identical completions is a tie even where a noisy scorer gave them different scores.
    """
    group = _Group(scores, min_margin, completions)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    ranking = group.ranking()
    pair = group.pair(ranking[0], ranking[-1])
    return PairSelection(pairs=(), ties=1) if pair is None else PairSelection(pairs=(pair,), ties=0)


def all_pairs(
    scores: npt.ArrayLike, min_margin: float = 0.0, completions: Sequence[Hashable] | None = None
) -> PairSelection:
    """Pair every score with every lower one: at most K * (K - 1) / 2 pairs.

    Sorted by the chosen and then by the rejected score, highest first.
    """
    group = _Group(scores, min_margin, completions)
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
    completions: Sequence[Hashable] | None = None,
) -> PairSelection:
    """Pair the highest score with a random one that it beats: one pair, or one tie without any.

    `rng` has a derived seed (campaign seed, iteration, prompt id), so that arrival order cannot
    matter.
    """
    group = _Group(scores, min_margin, completions)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    best, *others = group.ranking()
    beaten = [pair for pair in (group.pair(best, other) for other in others) if pair is not None]
    if not beaten:
        return PairSelection(pairs=(), ties=1)
    return PairSelection(pairs=(beaten[int(rng.integers(len(beaten)))],), ties=0)


def best_second(
    scores: npt.ArrayLike, min_margin: float = 0.0, completions: Sequence[Hashable] | None = None
) -> PairSelection:
    """Pair the highest with the second highest score: one pair, or one tie.

    Completions equal to the best one are skipped.
    """
    group = _Group(scores, min_margin, completions)
    if len(group.scores) < 2:
        return PairSelection(pairs=(), ties=0)
    best, *others = group.ranking()
    if completions is not None:
        others = [other for other in others if completions[other] != completions[best]] or others
    pair = group.pair(best, others[0])
    return PairSelection(pairs=(), ties=1) if pair is None else PairSelection(pairs=(pair,), ties=0)


def length_penalized(scores: npt.ArrayLike, lengths: Sequence[int], penalty: float) -> list[float]:
    """Return score - penalty * length, against the drift of best-of-n pairs toward length.

    RLHFlow's max_min_p, which has lengths in characters; here they are in tokens.
    """
    values = finite(scores, "scores")
    if len(lengths) != values.size:
        raise ValueError(f"{len(lengths)} lengths for {values.size} scores")
    return [float(v - penalty * n) for v, n in zip(values, lengths, strict=True)]


def rso_accept(
    scores: npt.ArrayLike, temperature: float, keep: int, rng: np.random.Generator
) -> list[int]:
    """Return the indices of `keep` completions accepted by statistical rejection sampling.

    They follow the optimal policy of the KL-regularized reward. Liu et al. 2023 (RSO), algorithm 1:
    draw a candidate uniformly from those left, accept it with probability exp((score - best score
    left) / temperature), until `keep` are accepted or none is left. A low temperature keeps the
    best ones, a high one a random subset. It always ends: the best candidate left is accepted
    whenever it is drawn.
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
    completions: Sequence[Hashable] | None = None,
) -> PairSelection:
    """Pair neighbors of `order` two by two, the better over the worse.

    The "first-round" ranking of RSO (Liu et al. 2023, section 3.3).
    """
    group = _Group(scores, min_margin, completions)
    pairs: list[ScoredPair] = []
    ties = 0
    for first, second in zip(order[0::2], order[1::2], strict=False):
        ordered = group.scores[first] >= group.scores[second]
        pair = group.pair(first, second) if ordered else group.pair(second, first)
        if pair is None:
            ties += 1
        else:
            pairs.append(pair)
    return PairSelection(pairs=tuple(pairs), ties=ties)
