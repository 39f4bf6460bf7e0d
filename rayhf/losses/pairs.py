"""Base of the preference losses: pairs (chosen, rejected) of a micro-batch as sequence log-probs.

In: log-probs of the response tokens with gradient, and a MicroBatch of pairs: rows 2p and 2p + 1
are the chosen and the rejected response of pair p. Its tokens carry behavior_logp (always),
ref_logp (unless the loss is reference-free) and old_logp (optional, as in policy.py); its examples
may carry label_smoothing (soft labels, for losses that accept them). Out: LossOutput, this
micro-batch's share of the mean over the step's pairs.

A new loss subclasses PairLoss with one method, `per_pair`, and a config class. Shapes: P pairs,
T response tokens, R = 2P rows. An empty response has log-prob 0 and counts as one token long where
a mean is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from rayhf.config.base import PluginConfig
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import need, policy_metrics
from rayhf.losses.ratios import MAX_EXPONENT, fill_unknown


class PairLossConfig(PluginConfig):
    """Settings that every preference loss has."""

    beta: PositiveFloat = 0.1
    """Strength of the pull toward the reference (TRL's and RLHFlow's default)."""


C = TypeVar("C", bound=PairLossConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Sequence sums in nats and lengths in tokens, all of shape (P,).

    A reference-free loss never reads ref_*.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    label_smoothing_P: Tensor | None = None
    """One smoothing per pair, 0 to 1/2; only where the loss accepts soft labels."""

    @property
    def chosen_ratio_P(self) -> Tensor:
        """Log-ratio d of the chosen response to the reference."""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """Log-ratio d of the rejected response to the reference."""
        return self.rejected_P - self.ref_rejected_P

    @property
    def gap_P(self) -> Tensor:
        """D = d_chosen - d_rejected."""
        return self.chosen_ratio_P - self.rejected_ratio_P

    @property
    def chosen_mean_P(self) -> Tensor:
        """Mean token log-prob of the chosen response."""
        return self.chosen_P / self.chosen_length_P.clamp(min=1.0)

    @property
    def rejected_mean_P(self) -> Tensor:
        """Mean token log-prob of the rejected response."""
        return self.rejected_P / self.rejected_length_P.clamp(min=1.0)


def nll(pairs: PairLogps) -> Tensor:
    """Return the chosen response's negative log-likelihood, mean per token: (P,).

    Pang et al. 2024 (iterative reasoning preference optimization).
    """
    return -pairs.chosen_mean_P


@dataclass(frozen=True)
class PairLoss(ABC, Generic[C]):
    """Mean over pairs of weight * (per_pair + nll_coef * NLL(chosen)); picklable.

    The weight is the truncated importance weight of the pair (`pair_importance_weight`).
    """

    Config: ClassVar[type[PairLossConfig]] = PairLossConfig
    needs_reference: ClassVar[bool] = True
    """Whether the loss reads ref_logp."""
    accepts_soft_labels: ClassVar[bool] = False
    """Whether examples may carry a label_smoothing each."""

    config: C
    importance_cap: float | None = 2.0
    """Upper truncation of the importance weight; None turns the correction off."""
    nll_coef: float = 0.0
    """Weight of the chosen response's negative log-likelihood, mean per token (Pang et al. 2024);
    added to the one that cpo and orpo contain."""
    sampled: bool = True
    """Whether responses are the policy's own: only then do they measure its entropy, its KL to the
    reference, and the mismatch with the engines."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "metric" if self.sampled else "off"

    @abstractmethod
    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair: (P,)."""

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards (chosen, rejected), each (P,), for metrics."""
        beta = self.config.beta
        return beta * pairs.chosen_ratio_P, beta * pairs.rejected_ratio_P

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        ref_T = need(micro, "ref_logp") if self.needs_reference else None
        pairs = pair_logps(output_T, ref_T, micro, self._label_smoothing(micro))
        old_T = micro.tokens["old_logp"] if "old_logp" in micro.tokens else output_T.detach()
        behavior_T = need(micro, "behavior_logp")
        weight_P, capped_P = pair_importance_weight(old_T, behavior_T, micro, self.importance_cap)
        loss_P = self.per_pair(pairs)
        if self.nll_coef:
            loss_P = loss_P + self.nll_coef * nll(pairs)
        count = max(micro.totals.examples, 1.0)
        loss = (weight_P * loss_P).sum() / count
        chosen_P, rejected_P = self.rewards(pairs)
        means_P = {
            "dpo/chosen_reward": chosen_P,
            "dpo/rejected_reward": rejected_P,
            "dpo/margin": chosen_P - rejected_P,
            "dpo/accuracy": (chosen_P > rejected_P).to(chosen_P.dtype),
            "dpo/chosen_logp": pairs.chosen_P,
            "dpo/rejected_logp": pairs.rejected_P,
        }
        metrics = {}
        if self.sampled:
            means_P |= {"dpo/importance_mean": weight_P, "dpo/importance_capped": capped_P}
            metrics = policy_metrics(output_T, micro)
        metrics |= {name: x_P.detach().sum() / count for name, x_P in means_P.items()}
        metrics["learner/loss"] = loss.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _label_smoothing(self, micro: MicroBatch) -> Tensor | None:
        """Return the examples' own label_smoothing, (E,) = (P,), where they have one."""
        smoothing_P = micro.examples.get("label_smoothing")
        if smoothing_P is None:
            return None
        if not self.accepts_soft_labels:
            raise ValueError(
                "the examples carry a label_smoothing each, which the loss "
                f"{self.config.type or type(self).__name__} does not accept; expected sigmoid"
            )
        # NaN (an example without a label) is refused too.
        if not bool(((smoothing_P >= 0.0) & (smoothing_P <= 0.5)).all()):
            raise ValueError(
                f"label_smoothing per example must be from 0 to 0.5, got {smoothing_P.tolist()}"
            )
        return smoothing_P


