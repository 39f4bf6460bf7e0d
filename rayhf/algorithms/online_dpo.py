"""Online DPO: k fresh samples per prompt, judged; better over worse; a loss of the DPO family.

Guo et al. 2024 (OAIF) with the best-of-n pairs of RLHFlow (Dong et al. 2024). Ties are dropped and
counted: an equal score is no preference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rayhf.algorithms.advantages import missing_eos_penalty
from rayhf.algorithms.base import Selection, SelectionContext, Stateless, sample_and_score, scored
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.pair_selection import PairSelection, all_pairs, best_random, best_worst
from rayhf.config.algorithms import IterativeDPOConfig, OnlineDPOConfig, ReferenceSchedule
from rayhf.losses.base import Loss
from rayhf.losses.preference import PreferenceLoss
from rayhf.types import Example, Group, Prompt, derive_seed, make_row

Rng = Callable[[], np.random.Generator]
"""Most rules draw nothing, and a generator costs more than their pairs."""


def _rng(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*parts))


class OnlineDPO(Stateless):
    def __init__(self, config: OnlineDPOConfig | IterativeDPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self._loss = PreferenceLoss(
            loss=config.loss,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            nll_coef=config.nll_coef,
            discopop_tau=config.discopop_tau,
            importance_cap=config.importance.cap,
        )
        self.reference: ReferenceSchedule | None = (
            config.reference if self._loss.needs_reference else None
        )

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        return await sample_and_score(prompt, context, self.config.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        examples: list[Example] = []
        ties = 0
        for group in groups:
            usable = scored(group)
            penalty = self.config.missing_eos_penalty
            scores = [
                score
                - missing_eos_penalty(
                    truncated=s.completion.finish_reason == "length", penalty=penalty
                )
                for _, s, score in usable
            ]
            rng = partial(_rng, context.seed, group.prompt.prompt_id, self.config.pairs)
            found = self.pairs(scores, [s.completion.token_ids for _, s, _ in usable], rng)
            ties += found.ties
            for pair in found.pairs:
                rows = tuple(
                    make_row(group, usable[i][0], score=scores[i])
                    for i in (pair.chosen, pair.rejected)
                )
                examples.append(Example(rows=rows, scalars={"margin": pair.margin}))
        metrics = {"pairs/kept": float(len(examples)), "pairs/ties": float(ties)}
        if examples:
            metrics["pairs/margin_mean"] = float(
                np.mean([example.scalars["margin"] for example in examples])
            )
            lengths = [[len(row.response_ids) for row in example.rows] for example in examples]
            metrics["pairs/length_gap"] = float(
                np.mean([chosen - rejected for chosen, rejected in lengths])
            )
        if context.labels:
            metrics["pairs/human"] = float(len(context.labels))
            examples += [replace(label, scalars={"margin": np.nan}) for label in context.labels]
        return Selection(examples=tuple(examples), metrics=metrics)

    def pairs(
        self, scores: list[float], answers: Sequence[tuple[int, ...]], rng: Rng
    ) -> PairSelection:
        """By the configured rule; `answers` are token ids, `rng` makes this prompt's own
        generator."""
        margin = self.config.min_margin
        if self.config.pairs == "all_pairs":
            return all_pairs(scores, margin, answers)
        if self.config.pairs == "best_random":
            return best_random(scores, rng(), margin, answers)
        return best_worst(scores, margin, answers)

    def loss(self, objective: str = "policy") -> Loss:
        return self._loss
