"""The preference family: one loss per pair (chosen, rejected), from sequence log-probs of policy
and reference.

In: log-probs of the response tokens with gradient, and a MicroBatch of pairs (rows 2p and 2p + 1
are the chosen and the rejected answer of pair p) whose tokens carry behavior_logp (always),
ref_logp (unless the loss is in REFERENCE_FREE) and old_logp (optional, as in policy.py); whose
examples may carry label_smoothing (soft labels, sigmoid only). Out: LossOutput, this micro-batch's
share of the mean over the step's pairs.

Notation: lp = sum of log-probs over a response, d = lp - lp of the reference, u = beta * (d_chosen
- d_rejected), S = sigmoid. Everything is on sequence SUMS; only simpo, orpo and the NLL term divide
by the response's length. P pairs, T response tokens, R = 2P rows. An empty response has lp 0 and
counts as one token long where a mean is taken. All losses and gradients are finite for log-ratios
of +-500; those that are unbounded by definition grow at most quadratically (ipo, sppo_hard) or
linearly (the others), robust also downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.errors import ConfigError
from rayhf.losses.base import LossOutput, MicroBatch, sum_rows
from rayhf.losses.policy import MAX_EXPONENT, check_cap, known, need, policy_metrics, safe_exp

LOG_ODDS_MARGIN = 1e-6
"""orpo: a mean token log-prob nearer to 0 than this (probability 1) counts as this far away in
log(1 - p)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Sequence sums in nats and lengths in tokens, all of shape (P,). A reference-free loss never
    reads ref_*."""

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor

    @property
    def chosen_ratio_P(self) -> Tensor:
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        return self.rejected_P - self.ref_rejected_P

    @property
    def gap_P(self) -> Tensor:
        """D = d_chosen - d_rejected."""
        return self.chosen_ratio_P - self.rejected_ratio_P

    @property
    def chosen_mean_P(self) -> Tensor:
        """Mean token log-prob."""
        return self.chosen_P / self.chosen_length_P.clamp(min=1.0)

    @property
    def rejected_mean_P(self) -> Tensor:
        return self.rejected_P / self.rejected_length_P.clamp(min=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParams:
    """Numbers of the family; each loss says which it reads."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    discopop_tau: float = 0.05
    label_smoothing_P: Tensor | None = None
    """One smoothing per pair instead of `label_smoothing`, 0 to 1/2: (P,). Only sigmoid reads
    it."""


PairLoss = Callable[[PairLogps, LossParams], Tensor]


def nll(pairs: PairLogps) -> Tensor:
    """Negative log-likelihood of the chosen answer, mean per token: (P,). Pang et al. 2024
    (iterative reasoning PO)."""
    return -pairs.chosen_mean_P


