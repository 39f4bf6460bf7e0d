"""HyPO: DPO on offline pairs and a KL penalty on fresh samples, together in every optimizer step.

Song et al. 2024 (2406.01462). Fresh samples are scored only for the metric scorer/reward_mean: no
score affects training. Metrics to watch: hypo/online_kl against hypo/dpo_accuracy; kl_coef 0 is
offline DPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayhf.algorithms.base import AlgorithmBase, Selection, SelectionContext, sample_and_score
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import (
    AlgorithmConfig,
    ImportanceConfig,
    InitialReference,
    OfflineConfig,
    ReferenceSchedule,
)
from rayhf.config.schema import CampaignConfig
from rayhf.data.preferences import iteration_pairs
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.hypo import HyPOLoss, HyPOLossConfig
from rayhf.types import Example, Group, Prompt, Scored, make_row


class HyPOConfig(HyPOLossConfig, AlgorithmConfig):
    """Hybrid preference optimization (Song et al. 2024); the defaults are ours."""

    type: str = "hypo"
    offline: OfflineConfig
    samples: Annotated[int, Field(ge=2)] = 2
    """Fresh completions per prompt for the KL term (k of the leave-one-out baseline)."""
    importance: ImportanceConfig = ImportanceConfig()

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse samples that are not the policy's at temperature 1. Raises ConfigError."""
        rollout = campaign.rollout
        if rollout.temperature != 1 or rollout.top_p < 1 or rollout.top_k:
            raise ConfigError(
                "rollout: hypo estimates the policy's KL from its samples; expected temperature 1, "
                f"top_p 1 and top_k 0, got {rollout.temperature:g}, {rollout.top_p:g} and "
                f"{rollout.top_k}"
            )


class HyPO(AlgorithmBase):
    """HyPO: offline DPO plus the KL of fresh samples (Song et al. 2024)."""

    Config = HyPOConfig
    takes_labels: ClassVar[Literal[True]] = True

    def __init__(self, config: HyPOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = InitialReference()
        self._given: tuple[Example, ...] = ()
        self._loss = HyPOLoss(config, importance_cap=config.importance.cap)

    @property
    def pair_file(self) -> Path | None:
        """File of offline pairs."""
        return self.config.offline.path

    def set_pairs(self, pairs: Sequence[Example]) -> None:
        """Receive the encoded offline pairs."""
        self._given = tuple(_as_pair(pair) for pair in pairs)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and score them."""
        return await sample_and_score(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Return the iteration's offline pairs, the labeled ones, and all fresh samples."""
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
        metrics = {"pairs/given": float(len(given))}
        if labeled:
            metrics["pairs/human"] = float(len(labeled))
        return Selection(examples=(*given, *labeled, *fresh), metrics=metrics)

    def loss(self, objective: str = "policy") -> Loss:
        """Return DPO on the pairs plus the KL of the fresh samples."""
        return self._loss


def _as_pair(example: Example) -> Example:
    return replace(example, scalars={"pair": 1.0, "online": 0.0})


def _score(group: Group, index: int) -> float:
    outcome = group.samples[index].outcome
    return outcome.value if isinstance(outcome, Scored) else float("nan")
