"""The policy-gradient loss of PPO and of its critic-free relatives (GRPO, RLOO, REINFORCE++).

In: log-probs of the response tokens with gradient, and a MicroBatch whose tokens carry
  behavior_logp   under the weights that generated the tokens (rollout engine), always;
  advantage       from algorithms/advantages.py, always;
  old_logp        under the learner at the start of the iteration. Absent where the iteration has
                  exactly one optimizer step: old is then the current policy, and the ratio is 1
                  with gradient;
  ref_logp        under the reference, where a KL term or the metric reference/kl needs it.
Out: LossOutput, this micro-batch's share.

Two different ratios: rho = exp(logp - old_logp) carries the gradient and is clipped (PPO's trust
region); w = exp(old_logp - behavior_logp) carries none and is truncated (it corrects for staleness
and for the mismatch between rollout engine and learner).

Log-probs are float32 or wider, in nats, temperature applied. T response tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from rayhf.config.base import PluginConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows

Aggregate = Literal["token_mean", "sequence_mean", "sequence_sum"]
KLEstimator = Literal["k1", "k2", "k3"]

MAX_EXPONENT = 20.0
"""Nats. exp(20) is about 5e8: a larger ratio carries no information but that training broke."""


KL_METRICS: Mapping[str, KLEstimator] = {"reference/kl": "k1", "reference/kl_k3": "k3"}
"""Estimates of the KL to the reference that a loss on the policy's samples reports."""


def safe_exp(x: Tensor) -> Tensor:
    """Return exp(x) up to MAX_EXPONENT and its tangent line beyond.

    Value and gradient are finite in float32 and keep their signs. A plain clamp would drop the
    gradient of exp and, in k3, leave one of the wrong sign.
    """
    bounded = x.clamp(max=MAX_EXPONENT)
    return bounded.exp() * (1.0 + (x - bounded))


def need(micro: MicroBatch, name: str) -> Tensor:
    """Return the token field `name`, of shape (T,). Raises ValueError where it is missing."""
    if name not in micro.tokens:
        raise ValueError(
            f"the loss needs the token field {name!r}; the batch has {sorted(micro.tokens)}"
        )
    return micro.tokens[name]


def fill_unknown(behavior_logp_T: Tensor, logp_T: Tensor) -> Tensor:
    """Return behavior log-probs, with the learner's own in place of NaN (not sampled here)."""
    return torch.where(behavior_logp_T.isnan(), logp_T.detach(), behavior_logp_T)


def aggregate(values_T: Tensor, micro: MicroBatch, how: Aggregate) -> Tensor:
    """Return this micro-batch's share of the step's scalar.

    Shares add up to the whole step's value, however it is sharded. token_mean: sum / tokens of the
    step. sequence_mean: sum over rows of the row's token mean / rows of the step. sequence_sum: sum
    over rows of the row's sum / rows of the step. An empty response adds 0 and still counts as a
    row. Raises ConfigError for an unknown `how`.
    """
    if how == "token_mean":
        return values_T.sum() / max(micro.totals.tokens, 1.0)
    rows = max(micro.totals.rows, 1.0)
    if how == "sequence_sum":
        return values_T.sum() / rows
    if how == "sequence_mean":
        return (sum_rows(values_T, micro) / micro.length_R.clamp(min=1.0)).sum() / rows
    raise ConfigError(
        f"aggregate: {how!r} is not one of token_mean, sequence_mean, sequence_sum; try token_mean"
    )


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, estimator: KLEstimator) -> Tensor:
    """Return a per-token estimate of KL(policy || reference) in nats, as a value: (T,).

    Schulman 2020, "Approximating KL divergence". With g = logp - ref_logp on tokens of the policy:
    k1 = g (unbiased, any sign), k2 = g^2/2 (biased, not negative), k3 = exp(-g) - 1 + g (unbiased,
    not negative; exp continues as its tangent beyond MAX_EXPONENT).
    """
    gap_T = logp_T - ref_logp_T
    if estimator == "k1":
        return gap_T
    if estimator == "k2":
        return 0.5 * gap_T.square()
    if estimator == "k3":
        return safe_exp(-gap_T) - 1.0 + gap_T
    raise ConfigError(f"kl estimator: {estimator!r} is not one of k1, k2, k3; try k1")


