"""Online KTO: the policy's own samples get a thumb up or down, and KTO's loss trains on them.

Ethayarajh et al. 2024 (2402.01306); thumbs from scores as in HALOs, the paper's code. The paper
estimates z, KL(policy || reference), from other prompts' responses, because sampling from the
policy is slow; here the responses are its samples, and z is their mean log-ratio, at least 0, with
the weights that sampled (those of the learner where the iteration has several optimizer steps).
People give thumbs too: to completions that the scorer is least certain about, or to any other.
Metrics to watch: kto/desirable, kto/margin and kto/kl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from rayhf.algorithms.advantages import missing_eos_penalty
from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_score,
    scored,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.routing import PeopleConfig, Routed, route
from rayhf.config.algorithms import AlgorithmConfig, InitialReference, ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.config.schema import CampaignConfig
from rayhf.losses.base import Loss
from rayhf.losses.kto import KTOLossConfig
from rayhf.types import GIVEN, Example, Group, Prompt, make_row


class OnlineKTOConfig(AlgorithmConfig):
    """Online KTO (Ethayarajh et al. 2024)."""

    type: str = "online_kto"
    samples: PositiveInt = 4
    """Completions per prompt (HALOs)."""
    threshold: float | Literal["mean", "median"] = "mean"
    """Score from which a completion has a thumb up: a number, or the mean or median of the
    iteration's scores (HALOs: median, which of scores that are 0 or 1 is one of them; mean is
    ours). With mean and median, scores that are all equal give no thumbs."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Penalty on the score of a truncated completion (finish_reason "length")."""
    loss: Annotated[KTOLossConfig, LOSSES.defaulting("kto")] = KTOLossConfig()
    """The loss and its weights."""
    balance: Annotated[float, Field(ge=1)] | None = 10.0
    """Largest factor on the weight of the rarer thumb, so that weight times number is the same for
    both in every iteration (section 4.2 of the paper; the limit is ours). null is off."""
    people: PeopleConfig | None = None
    """Completions that people judge in place of the scorer. Default: none."""
    reference: ReferenceSchedule = InitialReference()
    """Schedule of the reference."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse completions for people that they would never see. Raises ConfigError."""
        if self.people is not None:
            self.people.check_campaign(campaign)


class OnlineKTO(AlgorithmBase):
    """Online KTO: thumbs up and down on the policy's own samples (Ethayarajh et al. 2024)."""

    Config = OnlineKTOConfig
    takes_labels: ClassVar[Literal[True]] = True
    takes_thumbs: ClassVar[Literal[True]] = True

    def __init__(self, config: OnlineKTOConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self._weighted = config.loss
        """The loss's settings with the weights of the iteration that was credited last."""

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and score them."""
        return await sample_and_score(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Give every scored sample a thumb; add those of people.

        With `people`, some samples are left to these, and those that they left unanswered come
        back. Both completions of a pair from people have a thumb.
        """
        candidates = [
            (
                group,
                index,
                score
                - missing_eos_penalty(
                    truncated=sample.completion.finish_reason == "length",
                    penalty=self.config.missing_eos_penalty,
                ),
            )
            for group in groups
            for index, sample, score in scored(group)
        ]
        threshold = self._threshold([score for _, _, score in candidates])
        own = [
            Example(
                rows=(make_row(group, index, score=score),),
                scalars={
                    "desirable": float(score >= threshold),
                    "margin": abs(score - threshold),
                },
            )
            for group, index, score in candidates
            if threshold is not None
        ]
        people = self.config.people
        routed = route(own, people, context) if people else Routed(scorer=own)
        labels = [
            Example(rows=(row,), scalars={"desirable": float(row is pair.rows[0])})
            for pair in context.labels
            for row in pair.rows
        ]
        trained = [
            replace(example, scalars={"desirable": example.scalars["desirable"]})
            for example in (*routed.scorer, *routed.expired, *context.thumbs, *labels)
        ]
        ups = [example.scalars["desirable"] for example in routed.scorer]
        metrics = {"kto/desirable": float(np.mean(ups))} if ups else {}
        if people:
            metrics["kto/routed"] = float(len(routed.people))
            metrics["kto/expired"] = float(len(routed.expired))
        if context.thumbs:
            metrics["kto/human"] = float(len(context.thumbs))
        if labels:
            metrics["pairs/human"] = float(len(context.labels))
        return Selection(
            examples=(*trained, *routed.people),
            metrics=metrics,
            no_signal=float(len(set(ups)) < 2),
        )

    def _threshold(self, scores: Sequence[float]) -> float | None:
        """Return the smallest score with a thumb up; None where equal scores say nothing."""
        threshold = self.config.threshold
        if isinstance(threshold, float):
            return threshold
        if len(set(scores)) < 2:
            return None
        return float(np.mean(scores) if threshold == "mean" else np.median(scores))

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Give every example the estimate of the KL; balance the weights of the two thumbs."""
        ratios = [
            float((tokens.get("old_logp", tokens["behavior_logp"]) - tokens["ref_logp"]).sum())
            for row in (example.rows[0] for example in examples)
            if row.sample != GIVEN  # what people judged is an earlier policy's
            for tokens in (row.tokens,)
        ]
        kl = max(0.0, float(np.mean(ratios))) if ratios else 0.0
        ups = sum(example.scalars["desirable"] for example in examples)
        self._weighted = self._balanced(ups, len(examples) - ups)
        metrics = {
            "kto/desirable_weight": self._weighted.desirable_weight,
            "kto/undesirable_weight": self._weighted.undesirable_weight,
        }
        return [replace(e, scalars={**e.scalars, "kl": kl}) for e in examples], metrics

    def _balanced(self, ups: float, downs: float) -> KTOLossConfig:
        """Return the loss's settings with the rarer thumb's weight raised."""
        loss = self.config.loss
        limit = self.config.balance
        if limit is None or not ups or not downs:
            return loss
        factor = min(max(ups, downs) / min(ups, downs), limit)
        rarer = "desirable_weight" if ups < downs else "undesirable_weight"
        return loss.model_copy(update={rarer: getattr(loss, rarer) * factor})

    def loss(self, objective: str = "policy") -> Loss:
        """Return KTO's loss with the weights of the iteration."""
        loss: Loss = LOSSES.build(self._weighted, sampled=True)
        return loss
