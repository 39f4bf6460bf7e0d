"""KTO: each response has a thumb up or down, without a counterpart (Ethayarajh et al. 2024).

In: log-probs of the response tokens with gradient, and a MicroBatch whose tokens carry ref_logp.
Examples have one row and the scalars `desirable` (1 up, 0 down) and `kl`, the estimate z of
KL(policy || reference) in nats per response: max(0, mean log-ratio of responses under other
examples' prompts), without gradient (rayhf/algorithms/kto.py). Out: this micro-batch's share of

    mean over examples of w_up * (1 - S(beta * (d - z)))     for thumbs up
                       or w_down * (1 - S(beta * (z - d)))   for thumbs down

(2402.01306, eq. 8), with d the summed log-ratio to the reference and S the sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from rayhf.config.base import PluginConfig
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import need, policy_metrics


class KTOLossConfig(PluginConfig):
    """KTO; weight * number of examples should be similar for thumbs up and down (section 4.2)."""

    type: str = "kto"
    beta: PositiveFloat = 0.1
    """Strength of the pull toward the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of thumbs up (the paper's lambda_D)."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of thumbs down (the paper's lambda_U)."""


@dataclass(frozen=True)
class KTOLoss:
    """KTO (Ethayarajh et al. 2024, eq. 8): thumbs up and down without pairs; picklable."""

    Config = KTOLossConfig

    config: KTOLossConfig
    sampled: bool = False
    """Whether responses are the policy's own: only then do they measure its entropy, its KL to the
    reference, and the mismatch with the engines."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric" if self.sampled else "off"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError without ref_logp.

        Metrics: kto/kl, nats per response; kto/desirable_reward and kto/undesirable_reward, means
        of beta * d, and kto/margin, their difference, where the step has such examples.
        """
        config = self.config
        ratio_R = sum_rows(output_T - need(micro, "ref_logp"), micro)
        up_R = micro.examples["desirable"][micro.example_R] > 0
        kl_R = micro.examples["kl"][micro.example_R]
        logits_R = config.beta * (ratio_R - kl_R)
        loss_R = torch.where(
            up_R,
            config.desirable_weight * (-logits_R).sigmoid(),
            config.undesirable_weight * logits_R.sigmoid(),
        )
        count = max(micro.totals.examples, 1.0)
        loss = loss_R.sum() / count
        metrics = policy_metrics(output_T, micro) if self.sampled else {}
        metrics |= {"learner/loss": loss.detach(), "kto/kl": kl_R.sum() / count}
        return LossOutput(
            loss=loss, metrics=metrics | _rewards(config.beta * ratio_R.detach(), up_R, micro)
        )


def _rewards(reward_R: Tensor, up_R: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """Return the mean implicit rewards of each label that the step has."""
    ups = micro.totals.scalars["desirable"]
    downs = micro.totals.examples - ups
    metrics = {}
    if ups:
        metrics["kto/desirable_reward"] = reward_R[up_R].sum() / ups
    if downs:
        metrics["kto/undesirable_reward"] = reward_R[~up_R].sum() / downs
    if len(metrics) == 2:
        metrics["kto/margin"] = metrics["kto/desirable_reward"] - metrics["kto/undesirable_reward"]
    return metrics
