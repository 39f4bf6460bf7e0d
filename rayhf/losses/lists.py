"""Loss on ranked lists: DPO's implicit rewards, trained as LambdaRank trains scores.

In: log-probs of the response tokens with gradient and a MicroBatch whose tokens carry ref_logp and
behavior_logp, whose rows carry the scalar `value`, and whose examples, each a list of responses to
one prompt, the scalar `ordered_pairs`, the number of its pairs of different value. Out: this
micro-batch's share of the mean over the step's lists. Shapes: R rows (responses), all of a list in
one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import need, policy_metrics


def lambda_weights(reward_R: Tensor, value_R: Tensor, example_R: Tensor) -> Tensor:
    """Return the weight of each pair whose first response is the better one, else 0: (R, R).

    |2^v_i - 2^v_j| * |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, with ranks by reward within the
    list, from 1; of equal rewards the first row ranks higher. LiPO-lambda (Liu et al. 2024).
    """
    same_RR = example_R[:, None] == example_R[None, :]
    row_R = torch.arange(len(reward_R), device=reward_R.device)
    above_RR = (reward_R[None, :] > reward_R[:, None]) | (
        (reward_R[None, :] == reward_R[:, None]) & (row_R[None, :] < row_R[:, None])
    )
    rank_R = 1.0 + (same_RR & above_RR).sum(dim=1)
    discount_R = 1.0 / torch.log1p(rank_R)
    gain_R = torch.exp2(value_R)
    weight_RR = (gain_R[:, None] - gain_R[None, :]) * (
        discount_R[:, None] - discount_R[None, :]
    ).abs()
    return torch.where(same_RR & (value_R[:, None] > value_R[None, :]), weight_RR, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListLoss:
    """Mean over lists of the sum over pairs of weight * -log S(reward_i - reward_j); i is better.

    reward = beta * log(p / p_ref), of the whole response. S is the logistic function.
    """

    beta: float

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        if "value" not in micro.rows:
            raise ValueError(
                f"the loss needs the row scalar 'value'; the batch has {sorted(micro.rows)}"
            )
        reward_R = self.beta * sum_rows(output_T - need(micro, "ref_logp"), micro)
        weight_RR = lambda_weights(reward_R.detach(), micro.rows["value"], micro.example_R)
        margin_RR = reward_R[:, None] - reward_R[None, :]
        count = max(micro.totals.examples, 1.0)
        loss = (weight_RR * softplus(-margin_RR)).sum() / count
        pairs = max(micro.totals.scalars.get("ordered_pairs", 0.0), 1.0)
        ordered_RR = weight_RR > 0
        metrics = policy_metrics(output_T, micro) | {
            "learner/loss": loss.detach(),
            "tpo/accuracy": (ordered_RR & (margin_RR > 0)).sum() / pairs,
            "tpo/margin": margin_RR.detach()[ordered_RR].sum() / pairs,
        }
        return LossOutput(loss=loss, metrics=metrics)
