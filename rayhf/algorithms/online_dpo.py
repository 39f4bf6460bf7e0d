"""Online DPO: k scored samples per prompt, paired by score, and a loss of the DPO family.

Guo et al. 2024 (OAIF) with the best-of-n pairs of RLHFlow (Dong et al. 2024). Ties are dropped and
counted: an equal score is no preference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from rayhf.algorithms.advantages import missing_eos_penalty
from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_score,
    scored,
    tie_share,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.pair_selection import PairSelection, all_pairs, best_random, best_worst
from rayhf.algorithms.routing import PeopleConfig, Routed, route
from rayhf.config.algorithms import (
    AlgorithmConfig,
    ImportanceConfig,
    InitialReference,
    ReferenceSchedule,
)
from rayhf.config.registry import LOSSES
from rayhf.config.schema import CampaignConfig
from rayhf.losses.base import Loss
from rayhf.losses.pairs import PairLoss, PairLossConfig
from rayhf.losses.preference import SigmoidConfig
from rayhf.types import Example, Group, Prompt, TokenArray, derive_seed, make_row

Rng = Callable[[], np.random.Generator]
"""Makes a random generator on demand: most rules draw nothing, and making one costs more than they
do."""


class PairedConfig(AlgorithmConfig):
    """Settings of algorithms that train on pairs of a prompt's samples."""

    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt (RLHFlow uses 8)."""
    min_margin: NonNegativeFloat = 0.0
    """Difference of scores up to which a pair is a tie; ties are dropped and counted."""
    loss: Annotated[PairLossConfig, LOSSES.defaulting("sigmoid")] = SigmoidConfig()
    """A preference loss."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the chosen completion's negative log-likelihood, mean per token (Pang et al.
    2024)."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Penalty on the score of a truncated completion (finish_reason "length")."""
    reference: ReferenceSchedule = InitialReference()
    """Schedule of the reference; reference-free losses ignore it."""
    importance: ImportanceConfig = ImportanceConfig()
    people: PeopleConfig | None = None
    """Pairs that people judge in place of the scorer. Default: none."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse pairs for people that they would never see."""
        if self.people is not None:
            self.people.check_campaign(campaign)


class OnlineDPOConfig(PairedConfig):
    """Online DPO (Guo et al. 2024, OAIF) with k samples per prompt."""

    type: str = "online_dpo"
    pairs: Literal["best_worst", "all_pairs", "best_random"] = "best_worst"
    """Pairing rule (RLHFlow: best against worst)."""


class PairedAlgorithm(AlgorithmBase, ABC):
    """Base of algorithms that train on pairs of a prompt's own samples."""

    takes_labels: ClassVar[Literal[True]] = True

    def __init__(self, config: PairedConfig) -> None:
        self.paired = config
        self.samples = config.samples
        self._loss: PairLoss[PairLossConfig] = LOSSES.build(
            config.loss, importance_cap=config.importance.cap, nll_coef=config.nll_coef
        )
        self.reference: ReferenceSchedule | None = (
            config.reference if self._loss.needs_reference else None
        )

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and score them."""
        return await sample_and_score(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair the scored samples of each prompt; add the pairs that people labeled.

        With `people`, some pairs are left to these, and those that they left unanswered come back.
        """
        own, ties = self._own_pairs(groups, context)
        no_signal = tie_share(len(own), ties)
        people = self.paired.people
        routed = route(own, people, context) if people else Routed(scorer=own)
        metrics = {**_pair_metrics(routed.scorer), "pairs/ties": float(ties)}
        if people:
            metrics["pairs/routed"] = float(len(routed.people))
            metrics["pairs/expired"] = float(len(routed.expired))
        labels = [replace(label, scalars={"margin": np.nan}) for label in context.labels]
        if labels:
            metrics["pairs/human"] = float(len(labels))
        return Selection(
            examples=(*routed.scorer, *labels, *routed.expired, *routed.people),
            metrics=metrics,
            no_signal=no_signal,
        )

    def _own_pairs(
        self, groups: Sequence[Group], context: SelectionContext
    ) -> tuple[list[Example], int]:
        """Return the pairs of the prompts' own samples, and the number of ties."""
        examples: list[Example] = []
        ties = 0
        for group in groups:
            usable = scored(group)
            scores = [
                score
                - missing_eos_penalty(
                    truncated=sample.completion.finish_reason == "length",
                    penalty=self.paired.missing_eos_penalty,
                )
                for _, sample, score in usable
            ]
            rng = partial(_rng, context.seed, group.prompt.prompt_id, self.pairing)
            selection = self.pairs(scores, [s.completion.token_ids for _, s, _ in usable], rng)
            ties += selection.ties
            for pair in selection.pairs:
                rows = tuple(
                    make_row(group, usable[i][0], score=scores[i])
                    for i in (pair.chosen, pair.rejected)
                )
                examples.append(Example(rows=rows, scalars={"margin": pair.margin}))
        return examples, ties

    @property
    @abstractmethod
    def pairing(self) -> str:
        """Name of the pairing rule; part of the seed of its random draws."""

    @abstractmethod
    def pairs(
        self, scores: list[float], completions: Sequence[TokenArray], rng: Rng
    ) -> PairSelection:
        """Return one prompt's pairs.

        Args:
            scores: one per completion.
            completions: their token ids; equal ones make no pair.
            rng: makes the random generator of this prompt.
        """

    def loss(self, objective: str = "policy") -> Loss:
        """Return the configured preference loss."""
        return self._loss


def _pair_metrics(pairs: Sequence[Example]) -> dict[str, float]:
    """Return how many pairs there are, and how their scores and lengths differ."""
    metrics = {"pairs/kept": float(len(pairs))}
    if pairs:
        margins = [pair.scalars["margin"] for pair in pairs]
        lengths = [[len(row.response_ids) for row in pair.rows] for pair in pairs]
        metrics["pairs/margin_mean"] = float(np.mean(margins))
        metrics["pairs/length_gap"] = float(
            np.mean([chosen - rejected for chosen, rejected in lengths])
        )
    return metrics


class OnlineDPO(PairedAlgorithm):
    """Online DPO: fresh pairs of the policy's own samples in every iteration (Guo et al. 2024)."""

    Config = OnlineDPOConfig

    def __init__(self, config: OnlineDPOConfig) -> None:
        super().__init__(config)
        self.config = config

    @property
    def pairing(self) -> str:
        """Name of the pairing rule."""
        return self.config.pairs

    def pairs(
        self, scores: list[float], completions: Sequence[TokenArray], rng: Rng
    ) -> PairSelection:
        """Pair by the configured rule."""
        return paired(self.config.pairs, scores, completions, rng, self.config.min_margin)


def paired(
    rule: str,
    scores: list[float],
    completions: Sequence[TokenArray],
    rng: Rng,
    min_margin: float,
) -> PairSelection:
    """Pair by one of the rules that online and iterative DPO share."""
    keys = [completion.tobytes() for completion in completions]
    if rule == "all_pairs":
        return all_pairs(scores, min_margin, keys)
    if rule == "best_random":
        return best_random(scores, rng(), min_margin, keys)
    return best_worst(scores, min_margin, keys)


def _rng(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*parts))
