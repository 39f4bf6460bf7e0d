"""HyPO: DPO on given pairs plus a reverse-KL penalty on fresh samples, in one optimizer step. Song
et al. 2024 (2406.01462).

In: a MicroBatch whose tokens carry ref_logp and behavior_logp (NaN for given answers). Examples
with the scalar `pair` 1 are (chosen, rejected); those with `online` k > 0 are the k samples of one
prompt. Out: this micro-batch's share of

    mean over pairs of -log S(beta * D)  +  kl_coef * mean over samples of w_i * (c_i - b_i) * log
                                         p(y_i)

with c_i = clip(log p(y_i) - log p_ref(y_i), +-clip) without gradient, b_i the mean of the other
samples' c (leave one out) and w_i the importance weight. The gradient of KL(p || p_ref) is
E[(log-ratio) grad log p]: its other term, E[grad log p], is zero. So REINFORCE with the log-ratio
of the whole answer as cost is exact; a baseline lowers the variance and leaves the mean. The
estimator is derived here; the paper's text was not at hand (ALGORITHMS A6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.errors import ConfigError
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import MAX_EXPONENT, check_cap, known, need, policy_metrics


def leave_one_out(cost_R: Tensor, example_R: Tensor, count_E: Tensor) -> Tensor:
    """cost minus the mean cost of the example's other rows: (R,); the cost itself for a row that is
    alone."""
    sum_E = torch.zeros_like(count_E).index_add(0, example_R, cost_R)
    others_R = (sum_E[example_R] - cost_R) / (count_E[example_R] - 1.0).clamp(min=1.0)
    return cost_R - torch.where(count_E[example_R] > 1.0, others_R, torch.zeros_like(cost_R))


@dataclass(frozen=True, slots=True, kw_only=True)
class HyPOLoss:
    """Plain numbers: picklable."""

    beta: float
    kl_coef: float
    clip: float
    """Nats per answer."""
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        check_cap(self.importance_cap)
        if not self.clip > 0.0:
            raise ConfigError(
                f"algorithm.clip: {self.clip} must be above 0 (nats per answer); try 100"
            )

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        ratio_R = sum_rows(output_T - need(micro, "ref_logp"), micro)
        paired_R = micro.examples["pair"][micro.example_R] > 0
        pairs, samples = micro.totals.scalars["pair"], micro.totals.scalars["online"]
        dpo, margin_P = self._dpo(ratio_R[paired_R])
        kl, mean_kl = self._kl(output_T, ratio_R, ~paired_R, micro)
        loss = dpo / max(pairs, 1.0) + self.kl_coef * kl / max(samples, 1.0)
        metrics = policy_metrics(output_T, micro) | {
            "learner/loss": loss.detach(),
            "hypo/dpo_loss": dpo.detach() / max(pairs, 1.0),
            "hypo/dpo_accuracy": (margin_P > 0).to(torch.float32).sum() / max(pairs, 1.0),
            "hypo/online_kl": mean_kl / max(samples, 1.0),
        }
        # Of given answers too, the mean log-ratio would say nothing of the policy's own KL.
        metrics["reference/kl"] = metrics["hypo/online_kl"]
        return LossOutput(loss=loss, metrics=metrics)

    def _dpo(self, ratio_R: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the pairs, and their margins D."""
        if ratio_R.numel() % 2:
            raise ValueError(
                f"given pairs need (chosen, rejected) rows two by two, got {ratio_R.numel()} rows"
            )
        margin_P = ratio_R[0::2] - ratio_R[1::2]
        return -logsigmoid(self.beta * margin_P).sum(), margin_P.detach()

    def _kl(
        self, output_T: Tensor, ratio_R: Tensor, online_R: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Sum over the samples of the surrogate, and of the log-ratios."""
        logp_R = sum_rows(output_T, micro)
        cost_R = ratio_R.detach().clamp(-self.clip, self.clip)
        count_E = torch.zeros_like(micro.examples["pair"]).index_add(
            0, micro.example_R, torch.ones_like(cost_R)
        )
        advantage_R = leave_one_out(cost_R, micro.example_R, count_E)
        weight_R = torch.ones_like(cost_R)
        if self.importance_cap is not None:
            gap_T = (output_T - known(need(micro, "behavior_logp"), output_T)).detach()
            mean_R = sum_rows(gap_T, micro) / micro.length_R.clamp(min=1.0)
            weight_R = mean_R.clamp(max=MAX_EXPONENT).exp().clamp(max=self.importance_cap)
        surrogate = (weight_R * advantage_R * logp_R)[online_R].sum()
        return surrogate, ratio_R.detach()[online_R].sum()