def kl_loss(logp_T: Tensor, ref_logp_T: Tensor, estimator: KLEstimator) -> Tensor:
    """Return the per-token KL term to be minimized, on tokens of the policy: (T,).

    Each token's term is differentiated with its prefix held fixed, so no estimator has the gradient
    of the sequence KL: an early token's effect on later states is left out. Exact for that is k1 on
    the reward, with the reward-to-go of each token (Ziegler et al. 2019). Within a state, k2's
    gradient g * grad(logp) is unbiased for the reverse KL(policy || reference): use this one. k3's
    gradient (1 - exp(-g)) * grad(logp) is that of the forward KL(reference || policy): close to
    k2's near the reference, much stronger where the policy avoids tokens that the reference
    prefers. k1's gradient is grad(logp), zero in
    expectation. Raises ConfigError for k1.
    """
    if estimator == "k1":
        raise ConfigError(
            "kl estimator: k1 as a loss has zero expected gradient; use k2, or put k1 on the reward"
        )
    return kl_estimate(logp_T, ref_logp_T, estimator)


class Importance(NamedTuple):
    """Importance weights without gradient, and whether each was truncated (1.0 or 0.0)."""

    weight_T: Tensor
    capped_T: Tensor


def importance_weight(logp_T: Tensor, behavior_logp_T: Tensor, cap: float | None) -> Importance:
    """Return min(cap, exp(logp - behavior_logp)) per token: (T,).

    Truncated importance sampling (Ionides 2008; for the rollout-learner mismatch Yao et al. 2025).
    `logp_T` is the learner's log-prob (old_logp, or the current one, detached here). Equal
    log-probs give exactly 1. `cap` None turns the correction off: all ones.
    """
    if cap is None:
        return Importance(torch.ones_like(logp_T).detach(), torch.zeros_like(logp_T).detach())
    ratio_T = safe_exp((logp_T - fill_unknown(behavior_logp_T, logp_T)).detach())
    return Importance(ratio_T.clamp(max=cap), (ratio_T > cap).to(ratio_T.dtype))


class SurrogateTerms(NamedTuple):
    """Per-token loss with gradient, and which bounds are active (1.0 or 0.0, without gradient)."""

    loss_T: Tensor
    clip_low_T: Tensor
    """Lower bound: the advantage is negative and the token already rare enough."""
    clip_high_T: Tensor
    """Upper bound: the advantage is positive and the token already likely enough."""
    dual_clip_T: Tensor
    """Bound on the cost of a token with a negative advantage."""


def ppo_clip_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> SurrogateTerms:
    """Return PPO's clipped loss per token: (T,). Schulman et al. 2017, eq. 7.

    -w * min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A) with rho = exp(logp - old_logp).
    `dual_clip` c > 1 bounds the cost of a token with A < 0: the surrogate is at least c * A (Ye et
    al. 2020). Without it the loss is unbounded for A < 0 and rho -> infinity; rho grows linearly
    beyond exp(MAX_EXPONENT), so that loss and gradient stay finite and point the right way.
    """
    ratio_T = safe_exp(logp_T - old_logp_T)
    plain_T = ratio_T * advantage_T
    bounded_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_T
    surrogate_T = torch.minimum(plain_T, bounded_T)
    dual_T = torch.zeros_like(plain_T, dtype=torch.bool)
    if dual_clip is not None:
        floor_T = dual_clip * advantage_T
        dual_T = (advantage_T < 0) & (surrogate_T < floor_T)
        surrogate_T = torch.where(dual_T, floor_T, surrogate_T)
    active_T = bounded_T < plain_T
    dtype = plain_T.dtype
    return SurrogateTerms(
        -weight_T * surrogate_T,
        (active_T & (advantage_T < 0)).to(dtype),
        (active_T & (advantage_T > 0)).to(dtype),
        dual_T.to(dtype),
    )


