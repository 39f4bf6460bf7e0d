"""INPO: no-regret self-play with two references, the fixed one and the policy at the round's start.

Zhang et al. 2024. The second reference is the learner before its first step (old_logp), so it needs
no copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext, Stateless, sample_and_compare, scored
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.pair_selection import best_worst
from rayhf.config.algorithms import INPOConfig, ReferenceSchedule
from rayhf.losses.base import Loss
from rayhf.losses.selfplay import INPOLoss
from rayhf.types import Example, Group, Prompt, make_row


class INPO(Stateless):
    needs_old_logp = True

    def __init__(self, config: INPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self._loss = INPOLoss(eta=config.eta, tau=config.tau)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        return await sample_and_compare(prompt, context, self.config.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        examples: list[Example] = []
        ties = 0
        for group in groups:
            usable = scored(group)
            answers = [sample.completion.token_ids for _, sample, _ in usable]
            found = best_worst([rate for _, _, rate in usable], self.config.min_margin, answers)
            ties += found.ties
            for pair in found.pairs:
                rows = tuple(
                    make_row(group, usable[i][0], score=usable[i][2])
                    for i in (pair.chosen, pair.rejected)
                )
                examples.append(Example(rows=rows, scalars={"margin": pair.margin}))
        metrics = {"pairs/kept": float(len(examples)), "pairs/ties": float(ties)}
        if examples:
            metrics["pairs/margin_mean"] = float(
                np.mean([example.scalars["margin"] for example in examples])
            )
        return Selection(examples=tuple(examples), metrics=metrics)

    def loss(self, objective: str = "policy") -> Loss:
        return self._loss
