"""Best-of-n pairs with a curriculum: the margin that a pair needs grows with every iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import NonNegativeFloat, PositiveInt

import rayhf
from rayhf_outside.loss import SquaredMargin, SquaredMarginConfig


class BestOfNConfig(rayhf.AlgorithmConfig):
    """How many completions, and how the margin grows."""

    type: str = "best_of_n"
    samples: PositiveInt = 4
    """Completions per prompt."""
    target: NonNegativeFloat = 1.0
    """Margin of log-ratios that the loss aims at, in nats."""
    margin_step: NonNegativeFloat = 0.01
    """Score by which the smallest margin of a pair grows in each iteration."""


class BestOfN(rayhf.AlgorithmBase):
    """Pairs of a prompt's best and worst completion, with a growing smallest margin."""

    Config = BestOfNConfig

    def __init__(self, config: BestOfNConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference = rayhf.InitialReference()
        self.min_margin = 0.0
        self._loss = SquaredMargin(SquaredMarginConfig(target=config.target))

    async def explore(self, prompt: rayhf.Prompt, context: rayhf.ExplorationContext) -> rayhf.Group:
        return await rayhf.sample_and_score(prompt, context, self.samples)

    def select(
        self, groups: Sequence[rayhf.Group], context: rayhf.SelectionContext
    ) -> rayhf.Selection:
        examples = []
        for group in groups:
            ranked = sorted(rayhf.scored(group), key=lambda entry: entry[2])
            if len(ranked) > 1 and ranked[-1][2] - ranked[0][2] > self.min_margin:
                rows = tuple(
                    rayhf.make_row(group, index, score=score)
                    for index, _, score in (ranked[-1], ranked[0])
                )
                examples.append(rayhf.Example(rows=rows))
        kept = len(examples)
        return rayhf.Selection(
            examples=tuple(examples),
            metrics={"best_of_n/kept": float(kept), "best_of_n/margin": self.min_margin},
            no_signal=1.0 - kept / max(len(groups), 1),
        )

    def loss(self, objective: str = "policy") -> rayhf.Loss:
        return self._loss

    # Optional: state that a checkpoint holds.

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.min_margin += self.config.margin_step

    def state_dict(self) -> dict[str, float]:
        return {"min_margin": self.min_margin}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.min_margin = float(state["min_margin"])