def policy_metrics(logp_T: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """Return the metrics that every loss on a policy reports, as shares of the step.

    rollout/mismatch_kl: mean over tokens of behavior_logp - logp, the k1 estimate of KL(rollout ||
    learner), nats per token. rollout/mismatch_abs_max: the largest absolute gap of a token.
    reference/kl: mean per response of the summed logp - ref_logp, nats per response.
    reference/kl_k3: the same of k3, which is never negative.
    policy/entropy: mean over tokens, nats.
    """
    logp_T = logp_T.detach()
    gap_T = fill_unknown(need(micro, "behavior_logp"), logp_T) - logp_T
    metrics = {
        "rollout/mismatch_kl": aggregate(gap_T, micro, "token_mean"),
        "rollout/mismatch_abs_max": gap_T.abs().max() if gap_T.numel() else gap_T.sum(),
    }
    if "ref_logp" in micro.tokens:
        ref_T = micro.tokens["ref_logp"]
        for name, estimator in KL_METRICS.items():
            metrics[name] = aggregate(kl_estimate(logp_T, ref_T, estimator), micro, "sequence_sum")
    if micro.entropy_T is not None:
        metrics["policy/entropy"] = aggregate(micro.entropy_T.detach(), micro, "token_mean")
    return metrics


def entropy_bonus(micro: MicroBatch, coef: float, how: Aggregate) -> Tensor:
    """Return this micro-batch's share of -coef * aggregated entropy.

    Raises ValueError where the learner did not compute the entropy.
    """
    if micro.entropy_T is None:
        raise ValueError(
            'entropy_coef is set, but the batch has no entropy_T: honor Loss.entropy == "loss"'
        )
    return -coef * aggregate(micro.entropy_T, micro, how)


class PolicyLossConfig(PluginConfig):
    """Settings that every policy-gradient loss has."""

    aggregate: Aggregate = "token_mean"
    """Mean over the whole optimizer step: of tokens, of per-response means, or of per-response
    sums."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLTerm:
    """KL penalty as a term of the loss."""

    coef: float
    estimator: KLEstimator


class ClippedSurrogateConfig(PolicyLossConfig):
    """Bounds of PPO's trust region (Schulman et al. 2017)."""

    type: str = "clipped"
    clip_low: PositiveFloat = 0.2
    """Lower bound of the ratio is 1 - clip_low (PPO: 0.2)."""
    clip_high: PositiveFloat = 0.2
    """Upper bound of the ratio is 1 + clip_high (PPO: 0.2; DAPO: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c for negative advantages (Ye et al. 2020); null is off."""


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate + KL term - entropy bonus, all aggregated alike; picklable."""

    Config: ClassVar[type[PolicyLossConfig]] = ClippedSurrogateConfig

    config: ClippedSurrogateConfig
    importance_cap: float | None = 2.0
    """Upper truncation of the importance weight; None turns the correction off."""
    kl: KLTerm | None = None
    """None: no KL in the loss (it is on the reward, or off)."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "loss" if self.config.entropy_coef else "metric"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        old_T = micro.tokens["old_logp"] if "old_logp" in micro.tokens else output_T.detach()
        weight_T, capped_T = importance_weight(
            old_T, need(micro, "behavior_logp"), self.importance_cap
        )
        clipped = ppo_clip_loss(
            output_T,
            old_T,
            need(micro, "advantage"),
            weight_T,
            self.config.clip_low,
            self.config.clip_high,
            self.config.dual_clip,
        )
        how = self.config.aggregate
        loss = aggregate(clipped.loss_T, micro, how)
        metrics = self._metrics(output_T, old_T, weight_T, capped_T, clipped, micro)
        metrics["ppo/surrogate"] = loss.detach()
        if self.kl is not None:
            # Weighted too: the KL is an expectation over the learner's tokens, but the batch holds
            # the rollout's.
            kl_T = weight_T * kl_loss(output_T, need(micro, "ref_logp"), self.kl.estimator)
            kl = aggregate(kl_T, micro, how)
            metrics["ppo/kl_loss"] = kl.detach()
            loss = loss + self.kl.coef * kl
        if self.config.entropy_coef:
            loss = loss + entropy_bonus(micro, self.config.entropy_coef, how)
        metrics["learner/loss"] = loss.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _metrics(
        self,
        logp_T: Tensor,
        old_T: Tensor,
        weight_T: Tensor,
        capped_T: Tensor,
        clipped: SurrogateTerms,
        micro: MicroBatch,
    ) -> dict[str, Tensor]:
        """Return fractions of tokens and means over tokens, as shares of the step."""
        means_T: Mapping[str, Tensor] = {
            "ppo/clip_low": clipped.clip_low_T,
            "ppo/clip_high": clipped.clip_high_T,
            "ppo/dual_clip": clipped.dual_clip_T,
            "ppo/old_kl": kl_estimate(old_T, logp_T.detach(), "k3"),
            "ppo/importance_mean": weight_T,
            "ppo/importance_capped": capped_T,
        }
        return policy_metrics(logp_T, micro) | {
            name: aggregate(values_T, micro, "token_mean") for name, values_T in means_T.items()
        }