def sigmoid(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """-(1 - e) log S(u) - e log S(-u): DPO (Rafailov et al. 2023, eq. 7) and, with e > 0, cDPO
    (Mitchell 2023).

    e may differ between pairs (soft labels, Xie et al. 2024); at e = 1/2 the loss only pulls u to
    0.
    """
    logits_P = knobs.beta * pairs.gap_P
    smoothing = (
        knobs.label_smoothing if knobs.label_smoothing_P is None else knobs.label_smoothing_P
    )
    return -(1.0 - smoothing) * logsigmoid(logits_P) - smoothing * logsigmoid(-logits_P)


def robust(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """(-(1 - e) log S(u) + e log S(-u)) / (1 - 2e), e < 0.5 the rate of flipped labels: rDPO
    (Chowdhury et al. 2024, section 3.1).

    Unbiased under random flips. Unbounded below for e > 0 (slope -e * beta / (1 - 2e)).
    """
    logits_P = knobs.beta * pairs.gap_P
    flip = knobs.label_smoothing
    return (-(1.0 - flip) * logsigmoid(logits_P) + flip * logsigmoid(-logits_P)) / (
        1.0 - 2.0 * flip
    )


def hinge(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """max(0, 1 - u): SLiC (Zhao et al. 2023, section 2) on log-ratios, as in RSO (Liu et al. 2023;
    beta is their gamma).
    """
    return (1.0 - knobs.beta * pairs.gap_P).clamp(min=0.0)


def ipo(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """(D - 1 / (2 beta))^2 on sequence sums (Azar et al. 2023, eq. 17, beta as tau).

    One convention: D is the paper's, not divided by lengths. A beta tuned for a length-normalized
    IPO does not carry over.
    """
    target = 1.0 / (2.0 * knobs.beta)
    return (pairs.gap_P - target).square()


def exo(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """KL(q || p), q = (S(u), S(-u)), p = (1 - e, e): EXO for pairs (Ji et al. 2024, section 3.2). e
    > 0, or it is infinite.
    """
    logits_P = knobs.beta * pairs.gap_P
    log_right, log_wrong = math.log1p(-knobs.label_smoothing), math.log(knobs.label_smoothing)
    wins_P = logits_P.sigmoid() * (logsigmoid(logits_P) - log_right)
    loses_P = (-logits_P).sigmoid() * (logsigmoid(-logits_P) - log_wrong)
    return wins_P + loses_P


def nca(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """-log S(r_c) - (log S(-r_c) + log S(-r_r)) / 2, r = beta * d: NCA for pairs (Chen et al. 2024,
    section 4.1).

    The chosen answer's part is least at r_c = ln 2, so its likelihood does not run away.
    """
    chosen_P = knobs.beta * pairs.chosen_ratio_P
    rejected_P = knobs.beta * pairs.rejected_ratio_P
    return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


def apo_zero(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """(1 - S(r_c)) + S(r_r): chosen up, rejected down (D'Oosterlinck et al. 2024, section 4).
    Between 0 and 2."""
    return (-knobs.beta * pairs.chosen_ratio_P).sigmoid() + (
        knobs.beta * pairs.rejected_ratio_P
    ).sigmoid()


def apo_down(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """S(r_c) + (1 - S(u)): both down, rejected more (D'Oosterlinck et al. 2024, section 4). Between
    0 and 2."""
    return (knobs.beta * pairs.chosen_ratio_P).sigmoid() + (-knobs.beta * pairs.gap_P).sigmoid()


def sppo_hard(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """(beta * d_chosen - 1/2)^2 + (beta * d_rejected + 1/2)^2: SPPO with win probabilities 1 and 0
    (Wu et al. 2024, section 3).

    The paper's (d - eta * (P - 1/2))^2 is eta^2 times this with eta = 1 / beta: same minimiser,
    gradient of order beta instead of eta, so that it neither needs nor depends on gradient
    clipping. (The paper's eta is 1000: beta 0.001.)
    """
    return (knobs.beta * pairs.chosen_ratio_P - 0.5).square() + (
        knobs.beta * pairs.rejected_ratio_P + 0.5
    ).square()


def discopop(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """(1 - m) * -log S(u) + m * exp(-u), m = S(u / tau): log-ratio modulated loss (Lu et al. 2024,
    section 3).

    exp(-u) alone overflows where m vanishes; their product is exp(log m - u), which goes to 0 there
    for tau < 1. For tau > 1 it is unbounded by definition and continues as a tangent beyond
    exp(MAX_EXPONENT).
    """
    logits_P = knobs.beta * pairs.gap_P
    scaled_P = logits_P / knobs.discopop_tau
    return (-scaled_P).sigmoid() * -logsigmoid(logits_P) + safe_exp(logsigmoid(scaled_P) - logits_P)


def simpo(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """-log S(beta * (mean_chosen - mean_rejected) - gamma), no reference (Meng et al. 2024, eq.
    6)."""
    return -logsigmoid(
        knobs.beta * (pairs.chosen_mean_P - pairs.rejected_mean_P) - knobs.simpo_gamma
    )


def cpo(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """-log S(beta * (lp_c - lp_r)) + NLL(chosen), no reference (Xu et al. 2024, with its uniform
    prior).

    The NLL is a mean per token, as in the authors' code.
    """
    return -logsigmoid(knobs.beta * (pairs.chosen_P - pairs.rejected_P)) + nll(pairs)


def log_odds(mean_logp_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logp): (P,). Near p = 1 the true slope 1 / (1 - p) is
    unbounded; see LOG_ODDS_MARGIN.
    """
    safe_P = mean_logp_P.clamp(max=-LOG_ODDS_MARGIN)
    # log(1 - e^x): log(-expm1(x)) keeps digits near 0, log1p(-e^x) far from it; each branch is
    # finite on all of safe_P.
    near_zero_P = (-torch.expm1(safe_P)).log()
    far_P = torch.log1p(-safe_P.exp())
    return mean_logp_P - torch.where(safe_P > -math.log(2.0), near_zero_P, far_P)


def orpo(pairs: PairLogps, knobs: LossParams) -> Tensor:
    """NLL(chosen) - beta * log S(log-odds chosen - log-odds rejected), no reference (Hong et al.
    2024, beta as their lambda).
    """
    return nll(pairs) - knobs.beta * logsigmoid(
        log_odds(pairs.chosen_mean_P) - log_odds(pairs.rejected_mean_P)
    )


PREFERENCE_LOSSES: Mapping[str, PairLoss] = MappingProxyType(
    {
        "sigmoid": sigmoid,
        "ipo": ipo,
        "hinge": hinge,
        "robust": robust,
        "simpo": simpo,
        "cpo": cpo,
        "orpo": orpo,
        "exo": exo,
        "nca": nca,
        "apo_zero": apo_zero,
        "apo_down": apo_down,
        "sppo_hard": sppo_hard,
        "discopop": discopop,
    }
)
REFERENCE_FREE: frozenset[str] = frozenset({"simpo", "cpo", "orpo"})
SMOOTHED: frozenset[str] = frozenset({"sigmoid", "robust", "exo"})
"""The losses that read label_smoothing; elsewhere a value above 0 is refused, never ignored."""
PER_PAIR_SMOOTHED: frozenset[str] = frozenset({"sigmoid"})
"""The losses that take a label_smoothing per example; 1/2 is infinite in robust, 0 in exo."""


def check_pairs(micro: MicroBatch) -> None:
    """ValueError unless the rows are neighbors of one example, two by two."""
    example_R = micro.example_R
    if example_R.numel() % 2 or not torch.equal(example_R[0::2], example_R[1::2]):
        raise ValueError(
            f"a preference loss needs (chosen, rejected) rows two by two; examples of the rows: {example_R.tolist()}"
        )


def pair_logps(logp_T: Tensor, ref_logp_T: Tensor | None, micro: MicroBatch) -> PairLogps:
    """Sequence sums of a micro-batch of pairs. Without a reference, ref_* are zero."""
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
    )


class PairImportance(NamedTuple):
    """Weights without gradient, and which of them were truncated (1.0 or 0.0)."""

    weight_P: Tensor
    capped_P: Tensor


def pair_importance_weight(
    logp_T: Tensor, behaviour_logp_T: Tensor, micro: MicroBatch, cap: float | None
) -> PairImportance:
    """min(cap, exp(mean over the pair's tokens of logp - behavior_logp)): (P,), exactly 1
    on-policy.

    A pair was written with probability mu(chosen) * mu(rejected), so its exact weight is the
    exponential of the SUMMED log-ratio of both rows, whose variance grows exponentially with
    length: after truncation it is the cap or nothing. The mean per token (the geometric mean ratio,
    as in GSPO, Zheng et al. 2025) is monotone in the exact weight, keeps its on-policy value, and
    has a scale that does not depend on length. Biased, low variance; `cap` None is off. Tokens of
    unknown behavior (NaN: given answers) count as on-policy.
    """
    check_cap(cap)
    check_pairs(micro)
    gap_R = sum_rows((logp_T - known(behaviour_logp_T, logp_T)).detach(), micro)
    if cap is None:
        return PairImportance(torch.ones_like(gap_R[0::2]), torch.zeros_like(gap_R[0::2]))
    length_P = (micro.length_R[0::2] + micro.length_R[1::2]).clamp(min=1.0)
    ratio_P = ((gap_R[0::2] + gap_R[1::2]) / length_P).clamp(max=MAX_EXPONENT).exp()
    return PairImportance(ratio_P.clamp(max=cap), (ratio_P > cap).to(ratio_P.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """Mean over pairs of weight * (loss + nll_coef * NLL(chosen)). Plain numbers and strings:
    picklable."""

    loss: str = "sigmoid"
    """A key of PREFERENCE_LOSSES."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    nll_coef: float = 0.0
    """On top of the NLL that cpo and orpo contain with weight 1."""
    discopop_tau: float = 0.05
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        check_cap(self.importance_cap)
        if self.loss not in PREFERENCE_LOSSES:
            raise ConfigError(
                f"loss: {self.loss!r} is not one of {', '.join(sorted(PREFERENCE_LOSSES))}; try sigmoid"
            )
        if not self.beta > 0.0:
            raise ConfigError(f"beta: {self.beta} must be above 0; try 0.1")
        if not self.discopop_tau > 0.0:
            raise ConfigError(f"discopop_tau: {self.discopop_tau} must be above 0; try 0.05")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing: {self.label_smoothing} must be at least 0 and below 0.5; try 0.1"
            )
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ConfigError(
                f"label_smoothing: {self.loss} does not use it; set 0, or use {', '.join(sorted(SMOOTHED))}"
            )
        if self.loss == "exo" and not self.label_smoothing:
            raise ConfigError("label_smoothing: exo is infinite at 0; try 0.001")

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        return "metric"

    @property
    def needs_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        ref_T = need(micro, "ref_logp") if self.needs_reference else None
        pairs = pair_logps(output_T, ref_T, micro)
        old_T = micro.tokens["old_logp"] if "old_logp" in micro.tokens else output_T.detach()
        weight_P, capped_P = pair_importance_weight(
            old_T, need(micro, "behavior_logp"), micro, self.importance_cap
        )
        knobs = LossParams(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.simpo_gamma,
            discopop_tau=self.discopop_tau,
            label_smoothing_P=self._smoothing(micro),
        )
        loss_P = PREFERENCE_LOSSES[self.loss](pairs, knobs)
        if self.nll_coef:
            loss_P = loss_P + self.nll_coef * nll(pairs)
        count = max(micro.totals.examples, 1.0)
        loss = (weight_P * loss_P).sum() / count
        means_P = self._rewards(pairs) | {
            "dpo/importance_mean": weight_P,
            "dpo/importance_capped": capped_P,
        }
        metrics = policy_metrics(output_T, micro) | {
            name: x_P.detach().sum() / count for name, x_P in means_P.items()
        }
        metrics["learner/loss"] = loss.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def _smoothing(self, micro: MicroBatch) -> Tensor | None:
        """The examples' own label_smoothing, (E,) = (P,), where they have one. ValueError where
        this loss cannot use it."""
        smoothing_P = micro.examples.get("label_smoothing")
        if smoothing_P is None:
            return None
        if self.loss not in PER_PAIR_SMOOTHED or self.label_smoothing:
            raise ValueError(
                f"the examples carry a label_smoothing each, but the loss is {self.loss} with label_smoothing "
                f"{self.label_smoothing:g}; expected {', '.join(sorted(PER_PAIR_SMOOTHED))} with 0"
            )
        if not bool(
            ((smoothing_P >= 0.0) & (smoothing_P <= 0.5)).all()
        ):  # NaN (an example without one) fails, too
            raise ValueError(
                f"label_smoothing per example must be from 0 to 0.5, got {smoothing_P.tolist()}"
            )
        return smoothing_P

    def _rewards(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Implicit rewards beta * d (reference-free: beta * lp; simpo and orpo: beta * mean lp),
        their margin and its sign.
        """
        if self.loss in ("simpo", "orpo"):
            chosen_P, rejected_P = (
                self.beta * pairs.chosen_mean_P,
                self.beta * pairs.rejected_mean_P,
            )
        else:
            chosen_P, rejected_P = (
                self.beta * pairs.chosen_ratio_P,
                self.beta * pairs.rejected_ratio_P,
            )
        return {
            "dpo/chosen_reward": chosen_P,
            "dpo/rejected_reward": rejected_P,
            "dpo/margin": chosen_P - rejected_P,
            "dpo/accuracy": (chosen_P > rejected_P).to(chosen_P.dtype),
            "dpo/chosen_logp": pairs.chosen_P,
            "dpo/rejected_logp": pairs.rejected_P,
        }
