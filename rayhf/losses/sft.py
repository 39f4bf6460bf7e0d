"""Supervised fine-tuning: negative log-likelihood of the response tokens, nothing of the prompt.

In: log-probs of the response tokens with gradient. Where rows carry the token field `mask`, only
tokens with mask 1 are trained on, and examples carry their number as the scalar `trained_tokens`.
Out: LossOutput, this micro-batch's share. T response tokens, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import Aggregate, aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTLoss:
    """-log p of the response tokens in nats, aggregated over the whole step; picklable."""

    aggregate: Aggregate = "token_mean"
    """token_mean is the usual cross-entropy: long responses weigh more. sequence_mean: every
    response weighs the same."""

    entropy: Literal["off", "metric", "loss"] = "metric"
    """Whether entropy_T is computed, and whether it carries gradient."""

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ConfigError for an unknown `aggregate`.

        Metrics: learner/loss; sft/nll, mean over tokens, nats; sft/nll_response, mean over
        responses of their sums, nats; policy/entropy where it was computed.
        """
        if "mask" in micro.tokens:
            output_T, micro = trained_part(output_T, micro)
        nll_T = -output_T
        loss = aggregate(nll_T, micro, self.aggregate)
        metrics = {
            "learner/loss": loss.detach(),
            "sft/nll": aggregate(nll_T.detach(), micro, "token_mean"),
            "sft/nll_response": aggregate(nll_T.detach(), micro, "sequence_sum"),
        }
        if micro.entropy_T is not None:
            metrics["policy/entropy"] = aggregate(micro.entropy_T.detach(), micro, "token_mean")
        return LossOutput(loss=loss, metrics=metrics)


def trained_part(output_T: Tensor, micro: MicroBatch) -> tuple[Tensor, MicroBatch]:
    """Return the log-probs and the micro-batch of the tokens with mask 1.

    Lengths and totals then count those tokens only.
    """
    mask_T = micro.tokens["mask"]
    kept_T = mask_T > 0
    entropy_T = micro.entropy_T
    return output_T[kept_T], replace(
        micro,
        tokens={name: values_T[kept_T] for name, values_T in micro.tokens.items()},
        row_T=micro.row_T[kept_T],
        length_R=sum_rows(mask_T, micro),
        totals=replace(micro.totals, tokens=micro.totals.scalars["trained_tokens"]),
        entropy_T=None if entropy_T is None else entropy_T[kept_T],
    )
