"""HyPO: DPO on offline pairs plus a reverse-KL penalty on fresh samples (Song et al. 2024).

In: a MicroBatch whose tokens carry ref_logp and behavior_logp (NaN for offline pairs). Examples
with the scalar `pair` 1 are (chosen, rejected); those with `online` k > 0 are the k samples of one
prompt. Out: this micro-batch's share of

    mean over pairs of -log S(beta * D)
    + kl_coef * mean over samples of w_i * (c_i - b_i) * log p(y_i)

with c_i = clip(log p(y_i) - log p_ref(y_i), +-clip) without gradient, b_i the mean of the other
samples' c (leave one out) and w_i the importance weight. The gradient of KL(p || p_ref) is
E[(log-ratio) grad log p]: its other term, E[grad log p], is zero. So REINFORCE with the log-ratio
of the whole completion as cost is exact; a baseline lowers the variance and leaves the mean. The
estimator is derived here, not taken from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.config.base import Section
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.kl import kl_estimate
from rayhf.losses.policy import need, policy_metrics
from rayhf.losses.ratios import MAX_EXPONENT, fill_unknown


def leave_one_out(cost_R: Tensor, example_R: Tensor, count_E: Tensor) -> Tensor:
    """Return the cost minus the mean cost of the example's other rows: (R,).

    For a row that is alone, the cost itself.
    """
    sum_E = torch.zeros_like(count_E).index_add(0, example_R, cost_R)
    others_R = (sum_E[example_R] - cost_R) / (count_E[example_R] - 1.0).clamp(min=1.0)
    return cost_R - torch.where(count_E[example_R] > 1.0, others_R, torch.zeros_like(cost_R))


class HyPOLossConfig(Section):
    """Coefficients of HyPO's loss."""

    beta: PositiveFloat = 0.1
    """Strength of the pull toward the reference in the DPO term."""
    kl_coef: NonNegativeFloat = 0.1
    """Weight of the online KL; 0 is offline DPO."""
    clip: PositiveFloat = 100.0
    """Bound on a completion's log-ratio as its cost, in nats."""


@dataclass(frozen=True)
class HyPOLoss:
    """DPO on offline pairs plus the KL of fresh samples; picklable."""

    config: HyPOLossConfig
    importance_cap: float | None = 2.0
    """Upper truncation of the importance weight; None turns the correction off."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        ratio_R = sum_rows(output_T - need(micro, "ref_logp"), micro)
        paired_R = micro.examples["pair"][micro.example_R] > 0
        pairs = max(micro.totals.scalars["pair"], 1.0)
        samples = max(micro.totals.scalars["online"], 1.0)
        dpo, margin_P = self._dpo(ratio_R[paired_R])
        kl, kl_sum = self._kl(output_T, ratio_R, ~paired_R, micro)
        loss = dpo / pairs + self.config.kl_coef * kl / samples
        metrics = policy_metrics(output_T, micro) | {
            "learner/loss": loss.detach(),
            "hypo/dpo_loss": dpo.detach() / pairs,
            "hypo/dpo_accuracy": (margin_P > 0).to(torch.float32).sum() / pairs,
            "hypo/online_kl": kl_sum / samples,
        }
        # The mean log-ratio over offline pairs is no KL of the policy: only samples count.
        k3_T = kl_estimate(output_T.detach(), micro.tokens["ref_logp"], "k3")
        metrics["reference/kl"] = metrics["hypo/online_kl"]
        metrics["reference/kl_k3"] = sum_rows(k3_T, micro)[~paired_R].sum() / samples
        return LossOutput(loss=loss, metrics=metrics)

    def _dpo(self, ratio_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the pairs, and their margins D."""
        if ratio_R.numel() % 2:
            raise ValueError(
                f"offline pairs need (chosen, rejected) rows two by two, got {ratio_R.numel()} rows"
            )
        margin_P = ratio_R[0::2] - ratio_R[1::2]
        return -logsigmoid(self.config.beta * margin_P).sum(), margin_P.detach()

    def _kl(
        self, output_T: Tensor, ratio_R: Tensor, online_R: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the log-ratio, both summed over the samples."""
        logp_R = sum_rows(output_T, micro)
        cost_R = ratio_R.detach().clamp(-self.config.clip, self.config.clip)
        count_E = torch.zeros_like(micro.examples["pair"]).index_add(
            0, micro.example_R, torch.ones_like(cost_R)
        )
        advantage_R = leave_one_out(cost_R, micro.example_R, count_E)
        weight_R = torch.ones_like(cost_R)
        if self.importance_cap is not None:
            gap_T = (output_T - fill_unknown(need(micro, "behavior_logp"), output_T)).detach()
            mean_R = sum_rows(gap_T, micro) / micro.length_R.clamp(min=1.0)
            weight_R = mean_R.clamp(max=MAX_EXPONENT).exp().clamp(max=self.importance_cap)
        surrogate = (weight_R * advantage_R * logp_R)[online_R].sum()
        return surrogate, ratio_R.detach()[online_R].sum()
