"""Losses of self-play: the regressions of SPPO, of INPO, and of MNPO, which is INPO's.

In: log-probs of the response tokens with gradient and a MicroBatch whose tokens carry ref_logp;
SPPO's rows carry the scalar `target`, INPO's examples are (chosen, rejected) and its tokens carry
the opponent's log-probs. Out: this micro-batch's share.

Both are least squares on log-ratios whose targets are of the order of eta (SPPO: +-eta/2, eta 1000)
or 1/eta: taken literally the loss is of order 10^5 and gradient clipping would decide the direction
of a step. Both are therefore scaled so that the gradient is (residual of order 1) * grad log-prob.
The minimizer is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.pairs import check_pairs
from rayhf.losses.policy import need, policy_metrics


def sppo(ratio_R: Tensor, target_R: Tensor, eta: float) -> Tensor:
    """Return eta / 2 * (d / eta - target)^2 per response: (R,).

    d = log-ratio to the reference, target = P(win) - 1/2. Eq. 4.4 of Wu et al. 2024 (SPPO) is
    (d - eta * target)^2, 2 * eta times this.
    """
    return 0.5 * eta * (ratio_R / eta - target_R).square()


def inpo(gap_P: Tensor, ref_gap_P: Tensor, old_gap_P: Tensor, eta: float, tau: float) -> Tensor:
    """Return (eta * H - 1/2)^2 / eta per pair: (P,).

    H = gap - tau/eta * ref_gap - (eta - tau)/eta * old_gap. A gap is log p(chosen) - log
    p(rejected): under the policy, the fixed reference, and the policy at the start of the
    iteration. Section 4 of Zhang et al. 2024 (INPO) has (H - 1 / (2 eta))^2, 1 / eta times this.
    """
    h_P = gap_P - (tau / eta) * ref_gap_P - ((eta - tau) / eta) * old_gap_P
    return (eta * h_P - 0.5).square() / eta


@dataclass(frozen=True, slots=True, kw_only=True)
class SPPOLoss:
    """Mean over the step's responses of `sppo`.

    With `pull` d is the log-ratio to the policy before the iteration (old_logp), and the target is
    lower by pull / eta times that policy's log-ratio to the fixed reference. The minimizer is then
    log p = log p_old + eta * (P(win) - 1/2) - pull * log(p_old / p_ref): a step of magnetic mirror
    descent (Sokota et al. 2023), as Nash-MD regularizes (Munos et al. 2023).
    """

    eta: float
    pull: float = 0.0

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        if "target" not in micro.rows:
            raise ValueError(
                f"the loss needs the row scalar 'target'; the batch has {sorted(micro.rows)}"
            )
        ref_T = need(micro, "ref_logp")
        target_R = micro.rows["target"]
        if self.pull:
            old_T = need(micro, "old_logp")
            target_R = target_R - self.pull / self.eta * sum_rows(old_T - ref_T, micro)
            ref_T = old_T
        ratio_R = sum_rows(output_T - ref_T, micro)
        count = max(micro.totals.rows, 1.0)
        loss = sppo(ratio_R, target_R, self.eta).sum() / count
        residual_R = (ratio_R / self.eta - target_R).detach()
        metrics = policy_metrics(output_T, micro) | {
            "learner/loss": loss.detach(),
            "sppo/residual_abs": residual_R.abs().sum() / count,
            "sppo/target_abs": target_R.abs().sum() / count,
        }
        return LossOutput(loss=loss, metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class INPOLoss:
    """Mean over the step's pairs of `inpo`."""

    eta: float
    tau: float
    opponent: str = "old_logp"
    """Token value of the opponent's log-probs."""
    name: str = "inpo"
    """Prefix of the metrics."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        check_pairs(micro)

        def gap(values_T: Tensor) -> Tensor:
            values_R = sum_rows(values_T, micro)
            return values_R[0::2] - values_R[1::2]

        gap_P = gap(output_T)
        ref_gap_P = gap(need(micro, "ref_logp"))
        old_gap_P = gap(need(micro, self.opponent))
        loss_P = inpo(gap_P, ref_gap_P, old_gap_P, self.eta, self.tau)
        count = max(micro.totals.examples, 1.0)
        loss = loss_P.sum() / count
        metrics = policy_metrics(output_T, micro) | {
            "learner/loss": loss.detach(),
            f"{self.name}/gap": gap_P.detach().sum() / count,
            f"{self.name}/accuracy": (gap_P > ref_gap_P).to(torch.float32).sum() / count,
        }
        return LossOutput(loss=loss, metrics=metrics)
