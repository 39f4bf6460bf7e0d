"""Supervised fine-tuning: negative log-likelihood of the response tokens, nothing of the prompt.

In: log-probs of the response tokens with gradient; no token field is needed. Out: LossOutput, this
micro-batch's share. T response tokens, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch
from rayhf.losses.policy import Aggregate, aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTLoss:
    """-log p of the response tokens in nats, aggregated over the whole step; picklable."""

    aggregate: Aggregate = "token_mean"
    """token_mean is the usual cross-entropy: long responses weigh more. sequence_mean: every
    response weighs the same."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ConfigError for an unknown `aggregate`.

        Metrics: learner/loss; sft/nll, mean over tokens, nats; sft/nll_response, mean over
        responses of their sums, nats; policy/entropy where it was computed.
        """
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
