"""HyPO: DPO on given pairs and a KL penalty on fresh samples, together in every optimizer step.
Song et al. 2024 (2406.01462).

Fresh samples are scored only to be looked at (scorer/reward_mean): no score trains anything. Look
at hypo/online_kl against hypo/dpo_accuracy; kl_coef 0 is offline DPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayhf.algorithms.base import Selection, SelectionContext, Stateless, sample_and_score
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import HyPOConfig, InitialReference, ReferenceSchedule
from rayhf.data.preferences import iteration_pairs
from rayhf.losses.base import Loss
from rayhf.losses.hypo import HyPOLoss
from rayhf.types import Example, Group, Prompt, Scored, make_row


class HyPO(Stateless):
    def __init__(self, config: HyPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = InitialReference()
        self.pair_file = config.offline.path
        self._given: tuple[Example, ...] = ()
        self._loss = HyPOLoss(
            beta=config.beta,
            kl_coef=config.kl_coef,
            clip=config.clip,
            importance_cap=config.importance.cap,
        )

    def give(self, pairs: Sequence[Example]) -> None:
        self._given = tuple(_as_pair(pair) for pair in pairs)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        return await sample_and_score(prompt, context, self.config.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        given = iteration_pairs(
            self._given,
            share=self.config.offline.share,
            prompts=len(groups),
            iteration=context.iteration,
        )
        fresh = [
            Example(
                rows=tuple(
                    make_row(group, i, score=_score(group, i)) for i in range(len(group.samples))
                ),
                scalars={"pair": 0.0, "online": float(len(group.samples))},
            )
            for group in groups
        ]
        labeled = [_as_pair(label) for label in context.labels]
        metrics = {"pairs/given": float(len(given))} | (
            {"pairs/human": float(len(labeled))} if labeled else {}
        )
        return Selection(examples=(*given, *labeled, *fresh), metrics=metrics)

    def loss(self, objective: str = "policy") -> Loss:
        return self._loss


def _as_pair(example: Example) -> Example:
    return replace(example, scalars={"pair": 1.0, "online": 0.0})


def _score(group: Group, index: int) -> float:
    outcome = group.samples[index].outcome
    return outcome.value if isinstance(outcome, Scored) else float("nan")
