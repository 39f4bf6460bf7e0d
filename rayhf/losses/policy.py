"""Policy-gradient losses: their common parts, and PPO's clipped surrogate.

In: log-probs of the response tokens with gradient, and a MicroBatch whose tokens carry
  behavior_logp   under the weights that generated the tokens (rollout engine), always;
  advantage       from algorithms/advantages.py, always;
  old_logp        under the learner at the start of the iteration. Absent where the iteration has
                  exactly one optimizer step: old is then the current policy, and the ratio is 1
                  with gradient;
  ref_logp        under the reference, where a KL term or the metric reference/kl needs it.
Out: LossOutput, this micro-batch's share.

Two different ratios: rho = exp(logp - old_logp) carries the gradient and is clipped (PPO's trust
region); w = exp(old_logp - behavior_logp) carries none and is truncated or masked (it corrects for
staleness and for the mismatch between rollout engine and learner).

Log-probs are float32 or wider, in nats, temperature applied. T response tokens, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from rayhf.config.algorithms import PolicyImportanceConfig
from rayhf.config.base import PluginConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.kl import KL_METRICS, KLTerm, kl_estimate
from rayhf.losses.ratios import Importance, fill_unknown, importance_weight, safe_exp

Aggregate = Literal["token_mean", "sequence_mean", "sequence_sum"]
PolicyAggregate = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]


def need(micro: MicroBatch, name: str) -> Tensor:
    """Return the token field `name`, of shape (T,). Raises ValueError where it is missing."""
    if name not in micro.tokens:
        raise ValueError(
            f"the loss needs the token field {name!r}; the batch has {sorted(micro.tokens)}"
        )
    return micro.tokens[name]


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


class SurrogateTerms(NamedTuple):
    """Per-token loss with gradient, and which bounds are active (1.0 or 0.0, without gradient)."""

    loss_T: Tensor
    clip_low_T: Tensor
    """Lower bound: the advantage is negative and the token already rare enough."""
    clip_high_T: Tensor
    """Upper bound: the advantage is positive and the token already likely enough."""
    dual_clip_T: Tensor
    """Bound on the cost of a token with a negative advantage."""


def clipped_surrogate(
    ratio_T: Tensor,
    advantage_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> SurrogateTerms:
    """Return PPO's clipped loss per token: (T,). Schulman et al. 2017, eq. 7.

    -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A). `dual_clip` c > 1 bounds the cost of
    a token with A < 0: the surrogate is at least c * A (Ye et al. 2020). Without it the loss is
    unbounded for A < 0 and rho -> infinity.
    """
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
        -surrogate_T,
        (active_T & (advantage_T < 0)).to(dtype),
        (active_T & (advantage_T > 0)).to(dtype),
        dual_T.to(dtype),
    )


def policy_metrics(logp_T: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """Return the metrics that every loss on a policy reports, as shares of the step.

    rollout/mismatch_kl: mean over tokens of behavior_logp - old_logp, the k1 estimate of KL(rollout
    || learner) before the iteration's first step, nats per token; logp is old_logp where there is
    one step. rollout/mismatch_abs_max: the largest absolute gap of a token.
    reference/kl: mean per response of the summed logp - ref_logp, nats per response.
    reference/kl_k3: the same of k3, which is never negative.
    policy/entropy: mean over tokens, nats.
    """
    logp_T = logp_T.detach()
    # After a step the policy differs from the engine's for good: that is no mismatch.
    before_T = fill_unknown(micro.tokens.get("old_logp", logp_T), logp_T)
    gap_T = fill_unknown(need(micro, "behavior_logp"), before_T) - before_T
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


class PolicyLossConfig(PluginConfig):
    """Settings that every policy-gradient loss has."""

    aggregate: PolicyAggregate = "token_mean"
    """Mean over the whole optimizer step: of tokens, of per-response means, or of per-response
    sums. constant_length divides these sums by rollout.max_tokens (Dr. GRPO)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""


_TRUNCATED = PolicyImportanceConfig()