def check_pairs(micro: MicroBatch) -> None:
    """Raise ValueError unless the rows are neighbors of one example, two by two."""
    example_R = micro.example_R
    if example_R.numel() % 2 or not torch.equal(example_R[0::2], example_R[1::2]):
        raise ValueError(
            "a preference loss needs (chosen, rejected) rows two by two; "
            f"examples of the rows: {example_R.tolist()}"
        )


def pair_logps(
    logp_T: Tensor,
    ref_logp_T: Tensor | None,
    micro: MicroBatch,
    label_smoothing_P: Tensor | None = None,
) -> PairLogps:
    """Return the sequence sums of a micro-batch of pairs. Without a reference, ref_* are zero."""
    check_pairs(micro)
    logp_R = sum_rows(logp_T, micro)
    ref_R = torch.zeros_like(logp_R).detach() if ref_logp_T is None else sum_rows(ref_logp_T, micro)
    return PairLogps(
        chosen_P=logp_R[0::2],
        rejected_P=logp_R[1::2],
        ref_chosen_P=ref_R[0::2],
        ref_rejected_P=ref_R[1::2],
        chosen_length_P=micro.length_R[0::2],
        rejected_length_P=micro.length_R[1::2],
        label_smoothing_P=label_smoothing_P,
    )


class PairImportance(NamedTuple):
    """Importance weights without gradient, and whether each was truncated (1.0 or 0.0)."""

    weight_P: Tensor
    capped_P: Tensor


def pair_importance_weight(
    logp_T: Tensor, behavior_logp_T: Tensor, micro: MicroBatch, cap: float | None
) -> PairImportance:
    """Return min(cap, exp(mean over the pair's tokens of logp - behavior_logp)): (P,).

    Exactly 1 on-policy; `cap` None is off. A pair was drawn with probability mu(chosen) *
    mu(rejected), so its exact weight is the exponential of the SUMMED log-ratio of both rows, whose
    variance grows exponentially with length: after truncation it is the cap or nothing. The mean
    per token (the geometric mean ratio, as in GSPO, Zheng et al. 2025) is monotone in the exact
    weight, keeps its on-policy value, and has a scale that does not depend on length. Biased, low
    variance. Tokens with unknown behavior log-probs (NaN: not sampled here) count as on-policy.
    """
    check_pairs(micro)
    gap_R = sum_rows((logp_T - fill_unknown(behavior_logp_T, logp_T)).detach(), micro)
    if cap is None:
        return PairImportance(torch.ones_like(gap_R[0::2]), torch.zeros_like(gap_R[0::2]))
    length_P = (micro.length_R[0::2] + micro.length_R[1::2]).clamp(min=1.0)
    ratio_P = ((gap_R[0::2] + gap_R[1::2]) / length_P).clamp(max=MAX_EXPONENT).exp()
    return PairImportance(ratio_P.clamp(max=cap), (ratio_P > cap).to(ratio_P.dtype))
