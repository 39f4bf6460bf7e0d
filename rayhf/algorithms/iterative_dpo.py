"""Iterative DPO: online DPO in few, large rounds, with more ways to pair, earlier rounds' pairs and
given pairs mixed in.

Dong et al. 2024 (RLHFlow). What to look at: pairs/length_gap (best-of-n pairs drift towards
length), pairs/earlier, pairs/given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.online_dpo import OnlineDPO, Rng
from rayhf.algorithms.pair_selection import (
    PairSelection,
    adjacent_pairs,
    best_second,
    best_worst,
    length_penalized,
    rso_accept,
)
from rayhf.config.algorithms import IterativeDPOConfig
from rayhf.data.preferences import deal_pairs
from rayhf.types import GIVEN, Example, Group, derive_seed


class IterativeDPO(OnlineDPO):
    def __init__(self, config: IterativeDPOConfig) -> None:
        super().__init__(config)
        self.iterative = config
        self.pair_file = config.offline.path if config.offline else None
        self._given: tuple[Example, ...] = ()

    def give(self, pairs: Sequence[Example]) -> None:
        self._given = tuple(
            replace(pair, scalars={"margin": pair.scalars.get("margin", np.nan)}) for pair in pairs
        )

    def pairs(
        self, scores: list[float], answers: Sequence[tuple[int, ...]], rng: Rng
    ) -> PairSelection:
        config, margin = self.iterative, self.iterative.min_margin
        if config.pairs == "best_second":
            return best_second(scores, margin, answers)
        if config.pairs == "length_penalized":
            return best_worst(
                length_penalized(scores, [len(a) for a in answers], config.length_penalty),
                margin,
                answers,
            )
        if config.pairs == "rso":
            accepted = rso_accept(scores, config.rso_temperature, config.rso_keep, rng())
            return adjacent_pairs(accepted, scores, margin, answers)
        return super().pairs(scores, answers, rng)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        fresh = super().select(groups, context)
        metrics = dict(fresh.metrics)
        earlier: list[Example] = []
        for back, share in enumerate(self.iterative.earlier, start=1):
            # Pairs that were themselves mixed in do not come a second time: they belong to a round
            # before that one.
            own = [
                e
                for e in context.earlier(context.iteration - back)
                if not e.iterations_back
            ]
            drawn = _draw(
                own,
                round(share * fresh.metrics["pairs/kept"]),
                derive_seed(context.seed, "earlier", back),
            )
            earlier += [_mark(e, iterations_back=back) for e in drawn]
        offline = self.iterative.offline
        given = deal_pairs(
            self._given,
            share=offline.share if offline else 0.0,
            prompts=len(groups),
            iteration=context.iteration,
        )
        metrics |= {"pairs/earlier": float(len(earlier)), "pairs/given": float(len(given))}
        examples = [_mark(e) for e in fresh.examples] + earlier + [_mark(e) for e in given]
        return Selection(examples=tuple(examples), metrics=metrics)


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def _mark(example: Example, *, iterations_back: int = 0) -> Example:
    """With its origin, so that its sample indices can be followed: into which round's samples, or
    into a pairs file."""
    given = float(example.rows[0].sample == GIVEN)
    scalars = {"margin": example.scalars["margin"], "given": given}
    return replace(example, scalars=scalars, iterations_back=iterations_back)