@dataclass(frozen=True)
class PolicyLoss(ABC):
    """Surrogate + KL term - entropy bonus, all aggregated alike; picklable.

    A subclass defines `surrogate` and names its config class in `Config`.
    """

    Config: ClassVar[type[PolicyLossConfig]]

    config: PolicyLossConfig
    importance: PolicyImportanceConfig = _TRUNCATED
    """Importance weights of tokens, old policy over rollout engine."""
    kl: KLTerm | None = None
    """None: no KL in the loss (it is on the reward, or off)."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus in place of the config's."""
    max_tokens: int | None = None
    """Longest response; only constant_length needs it."""

    @abstractmethod
    def surrogate(
        self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, micro: MicroBatch
    ) -> SurrogateTerms:
        """Return the loss per token, without importance weights, and which bounds are active."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "loss" if self._entropy_coef else "metric"

    @property
    def _entropy_coef(self) -> float:
        return self.config.entropy_coef if self.entropy_coef is None else self.entropy_coef

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        old_T = micro.tokens["old_logp"] if "old_logp" in micro.tokens else output_T.detach()
        weights = importance_weight(old_T, need(micro, "behavior_logp"), micro, self.importance)
        terms = self.surrogate(output_T, old_T, need(micro, "advantage"), micro)
        loss = self.aggregate(weights.weight_T * terms.loss_T, micro)
        metrics = self._metrics(output_T, old_T, weights, terms, micro)
        metrics["ppo/surrogate"] = loss.detach()
        if self.kl is not None:
            # Weighted too: the KL is an expectation over the learner's tokens, but the batch holds
            # the rollout's.
            kl_T = weights.weight_T * self.kl.per_token(output_T, need(micro, "ref_logp"), old_T)
            kl = self.aggregate(kl_T, micro)
            metrics["ppo/kl_loss"] = kl.detach()
            loss = loss + self.kl.coef * kl
        if self._entropy_coef:
            loss = loss - self._entropy_coef * self.aggregate(_entropy(micro), micro)
        metrics["learner/loss"] = loss.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def aggregate(self, values_T: Tensor, micro: MicroBatch) -> Tensor:
        """Return this micro-batch's share of token values, aggregated as the config says."""
        how = self.config.aggregate
        if how != "constant_length":
            return aggregate(values_T, micro, how)
        if self.max_tokens is None:
            raise ValueError("constant_length is set, but the loss was not given max_tokens")
        return aggregate(values_T, micro, "sequence_sum") / self.max_tokens

    def _metrics(
        self,
        logp_T: Tensor,
        old_T: Tensor,
        weights: Importance,
        terms: SurrogateTerms,
        micro: MicroBatch,
    ) -> dict[str, Tensor]:
        """Return fractions of tokens and means over tokens, as shares of the step."""
        means_T: Mapping[str, Tensor] = {
            "ppo/clip_low": terms.clip_low_T,
            "ppo/clip_high": terms.clip_high_T,
            "ppo/dual_clip": terms.dual_clip_T,
            "ppo/old_kl": kl_estimate(old_T, logp_T.detach(), "k3"),
            "ppo/importance_mean": weights.weight_T,
            "ppo/importance_capped": weights.capped_T,
        }
        return policy_metrics(logp_T, micro) | {
            name: aggregate(values_T, micro, "token_mean") for name, values_T in means_T.items()
        }


def _entropy(micro: MicroBatch) -> Tensor:
    """Return the entropy of every token. Raises ValueError where it was not computed."""
    if micro.entropy_T is None:
        raise ValueError(
            'entropy_coef is set, but the batch has no entropy_T: honor Loss.entropy == "loss"'
        )
    return micro.entropy_T


class ClippedSurrogateConfig(PolicyLossConfig):
    """Bounds of PPO's trust region (Schulman et al. 2017)."""

    type: str = "clipped"
    clip_low: PositiveFloat = 0.2
    """Lower bound of the ratio is 1 - clip_low (PPO: 0.2)."""
    clip_high: PositiveFloat = 0.2
    """Upper bound of the ratio is 1 + clip_high (PPO: 0.2; DAPO: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c for negative advantages (Ye et al. 2020); null is off."""


class ClippedSurrogate(PolicyLoss):
    """PPO's clipped surrogate: the ratio of every token is bounded by itself."""

    Config = ClippedSurrogateConfig
    config: ClippedSurrogateConfig

    def surrogate(
        self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, micro: MicroBatch
    ) -> SurrogateTerms:
        """Return the clipped loss per token; the ratio grows linearly beyond MAX_EXPONENT."""
        config = self.config
        ratio_T = safe_exp(logp_T - old_logp_T)
        bounds = (config.clip_low, config.clip_high, config.dual_clip)
        return clipped_surrogate(ratio_T, advantage_T, *bounds)
