"""Iterative DPO: online DPO in few, large iterations.

Dong et al. 2024 (RLHFlow). More ways to pair, and earlier iterations' pairs and given pairs mixed
in. Metrics to watch: pairs/length_gap (best-of-n pairs drift towards length), pairs/earlier,
pairs/given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.online_dpo import PairedAlgorithm, PairedConfig, Rng, paired
from rayhf.algorithms.pair_selection import (
    PairSelection,
    adjacent_pairs,
    best_second,
    best_worst,
    length_penalized,
    rso_accept,
)
from rayhf.config.algorithms import OfflineConfig, PreviousReference, ReferenceSchedule
from rayhf.config.schema import CampaignConfig
from rayhf.data.preferences import iteration_pairs
from rayhf.errors import ConfigError
from rayhf.types import GIVEN, Example, Group, derive_seed


class IterativeDPOConfig(PairedConfig):
    """Iterative DPO (Dong et al. 2024, RLHFlow): the policy of one iteration is the next reference.

    Iterations are `run.iterations` (3 there), prompts per iteration `prompts.batch` (20,000),
    passes `learner.epochs` (2).
    """

    type: str = "iterative_dpo"
    pairs: Literal[
        "best_worst", "best_random", "best_second", "all_pairs", "length_penalized", "rso"
    ] = "best_worst"
    """length_penalized: best against worst of score - length_penalty * tokens. rso: rejection
    sampling (Liu et al. 2023), then pairs of the accepted."""
    length_penalty: NonNegativeFloat = 0.001
    """Score per token, for length_penalized. RLHFlow's is per character."""
    rso_temperature: PositiveFloat = 0.5
    """Temperature of the acceptance exp((score - best) / temperature) (Liu et al. 2023), in units
    of the score. Our default."""
    rso_keep: Annotated[int, Field(ge=2)] = 4
    """Completions accepted per prompt."""
    reference: ReferenceSchedule = PreviousReference()
    """Not used by reference-free losses."""
    disjoint_iterations: bool = True
    """Refuse a campaign with more prompts in its iterations than the file has."""
    earlier: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Pairs of iterations t-1, t-2, ... mixed in, as shares of this iteration's pairs (DNO, Rosset
    et al. 2024: at most 0.3, 0.15)."""
    offline: OfflineConfig | None = None
    """Given pairs mixed into every iteration."""

    def check_prompts(self, campaign: CampaignConfig, prompts: int) -> None:
        """Refuse iterations that would share prompts. Raises ConfigError."""
        iterations = campaign.run.iterations
        batch = campaign.prompts.batch
        if self.disjoint_iterations and iterations * batch > prompts:
            raise ConfigError(
                f"algorithm.disjoint_iterations: {iterations} iterations of {batch} prompts need "
                f"{iterations * batch}, but prompts.train has {prompts}; expected "
                f"prompts.batch of at most {prompts // iterations}, or disjoint_iterations: false"
            )


class IterativeDPO(PairedAlgorithm):
    """Iterative DPO: few, large iterations with a moving reference (Dong et al. 2024, RLHFlow)."""

    Config = IterativeDPOConfig

    def __init__(self, config: IterativeDPOConfig) -> None:
        super().__init__(config)
        self.config = config
        self._given: tuple[Example, ...] = ()

    @property
    def pair_file(self) -> Path | None:
        """File of given pairs."""
        return self.config.offline.path if self.config.offline else None

    def set_pairs(self, pairs: Sequence[Example]) -> None:
        """Receive the given pairs, encoded."""
        self._given = tuple(
            replace(pair, scalars={"margin": pair.scalars.get("margin", np.nan)}) for pair in pairs
        )

    @property
    def pairing(self) -> str:
        """Name of the rule that makes the pairs."""
        return self.config.pairs

    def pairs(
        self, scores: list[float], completions: Sequence[tuple[int, ...]], rng: Rng
    ) -> PairSelection:
        """Pair by the configured rule."""
        config = self.config
        margin = config.min_margin
        if config.pairs == "best_second":
            return best_second(scores, margin, completions)
        if config.pairs == "length_penalized":
            lengths = [len(completion) for completion in completions]
            penalized = length_penalized(scores, lengths, config.length_penalty)
            return best_worst(penalized, margin, completions)
        if config.pairs == "rso":
            accepted = rso_accept(scores, config.rso_temperature, config.rso_keep, rng())
            return adjacent_pairs(accepted, scores, margin, completions)
        return paired(config.pairs, scores, completions, rng, margin)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair the fresh samples; mix in earlier iterations' pairs and given ones."""
        fresh = super().select(groups, context)
        earlier: list[Example] = []
        for back, share in enumerate(self.config.earlier, start=1):
            # Pairs that were themselves mixed in do not come a second time: they belong to an
            # iteration before that one.
            own = [
                example
                for example in context.earlier(context.iteration - back)
                if not example.scalars.get("iterations_back")
            ]
            drawn = _draw(
                own,
                round(share * fresh.metrics["pairs/kept"]),
                derive_seed(context.seed, "earlier", back),
            )
            earlier += [_mark(example, iterations_back=back) for example in drawn]
        offline = self.config.offline
        given = iteration_pairs(
            self._given,
            share=offline.share if offline else 0.0,
            prompts=len(groups),
            iteration=context.iteration,
        )
        metrics = {
            **fresh.metrics,
            "pairs/earlier": float(len(earlier)),
            "pairs/given": float(len(given)),
        }
        examples = [_mark(e) for e in fresh.examples] + earlier + [_mark(e) for e in given]
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=fresh.no_signal)


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def _mark(example: Example, *, iterations_back: int = 0) -> Example:
    """Add the origin of an example, so that its sample indices can be followed.

    They point into the samples of this or an earlier iteration, or into a file of pairs.
    """
    scalars = {
        "margin": example.scalars["margin"],
        "iterations_back": float(iterations_back),
        "given": float(example.rows[0].sample == GIVEN),
    }
    return replace(example, scalars=scalars)
