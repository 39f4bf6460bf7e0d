"""SPPO: every answer's log-ratio to the current policy is regressed onto how often it beats that
policy.

Wu et al. 2024. The win matrix is kept as the scorer gave it (cycles included); P(win) is its row
mean. Look at sppo/target_abs (how much there is to win), sppo/residual_abs (how well the regression
is solved) and, on the tiny game, game/exploitability_average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext, Stateless, sample_and_compare, scored
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import ReferenceSchedule, SPPOConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.selfplay import SPPOLoss
from rayhf.types import Example, Group, Prompt, make_row


class SPPO(Stateless):
    def __init__(self, config: SPPOConfig) -> None:
        if config.train_on == "all" and config.target != "soft":
            raise ConfigError(
                f"algorithm.target {config.target} is about a best and a worst answer; train_on all expects soft"
            )
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self._loss = SPPOLoss(eta=config.eta)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        return await sample_and_compare(prompt, context, self.config.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        examples: list[Example] = []
        ties = small = 0
        spreads = []
        for group in groups:
            usable = [(i, rate) for i, _, rate in scored(group)]
            if len(usable) < 2:
                small += 1
                continue
            best = max(usable, key=lambda entry: entry[1])  # the first of equals: reproducible
            worst = min(usable, key=lambda entry: entry[1])
            if best[1] - worst[1] <= self.config.min_margin:
                ties += 1
                continue
            spreads.append(best[1] - worst[1])
            examples += self._examples(group, usable, best, worst)
        metrics = {
            "sppo/ties": float(ties),
            "sppo/dropped": float(small),
            "sppo/kept": float(len(spreads)),
        }
        if spreads:
            metrics["sppo/spread_mean"] = float(np.mean(spreads))
        return Selection(examples=tuple(examples), metrics=metrics)

    def _examples(
        self,
        group: Group,
        usable: Sequence[tuple[int, float]],
        best: tuple[int, float],
        worst: tuple[int, float],
    ) -> list[Example]:
        if self.config.train_on == "all":
            return [self._example(group, [(i, rate, rate - 0.5)]) for i, rate in usable]
        assert group.compared is not None  # or nothing would be scored
        if self.config.target == "soft":
            targets = best[1] - 0.5, worst[1] - 0.5
        elif self.config.target == "single":
            probability = float(group.compared.win[best[0], worst[0]])
            if not np.isfinite(
                probability
            ):  # the two were never compared with each other: their rates are what is known
                probability = 0.5 + (best[1] - worst[1]) / 2.0
            targets = probability - 0.5, 0.5 - probability
        else:
            targets = 0.5, -0.5
        return [self._example(group, [(*best, targets[0]), (*worst, targets[1])])]

    def _example(self, group: Group, answers: Sequence[tuple[int, float, float]]) -> Example:
        rows = [(make_row(group, index, score=rate), target) for index, rate, target in answers]
        return Example(
            rows=tuple(
                replace(row, scalars={**row.scalars, "target": target}) for row, target in rows
            )
        )

    def loss(self, objective: str = "policy") -> Loss:
        return self._loss
