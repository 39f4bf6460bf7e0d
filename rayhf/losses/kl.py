"""Estimates of the KL divergence to the reference, as values and as terms of a loss.

Log-probs are float32 or wider, in nats, temperature applied. T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rayhf.errors import ConfigError
from rayhf.losses.ratios import safe_exp

KLEstimator = Literal["k1", "k2", "k3"]

KL_METRICS: Mapping[str, KLEstimator] = {"reference/kl": "k1", "reference/kl_k3": "k3"}
"""Estimates of the KL to the reference that a loss on the policy's samples reports."""


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
    gradient g * grad(logp) is unbiased for the reverse KL(policy || reference) while the policy is
    the one that sampled. k3's gradient (1 - exp(-g)) * grad(logp) is that of the forward
    KL(reference || policy): close to k2's near the reference, much stronger where the policy avoids
    tokens that the reference prefers. k1's gradient is grad(logp), zero in expectation. See
    `unbiased_kl_loss`. Raises ConfigError for k1.
    """
    if estimator == "k1":
        raise ConfigError(
            "kl estimator: k1 as a loss has zero expected gradient; use k2, or put k1 on the reward"
        )
    return kl_estimate(logp_T, ref_logp_T, estimator)


def unbiased_kl_loss(
    logp_T: Tensor, ref_logp_T: Tensor, old_logp_T: Tensor, estimator: KLEstimator
) -> Tensor:
    """Return the per-token KL term weighted by rho = exp(logp - old_logp): (T,).

    Samples are of the old policy, so rho * k1 and rho * k3 are unbiased estimates of the reverse
    KL(policy || reference) of a state at any parameters, and with rho's own gradient so are their
    gradients (DeepSeek-AI 2025, DeepSeek-V3.2, eq. 7, has k3). k2 is biased as a value: its weight
    has no gradient. k2 and k3 then have one gradient, rho * g * grad(logp); k1's is
    rho * (g + 1) * grad(logp), which is noisier. As everywhere, prefixes are held fixed.
    """
    ratio_T = safe_exp(logp_T - old_logp_T)
    if estimator == "k2":
        ratio_T = ratio_T.detach()
    return ratio_T * kl_estimate(logp_T, ref_logp_T, estimator)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLTerm:
    """KL penalty as a term of the loss."""

    coef: float
    estimator: KLEstimator
    unbiased: bool = False
    """Whether the term is weighted by the ratio to the policy that sampled."""

    def per_token(self, logp_T: Tensor, ref_logp_T: Tensor, old_logp_T: Tensor) -> Tensor:
        """Return the term without its coefficient: (T,)."""
        if self.unbiased:
            return unbiased_kl_loss(logp_T, ref_logp_T, old_logp_T, self.estimator)
        return kl_loss(logp_T, ref_logp_T, self.estimator)
