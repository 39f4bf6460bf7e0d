"""Online DPO: k fresh samples per prompt, judged; better over worse; a loss of the DPO family.

Guo et al. 2024 (OAIF) with the best-of-n pairs of RLHFlow (Dong et al. 2024). Ties are dropped and counted: an equal score is
no preference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.algorithms.base import Selection, Stateless, make_row, sample_and_score, scored
from rayhf.campaign.exchange import Explorer
from rayhf.config.algorithms import OnlineDPOConfig, ReferenceSchedule
from rayhf.credit import PairSelection, all_pairs, best_random, best_worst, missing_eos_penalty
from rayhf.experience import Example, Group, Prompt, derive_seed
from rayhf.losses.base import Loss
from rayhf.losses.preference import PreferenceLoss


class OnlineDPO(Stateless):
    def __init__(self, config: OnlineDPOConfig, *, max_tokens: int) -> None:
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
        self.reference: ReferenceSchedule | None = config.reference if self._loss.needs_reference else None

    async def explore(self, prompt: Prompt, explorer: Explorer) -> Group:
        return await sample_and_score(prompt, explorer, self.config.samples)

    def select(self, groups: Sequence[Group], *, seed: int) -> Selection:
        examples: list[Example] = []
        ties = 0
        margins: list[float] = []
        for group in groups:
            usable = scored(group)
            penalty = self.config.missing_eos_penalty
            scores = [
                score - missing_eos_penalty(truncated=s.completion.finish_reason == "length", penalty=penalty)
                for _, s, score in usable
            ]
            found = self._pairs(scores, [s.completion.token_ids for _, s, _ in usable], seed, group.prompt.prompt_id)
            ties += found.ties
            for pair in found.pairs:
                rows = tuple(make_row(group, usable[i][0], score=scores[i]) for i in (pair.chosen, pair.rejected))
                examples.append(Example(rows=rows, scalars={"margin": pair.margin}))
                margins.append(pair.margin)
        metrics = {"pairs/kept": float(len(examples)), "pairs/ties": float(ties)}
        if margins:
            metrics["pairs/margin_mean"] = float(np.mean(margins))
        return Selection(examples=tuple(examples), metrics=metrics)

    def _pairs(self, scores: list[float], answers: Sequence[tuple[int, ...]], seed: int, prompt_id: str) -> PairSelection:
        margin = self.config.min_margin
        if self.config.pairs == "best_worst":
            return best_worst(scores, margin, answers)
        if self.config.pairs == "all_pairs":
            return all_pairs(scores, margin, answers)
        rng = np.random.default_rng(derive_seed(seed, prompt_id, "best_random"))
        return best_random(scores, rng, margin, answers)

    def loss(self) -> Loss:
        return self._loss
