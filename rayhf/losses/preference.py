"""The preference family: one loss per pair (chosen, rejected), each with its config.

Notation: lp = sum of log-probs over a response, d = lp - lp of the reference, D = d_chosen -
d_rejected, u = beta * D, S = sigmoid. Everything is on sequence SUMS; only simpo, orpo and the NLL
term divide by the response's length. All losses and gradients are finite for log-ratios of +-500;
those that are unbounded by definition grow at most quadratically (ipo, sppo_hard) or linearly (the
others), robust also downwards.

A table in rayhf/config/registry.py gives each class the name under which `algorithm.loss` finds it.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.losses.pairs import PairLogps, PairLoss, PairLossConfig, nll
from rayhf.losses.policy import safe_exp

LOG_ODDS_MARGIN = 1e-6
"""orpo: a mean token log-prob nearer to 0 than this (probability 1) counts as this far away in
log(1 - p)."""


class SigmoidConfig(PairLossConfig):
    """DPO, and cDPO with label_smoothing above 0."""

    type: str = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share e of labels that are taken to be flipped."""


class Sigmoid(PairLoss[SigmoidConfig]):
    """-(1 - e) log S(u) - e log S(-u): DPO (Rafailov et al. 2023, eq. 7) and cDPO.

    cDPO is e > 0 (Mitchell 2023). e may differ between pairs (soft labels, Xie et al. 2024), where
    the config's is 0; at e = 1/2 the loss only pulls u to 0.
    """

    Config = SigmoidConfig
    accepts_soft_labels = True

    def per_pair(self, pairs: PairLogps) -> Tensor:
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


class IPO(PairLoss[IPOConfig]):
    """(D - 1 / (2 beta))^2 on sequence sums: IPO (Azar et al. 2023, eq. 17, beta as tau).

    D is the paper's, not divided by lengths: a beta tuned for a length-normalized IPO does not
    carry over.
    """

    Config = IPOConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        target = 1.0 / (2.0 * self.config.beta)
        return (pairs.gap_P - target).square()


class HingeConfig(PairLossConfig):
    """SLiC on log-ratios; beta is RSO's gamma."""

    type: str = "hinge"


class Hinge(PairLoss[HingeConfig]):
    """max(0, 1 - u): SLiC (Zhao et al. 2023, section 2) on log-ratios, as in RSO (Liu et al. 2023).

    RSO's gamma is beta.
    """

    Config = HingeConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        return (1.0 - self.config.beta * pairs.gap_P).clamp(min=0.0)


class RobustConfig(PairLossConfig):
    """Robust DPO."""

    type: str = "robust"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Rate e of flipped labels."""


class Robust(PairLoss[RobustConfig]):
    """(-(1 - e) log S(u) + e log S(-u)) / (1 - 2e): rDPO (Chowdhury et al. 2024, section 3.1).

    Unbiased under random flips. Unbounded below for e > 0 (slope -e * beta / (1 - 2e)).
    """

    Config = RobustConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        logits_P = self.config.beta * pairs.gap_P
        flip = self.config.label_smoothing
        kept_P = -(1.0 - flip) * logsigmoid(logits_P)
        return (kept_P + flip * logsigmoid(-logits_P)) / (1.0 - 2.0 * flip)


class SimPOConfig(PairLossConfig):
    """SimPO; beta scales mean log-probs."""

    type: str = "simpo"
    gamma: NonNegativeFloat = 1.0
    """Target margin, in nats of beta-scaled mean log-prob."""


class SimPO(PairLoss[SimPOConfig]):
    """-log S(beta * (mean_chosen - mean_rejected) - gamma): SimPO (Meng et al. 2024, eq. 6).

    Reference-free.
    """

    Config = SimPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        gap_P = pairs.chosen_mean_P - pairs.rejected_mean_P
        return -logsigmoid(self.config.beta * gap_P - self.config.gamma)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        beta = self.config.beta
        return beta * pairs.chosen_mean_P, beta * pairs.rejected_mean_P


class CPOConfig(PairLossConfig):
    """CPO with its uniform prior."""

    type: str = "cpo"


class CPO(PairLoss[CPOConfig]):
    """-log S(beta * (lp_c - lp_r)) + NLL(chosen): CPO (Xu et al. 2024, with its uniform prior).

    Reference-free. The NLL is a mean per token, as in the authors' code.
    """

    Config = CPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        return -logsigmoid(self.config.beta * (pairs.chosen_P - pairs.rejected_P)) + nll(pairs)


class ORPOConfig(PairLossConfig):
    """ORPO; beta is the paper's lambda."""

    type: str = "orpo"


class ORPO(PairLoss[ORPOConfig]):
    """NLL(chosen) - beta * log S(log-odds chosen - log-odds rejected): ORPO (Hong et al. 2024).

    Reference-free.
    """

    Config = ORPOConfig
    needs_reference: ClassVar[bool] = False

    def per_pair(self, pairs: PairLogps) -> Tensor:
        odds_P = log_odds(pairs.chosen_mean_P) - log_odds(pairs.rejected_mean_P)
        return nll(pairs) - self.config.beta * logsigmoid(odds_P)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        beta = self.config.beta
        return beta * pairs.chosen_mean_P, beta * pairs.rejected_mean_P


