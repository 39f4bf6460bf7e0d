"""XPO: a preference loss plus the log-prob of the initial policy's completions (Xie et al. 2024).

In: a MicroBatch of pairs as for every preference loss (rayhf/losses/pairs.py), whose examples carry
chosen_initial and rejected_initial: 1 for the row that the initial policy sampled, else 0 (both 0
for a pair that people labeled). Out: this micro-batch's share of the preference loss plus

    alpha * mean over pairs of log p(y)      y: the pair's completion of the initial policy

Minimizing it moves probability away from what the initial policy says anyway, which is the paper's
exploration bonus. It is unbounded below; the preference loss bounds it while alpha is well below
beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.kl import KL_METRICS, kl_estimate
from rayhf.losses.pairs import PairLoss


@dataclass(frozen=True)
class XPOLoss:
    """A preference loss plus the exploration bonus; picklable."""

    preference: PairLoss[Any]
    alpha: float

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return self.preference.entropy

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        output = self.preference(output_T, micro)
        chosen_P = micro.examples["chosen_initial"]
        rejected_P = micro.examples["rejected_initial"]
        scalars = micro.totals.scalars
        count = max(scalars["chosen_initial"] + scalars["rejected_initial"], 1.0)
        logp_R = sum_rows(output_T, micro)
        logp = (chosen_P * logp_R[0::2] + rejected_P * logp_R[1::2]).sum()
        loss = output.loss + self.alpha * logp / max(micro.totals.examples, 1.0)
        metrics = dict(output.metrics) | {
            "learner/loss": loss.detach(),
            "xpo/initial_logp": logp.detach() / count,
            "xpo/initial_chosen": chosen_P.sum() / count,
        }
        if "ref_logp" in micro.tokens:
            # The initial policy's completions do not measure the policy's KL to the reference.
            for name, estimator in KL_METRICS.items():
                kl_T = kl_estimate(output_T.detach(), micro.tokens["ref_logp"], estimator)
                kl_R = sum_rows(kl_T, micro)
                own = (rejected_P * kl_R[0::2] + chosen_P * kl_R[1::2]).sum()
                metrics[name] = own / count
        return LossOutput(loss=loss, metrics=metrics)
