"""The preference family: one loss per pair (chosen, rejected), each with its config.

Notation: lp = sum of log-probs over a response, d = lp - lp of the reference, D = d_chosen -
d_rejected, u = beta * D, S = sigmoid. Everything is on sequence SUMS; only simpo, orpo, ipo with
log_ratios mean, and the NLL term divide by the response's length. All losses and gradients are
finite for log-ratios of +-500; those that are unbounded by definition grow at most quadratically
(ipo, sppo_hard) or linearly (the others), robust also downwards.

The table LOSSES in rayhf/config/registry.py gives each class its name in `algorithm.loss`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.losses.pairs import PairLogps, PairLoss, PairLossConfig, nll
from rayhf.losses.ratios import safe_exp

LOG_ODDS_MARGIN = 1e-6
"""ORPO: in log(1 - p), a mean token log-prob closer to 0 (probability 1) than this counts as this
far away."""


class SigmoidConfig(PairLossConfig):
    """DPO, and cDPO with label_smoothing above 0."""

    type: str = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share e of flipped labels."""


class Sigmoid(PairLoss[SigmoidConfig]):
    """DPO (Rafailov et al. 2023, eq. 7) and cDPO: -(1 - e) log S(u) - e log S(-u).

    cDPO is e > 0 (Mitchell 2023). e may differ between pairs (soft labels, Xie et al. 2024), where
    the config's is 0; at e = 1/2 the loss only pulls u to 0.
    """

    Config = SigmoidConfig
    accepts_soft_labels = True

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        logits_P = self.config.beta * pairs.gap_P
        smoothing: float | Tensor = self.config.label_smoothing
        if pairs.label_smoothing_P is not None:
            if smoothing:
                raise ValueError(
                    f"the examples carry a label_smoothing each, but the loss has {smoothing:g}; "
                    "expected 0"
                )
            smoothing = pairs.label_smoothing_P
        return -(1.0 - smoothing) * logsigmoid(logits_P) - smoothing * logsigmoid(-logits_P)


class IPOConfig(PairLossConfig):
    """IPO; beta is the paper's tau."""

    type: str = "ipo"
    log_ratios: Literal["sum", "mean"] = "sum"
    """What is regressed onto 1 / (2 beta). sum: log-ratios of whole responses, as in the paper (5
    nats at beta 0.1). mean: of each response per token, as in TRL and the authors' later advice: a
    beta of one convention does not carry over to the other."""


class IPO(PairLoss[IPOConfig]):
    """IPO (Azar et al. 2023, eq. 17, beta as tau): (D - 1 / (2 beta))^2.

    D is that of sequence sums, or of means per token (log_ratios).
    """

    Config = IPOConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        target = 1.0 / (2.0 * self.config.beta)
        gap_P = pairs.gap_P
        if self.config.log_ratios == "mean":
            chosen_P = pairs.chosen_ratio_P / pairs.chosen_length_P.clamp(min=1.0)
            gap_P = chosen_P - pairs.rejected_ratio_P / pairs.rejected_length_P.clamp(min=1.0)
        return (gap_P - target).square()


class HingeConfig(PairLossConfig):
    """SLiC on log-ratios; beta is RSO's gamma."""

    type: str = "hinge"


class Hinge(PairLoss[HingeConfig]):
    """SLiC (Zhao et al. 2023, section 2) on log-ratios: max(0, 1 - u).

    As in RSO (Liu et al. 2023), whose gamma is beta.
    """

    Config = HingeConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        return (1.0 - self.config.beta * pairs.gap_P).clamp(min=0.0)


class RobustConfig(PairLossConfig):
    """Robust DPO (rDPO)."""

    type: str = "robust"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share e of flipped labels."""


class Robust(PairLoss[RobustConfig]):
    """rDPO (Chowdhury et al. 2024, section 3.1): (-(1 - e) log S(u) + e log S(-u)) / (1 - 2e).

    Unbiased under random flips. Unbounded below for e > 0 (slope -e * beta / (1 - 2e)).
    """

    Config = RobustConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        logits_P = self.config.beta * pairs.gap_P
        flip = self.config.label_smoothing
        kept_P = -(1.0 - flip) * logsigmoid(logits_P)
        return (kept_P + flip * logsigmoid(-logits_P)) / (1.0 - 2.0 * flip)


class SimPOConfig(PairLossConfig):
    """SimPO; beta scales mean log-probs."""

    type: str = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of mean log-probs (the paper's lowest; it tunes 2 to 10)."""
    gamma: NonNegativeFloat = 1.0
    """Target margin, in nats of beta-scaled mean log-prob (the paper: half of beta or less)."""


class SimPO(PairLoss[SimPOConfig]):
    """SimPO (Meng et al. 2024, eq. 6): -log S(beta * (mean_chosen - mean_rejected) - gamma).

    Reference-free.
    """

    Config = SimPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        gap_P = pairs.chosen_mean_P - pairs.rejected_mean_P
        return -logsigmoid(self.config.beta * gap_P - self.config.gamma)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Return beta times the mean log-probs."""
        beta = self.config.beta
        return beta * pairs.chosen_mean_P, beta * pairs.rejected_mean_P


class CPOConfig(PairLossConfig):
    """CPO with its uniform prior."""

    type: str = "cpo"


class CPO(PairLoss[CPOConfig]):
    """CPO (Xu et al. 2024): -log S(beta * (lp_chosen - lp_rejected)) + NLL(chosen).

    With the paper's uniform prior: reference-free. The NLL is a mean per token, as in the authors'
    code.
    """

    Config = CPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        return -logsigmoid(self.config.beta * (pairs.chosen_P - pairs.rejected_P)) + nll(pairs)


class ORPOConfig(PairLossConfig):
    """ORPO; beta is the paper's lambda."""

    type: str = "orpo"


