"""Iterative DPO: online DPO in few, large iterations.

Dong et al. 2024 (RLHFlow). It has more pairing rules than online DPO, and can mix in pairs of
earlier iterations and offline pairs. Metrics to watch: pairs/length_gap (best-of-n pairs drift
toward length), pairs/earlier, pairs/given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

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
from rayhf.types import GIVEN, PEOPLE, Example, Group, Prompt, TokenArray, derive_seed


class IterativeDPOConfig(PairedConfig):
    """Iterative DPO (Dong et al. 2024, RLHFlow): the policy of one iteration is the next reference.

    Iterations are `run.iterations` (3 there), prompts per iteration `prompts.batch` (20,000),
    passes `learner.epochs` (2).
    """

    type: str = "iterative_dpo"
    pairs: Literal[
        "best_worst", "best_random", "best_second", "all_pairs", "length_penalized", "rso"
    ] = "best_worst"
    """Pairing rule. length_penalized: best against worst by score - length_penalty * tokens. rso:
    statistical rejection sampling (Liu et al. 2023), then pairs of the accepted completions."""
    length_penalty: NonNegativeFloat = 0.001
    """Penalty per token, for length_penalized (RLHFlow's is per character)."""
    rso_temperature: PositiveFloat = 0.5
    """Temperature of the acceptance probability exp((score - best) / temperature) (Liu et al.
    2023), in units of the score (ours)."""
    rso_keep: Annotated[int, Field(ge=2)] = 4
    """Number of completions accepted per prompt."""
    reference: ReferenceSchedule = PreviousReference()
    """Schedule of the reference; reference-free losses ignore it."""
    disjoint_iterations: bool = True
    """Require that no prompt is used in two iterations."""
    earlier: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Pairs of iterations t-1, t-2, ... to mix in, as shares of this iteration's pairs (DNO, Rosset
    et al. 2024: at most 0.3, 0.15)."""
    offline: OfflineConfig | None = None
    """Offline pairs to mix into every iteration."""

    def check_prompts(self, campaign: CampaignConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse iterations that would share prompts. Raises ConfigError."""
        iterations = campaign.run.iterations
        batch = campaign.prompts.batch
        count = len(prompts)
        if self.disjoint_iterations and iterations * batch > count:
            raise ConfigError(
                f"algorithm.disjoint_iterations: {iterations} iterations of {batch} prompts need "
                f"{iterations * batch}, but prompts.train has {count}; expected "
                f"prompts.batch of at most {count // iterations}, or disjoint_iterations: false"
            )


class IterativeDPO(PairedAlgorithm):
    """Iterative DPO: few, large iterations with a moving reference (Dong et al. 2024, RLHFlow)."""

    Config: ClassVar[type[IterativeDPOConfig]] = IterativeDPOConfig

    def __init__(self, config: IterativeDPOConfig) -> None:
        super().__init__(config)
        self.config = config
        self._given: tuple[Example, ...] = ()

    @property
    def pair_file(self) -> Path | None:
        """File of offline pairs."""
        return self.config.offline.path if self.config.offline else None

    def set_pairs(self, pairs: Sequence[Example]) -> None:
        """Receive the encoded offline pairs."""
        self._given = tuple(
            replace(pair, scalars={"margin": pair.scalars.get("margin", np.nan)}) for pair in pairs
        )

    @property
    def pairing(self) -> str:
        """Name of the rule that makes the pairs."""
        return self.config.pairs

    def pairs(
        self, scores: list[float], completions: Sequence[TokenArray], rng: Rng
    ) -> PairSelection:
        """Pair by the configured rule."""
        config = self.config
        margin = config.min_margin
        keys = [completion.tobytes() for completion in completions]
        if config.pairs == "best_second":
            return best_second(scores, margin, keys)
        if config.pairs == "length_penalized":
            lengths = [len(completion) for completion in completions]
            penalized = length_penalized(scores, lengths, config.length_penalty)
            return best_worst(penalized, margin, keys)
        if config.pairs == "rso":
            accepted = rso_accept(scores, config.rso_temperature, config.rso_keep, rng())
            return adjacent_pairs(accepted, scores, margin, keys)
        return paired(config.pairs, scores, completions, rng, margin)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair the fresh samples; mix in pairs of earlier iterations and offline pairs."""
        fresh = super().select(groups, context)
        earlier: list[Example] = []
        for back, share in enumerate(self.config.earlier, start=1):
            # Pairs that were mixed into that iteration are not drawn again: they belong to an
            # iteration before it.
            before = [
                example
                for example in context.earlier(context.iteration - back)
                if not example.iterations_back
            ]
            count = round(share * fresh.metrics["pairs/kept"])
            drawn = _draw(before, count, derive_seed(context.seed, "earlier", back))
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
        own = [e if e.objective == PEOPLE else _mark(e) for e in fresh.examples]
        examples = own + earlier + [_mark(e) for e in given]
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=fresh.no_signal)


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def _mark(example: Example, *, iterations_back: int = 0) -> Example:
    """Record where an example comes from: this iteration, an earlier one, or the file of pairs.

    Its rows' sample indices refer to the samples of that iteration.
    """
    scalars = {
        "margin": example.scalars["margin"],
        "given": float(example.rows[0].sample == GIVEN),
    }
    return replace(example, scalars=scalars, iterations_back=iterations_back)