def log_odds(mean_logp_P: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean_logp): (P,).

    Near p = 1 the true slope 1 / (1 - p) is unbounded; see LOG_ODDS_MARGIN.
    """
    safe_P = mean_logp_P.clamp(max=-LOG_ODDS_MARGIN)
    # log(1 - e^x): log(-expm1(x)) keeps digits near 0, log1p(-e^x) far from it; each branch is
    # finite on all of safe_P.
    near_zero_P = (-torch.expm1(safe_P)).log()
    far_P = torch.log1p(-safe_P.exp())
    return mean_logp_P - torch.where(safe_P > -math.log(2.0), near_zero_P, far_P)


class EXOConfig(PairLossConfig):
    """EXO for pairs."""

    type: str = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    """e; the loss is infinite at 0 (TRL uses 0.001)."""


class EXO(PairLoss[EXOConfig]):
    """KL(q || p), q = (S(u), S(-u)), p = (1 - e, e): EXO for pairs (Ji et al. 2024, section 3.2)."""

    Config = EXOConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        logits_P = self.config.beta * pairs.gap_P
        log_right = math.log1p(-self.config.label_smoothing)
        log_wrong = math.log(self.config.label_smoothing)
        wins_P = logits_P.sigmoid() * (logsigmoid(logits_P) - log_right)
        loses_P = (-logits_P).sigmoid() * (logsigmoid(-logits_P) - log_wrong)
        return wins_P + loses_P


class NCAConfig(PairLossConfig):
    """NCA for pairs."""

    type: str = "nca"


class NCA(PairLoss[NCAConfig]):
    """-log S(r_c) - (log S(-r_c) + log S(-r_r)) / 2, r = beta * d: NCA (Chen et al. 2024, sec. 4.1).

    The chosen completion's part is least at r_c = ln 2, so its likelihood does not run away.
    """

    Config = NCAConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        chosen_P, rejected_P = self.rewards(pairs)
        return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


class APOZeroConfig(PairLossConfig):
    """APO-zero."""

    type: str = "apo_zero"


class APOZero(PairLoss[APOZeroConfig]):
    """(1 - S(r_c)) + S(r_r): chosen up, rejected down (D'Oosterlinck et al. 2024, section 4).

    Between 0 and 2.
    """

    Config = APOZeroConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        chosen_P, rejected_P = self.rewards(pairs)
        return (-chosen_P).sigmoid() + rejected_P.sigmoid()


class APODownConfig(PairLossConfig):
    """APO-down."""

    type: str = "apo_down"


class APODown(PairLoss[APODownConfig]):
    """S(r_c) + (1 - S(u)): both down, rejected more (D'Oosterlinck et al. 2024, section 4).

    Between 0 and 2.
    """

    Config = APODownConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        beta = self.config.beta
        return (beta * pairs.chosen_ratio_P).sigmoid() + (-beta * pairs.gap_P).sigmoid()


class SPPOHardConfig(PairLossConfig):
    """SPPO on pairs; beta is 1 / eta."""

    type: str = "sppo_hard"


class SPPOHard(PairLoss[SPPOHardConfig]):
    """(beta * d_chosen - 1/2)^2 + (beta * d_rejected + 1/2)^2: SPPO with win probabilities 1 and 0.

    Wu et al. 2024, section 3. The paper's (d - eta * (P - 1/2))^2 is eta^2 times this with eta = 1
    / beta: same minimizer, gradient of order beta instead of eta, so that it neither needs nor
    depends on gradient clipping. (The paper's eta is 1000: beta 0.001.)
    """

    Config = SPPOHardConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        chosen_P, rejected_P = self.rewards(pairs)
        return (chosen_P - 0.5).square() + (rejected_P + 0.5).square()


class DiscoPOPConfig(PairLossConfig):
    """DiscoPOP's log-ratio modulated loss."""

    type: str = "discopop"
    tau: PositiveFloat = 0.05
    """Temperature of the mixture (the paper's)."""


class DiscoPOP(PairLoss[DiscoPOPConfig]):
    """(1 - m) * -log S(u) + m * exp(-u), m = S(u / tau): DiscoPOP (Lu et al. 2024, section 3).

    exp(-u) alone overflows where m vanishes; their product is exp(log m - u), which goes to 0 there
    for tau < 1. For tau > 1 it is unbounded by definition and continues as a tangent beyond
    exp(MAX_EXPONENT).
    """

    Config = DiscoPOPConfig

    def per_pair(self, pairs: PairLogps) -> Tensor:
        logits_P = self.config.beta * pairs.gap_P
        scaled_P = logits_P / self.config.tau
        logistic_P = (-scaled_P).sigmoid() * -logsigmoid(logits_P)
        return logistic_P + safe_exp(logsigmoid(scaled_P) - logits_P)