class ORPO(PairLoss[ORPOConfig]):
    """ORPO (Hong et al. 2024): NLL(chosen) - beta * log S(log-odds chosen - log-odds rejected).

    Reference-free.
    """

    Config = ORPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        odds_P = log_odds(pairs.chosen_mean_P) - log_odds(pairs.rejected_mean_P)
        return nll(pairs) - self.config.beta * logsigmoid(odds_P)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Return beta times the mean log-probs."""
        beta = self.config.beta
        return beta * pairs.chosen_mean_P, beta * pairs.rejected_mean_P


def log_odds(mean_logp_P: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean_logp): (P,).

    Near p = 1 the true slope 1 / (1 - p) is unbounded; see LOG_ODDS_MARGIN.
    """
    safe_P = mean_logp_P.clamp(max=-LOG_ODDS_MARGIN)
    # For log(1 - e^x), log(-expm1(x)) is accurate near 0 and log1p(-e^x) far from it; both branches
    # are finite on all of safe_P, so that torch.where has no NaN gradient.
    near_zero_P = (-torch.expm1(safe_P)).log()
    far_P = torch.log1p(-safe_P.exp())
    return mean_logp_P - torch.where(safe_P > -math.log(2.0), near_zero_P, far_P)


class EXOConfig(PairLossConfig):
    """EXO for pairs."""

    type: str = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    """Assumed share e of flipped labels (TRL's default); the loss is infinite at 0."""


class EXO(PairLoss[EXOConfig]):
    """EXO for pairs (Ji et al. 2024, section 3.2): KL((S(u), S(-u)) || (1 - e, e))."""

    Config = EXOConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        logits_P = self.config.beta * pairs.gap_P
        log_right = math.log1p(-self.config.label_smoothing)
        log_wrong = math.log(self.config.label_smoothing)
        wins_P = logits_P.sigmoid() * (logsigmoid(logits_P) - log_right)
        loses_P = (-logits_P).sigmoid() * (logsigmoid(-logits_P) - log_wrong)
        return wins_P + loses_P


class NCAConfig(PairLossConfig):
    """NCA for pairs."""

    type: str = "nca"
    beta: PositiveFloat = 0.01
    """Strength of the pull toward the reference (the paper's)."""


class NCA(PairLoss[NCAConfig]):
    """NCA for pairs (Chen et al. 2024, section 4.1): -log S(c) - (log S(-c) + log S(-r)) / 2.

    c and r are beta * d of the chosen and the rejected response. The chosen response's part has its
    minimum at c = ln 2, which bounds the growth of its likelihood.
    """

    Config = NCAConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        chosen_P, rejected_P = self.rewards(pairs)
        return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


class APOZeroConfig(PairLossConfig):
    """APO-zero."""

    type: str = "apo_zero"


class APOZero(PairLoss[APOZeroConfig]):
    """APO-zero (D'Oosterlinck et al. 2024, section 4): (1 - S(c)) + S(r), between 0 and 2.

    c and r are beta * d of the chosen and the rejected response: chosen up, rejected down.
    """

    Config = APOZeroConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        chosen_P, rejected_P = self.rewards(pairs)
        return (-chosen_P).sigmoid() + rejected_P.sigmoid()


class APODownConfig(PairLossConfig):
    """APO-down."""

    type: str = "apo_down"


class APODown(PairLoss[APODownConfig]):
    """APO-down (D'Oosterlinck et al. 2024, section 4): S(c) + (1 - S(u)), between 0 and 2.

    c is beta * d of the chosen response: both down, rejected more.
    """

    Config = APODownConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        beta = self.config.beta
        return (beta * pairs.chosen_ratio_P).sigmoid() + (-beta * pairs.gap_P).sigmoid()


class SPPOHardConfig(PairLossConfig):
    """SPPO on pairs; beta is 1 / eta."""

    type: str = "sppo_hard"
    beta: PositiveFloat = 0.001
    """1 / eta; the paper's eta is 1000."""


class SPPOHard(PairLoss[SPPOHardConfig]):
    """SPPO on pairs (Wu et al. 2024, section 3), with win probabilities 1 and 0.

    (beta * d_chosen - 1/2)^2 + (beta * d_rejected + 1/2)^2. With eta = 1 / beta, the paper's
    (d - eta * (P - 1/2))^2 is eta^2 times this: same minimizer, but the gradient is of order beta
    instead of eta, so that it neither needs nor depends on gradient clipping. (The paper's eta is
    1000: beta 0.001.)
    """

    Config = SPPOHardConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        chosen_P, rejected_P = self.rewards(pairs)
        return (chosen_P - 0.5).square() + (rejected_P + 0.5).square()


class DiscoPOPConfig(PairLossConfig):
    """DiscoPOP's log-ratio modulated loss."""

    type: str = "discopop"
    tau: PositiveFloat = 0.05
    """Temperature of the mixture (the paper's value)."""


class DiscoPOP(PairLoss[DiscoPOPConfig]):
    """DiscoPOP (Lu et al. 2024, section 3): (1 - m) * -log S(u) + m * exp(-u), m = S(u / tau).

    exp(-u) alone overflows where m vanishes; their product is exp(log m - u), which goes to 0 there
    for tau < 1. For tau > 1 it is unbounded by definition and continues as a tangent beyond
    exp(MAX_EXPONENT).
    """

    Config = DiscoPOPConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        logits_P = self.config.beta * pairs.gap_P
        scaled_P = logits_P / self.config.tau
        logistic_P = (-scaled_P).sigmoid() * -logsigmoid(logits_P)
        return logistic_P + safe_exp(logsigmoid(scaled_P) - logits_P)
