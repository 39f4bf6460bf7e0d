"""Losses that train scorers on preference pairs, from the outputs of the learner's "score" head.

In: output_Td of shape (T, d), one line per row (a row to score has one response token, see
learner.forward.scored_row, so T = R), and a MicroBatch of pairs: rows 2p and 2p + 1 belong to pair
p. What the two rows hold depends on the loss:
  Bradley-Terry, regression   d = 1   (chosen, rejected), each text by itself: its score r
  pairwise                    d = 1   the same two completions in both orders, (chosen first,
                                      rejected first): the log-odds that the first one wins
  general preference          d = 2k  (chosen, rejected), each text by itself: an embedding v
Out: LossOutput, this micro-batch's share of the step's mean, with scorer/accuracy (a tie counts one
half) and scorer/margin (log-odds that the chosen completion wins, as this model predicts them).

P pairs, R = 2P rows, T = R, d outputs, S = sigmoid. Each loss takes its objective's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayhf.config.fit import (
    BradleyTerryConfig,
    BradleyTerryMarginConfig,
    BradleyTerryScaledConfig,
    GeneralPreferenceConfig,
    Objective,
    PairwiseConfig,
    RegressionBradleyTerryConfig,
    RegressionConfig,
)
from rayhf.losses.base import Loss, LossOutput, MicroBatch
from rayhf.losses.pairs import check_pairs


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return -log S(r_w - r_l): (P,).

    Bradley and Terry 1952; as a reward model's loss Ouyang et al. 2022, eq. 1.
    """
    return -logsigmoid(chosen_P - rejected_P)


def bradley_terry_margin(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor) -> Tensor:
    """Return -log S(r_w - r_l - m): (P,).

    Touvron et al. 2023 (Llama 2), eq. 2; their m is 0, 1/3, 2/3 or 1.
    """
    return -logsigmoid(chosen_P - rejected_P - margin_P)


def bradley_terry_scaled(chosen_P: Tensor, rejected_P: Tensor, strength_P: Tensor) -> Tensor:
    """Return -m log S(r_w - r_l): (P,).

    Wang et al. 2024 (HelpSteer2-Preference); their m is 1, 2 or 3.
    """
    return -strength_P * logsigmoid(chosen_P - rejected_P)


def centering(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return (r_w + r_l)^2, elementwise.

    Pairs say nothing about the level of rewards; this keeps it at 0 (Eisenstein et al. 2023).
    """
    return (chosen_P + rejected_P).square()


def general_preference_score(first: Tensor, second: Tensor) -> Tensor:
    """Return s = v_i^T R v_j over the last dimension: (..., d), (..., d) -> (...).

    Zhang et al. 2024 (general preference model), eq. 6. R is block-diagonal and skew-symmetric, its
    2x2 blocks have R[2k, 2k+1] = -1: s_ij = sum over k of v_i[2k+1] v_j[2k] - v_i[2k] v_j[2k+1]. So
    s_ij = -s_ji to the bit, s_ii = 0, and one block already holds a cycle. The arguments broadcast:
    (K, 1, d) and (1, K, d) give every pair of K completions.
    """
    return (first[..., 1::2] * second[..., 0::2] - first[..., 0::2] * second[..., 1::2]).sum(-1)


def scores_of(output_Td: Tensor, micro: MicroBatch) -> Tensor:
    """Return the single output of every row: (R,). Raises ValueError for another head."""
    rows_Rd = _rows(output_Td, micro)
    if rows_Rd.shape[1] != 1:
        raise ValueError(
            f"this loss reads one output per text, the score head has {rows_Rd.shape[1]}"
        )
    return rows_Rd[:, 0]


def _rows(output_Td: Tensor, micro: MicroBatch) -> Tensor:
    check_pairs(micro)
    rows = len(micro.length_R)
    if output_Td.dim() != 2 or len(output_Td) != rows:
        raise ValueError(
            f"a scorer's loss needs output of shape ({rows}, d), a line per text; "
            f"got {tuple(output_Td.shape)}"
        )
    return output_Td


def _field(fields: Mapping[str, Tensor], name: str, of: str) -> Tensor:
    if name not in fields:
        raise ValueError(f"the loss needs the {of} value {name!r}; the batch has {sorted(fields)}")
    return fields[name]


def _output(loss: Tensor, logit_P: Tensor, micro: MicroBatch) -> LossOutput:
    """Return the loss with the metrics of `logit_P`, predicted log-odds that chosen wins."""
    count = max(micro.totals.examples, 1.0)
    logit_P = logit_P.detach()
    right_P = 0.5 * (1.0 + torch.sign(logit_P))
    return LossOutput(
        loss=loss,
        metrics={"scorer/accuracy": right_P.sum() / count, "scorer/margin": logit_P.sum() / count},
    )


class _ScorerLoss:
    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """A score head has no distribution over tokens."""
        return "off"


@dataclass(frozen=True)
class BradleyTerryLoss(_ScorerLoss):
    """Mean over pairs of a Bradley-Terry loss + centering * (r_w + r_l)^2."""

    config: BradleyTerryConfig | BradleyTerryMarginConfig | BradleyTerryScaledConfig

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        score_R = scores_of(output_T, micro)
        chosen_P = score_R[0::2]
        rejected_P = score_R[1::2]
        loss_P = self._loss(chosen_P, rejected_P, micro)
        if self.config.centering:
            loss_P = loss_P + self.config.centering * centering(chosen_P, rejected_P)
        return _output(loss_P.sum() / max(micro.totals.examples, 1.0), chosen_P - rejected_P, micro)

    def _loss(self, chosen_P: Tensor, rejected_P: Tensor, micro: MicroBatch) -> Tensor:
        match self.config:
            case BradleyTerryConfig():
                return bradley_terry(chosen_P, rejected_P)
            case BradleyTerryMarginConfig():
                margin_P = _field(micro.examples, "margin", "example")
                return bradley_terry_margin(chosen_P, rejected_P, margin_P)
            case BradleyTerryScaledConfig():
                margin_P = _field(micro.examples, "margin", "example")
                return bradley_terry_scaled(chosen_P, rejected_P, margin_P)


@dataclass(frozen=True)
class RegressionLoss(_ScorerLoss):
    """mix * mean over rows of (r - rating)^2 + (1 - mix) * mean over pairs of Bradley-Terry.

    Reads the row value `rating`. mix 1 is plain regression (Wang et al. 2024, HelpSteer2).
    """

    config: RegressionConfig | RegressionBradleyTerryConfig

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        mix = self.config.mix
        score_R = scores_of(output_T, micro)
        chosen_P = score_R[0::2]
        rejected_P = score_R[1::2]
        error_R = score_R - _field(micro.rows, "rating", "row")
        loss = mix * error_R.square().sum() / max(micro.totals.rows, 1.0)
        if mix < 1.0:
            pairs_P = bradley_terry(chosen_P, rejected_P)
            loss = loss + (1.0 - mix) * pairs_P.sum() / max(micro.totals.examples, 1.0)
        return _output(loss, chosen_P - rejected_P, micro)


@dataclass(frozen=True)
class PairwiseLoss(_ScorerLoss):
    """Cross-entropy of "the first one wins", mean over rows: both orders of every pair are trained.

    Row 2p has the chosen completion first (label 1), row 2p + 1 the rejected one (label 0). Jiang
    et al. 2023, PairRM.
    """

    config: PairwiseConfig

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        logit_R = scores_of(output_T, micro)
        chosen_first_P = logit_R[0::2]
        rejected_first_P = logit_R[1::2]
        loss = -(logsigmoid(chosen_first_P).sum() + logsigmoid(-rejected_first_P).sum()) / max(
            micro.totals.rows, 1.0
        )
        # What is served is the mean of S(l_1) and 1 - S(l_2): above 1/2 exactly where l_1 > l_2.
        return _output(loss, 0.5 * (chosen_first_P - rejected_first_P), micro)


@dataclass(frozen=True)
class GeneralPreferenceLoss(_ScorerLoss):
    """Mean over pairs of -log S(s_wl / temperature) + centering * |v_w + v_l|^2.

    The first term is Zhang et al. 2024, embeddings as they come, as in the authors' code. The
    second is ours: models begin with nearly the same embedding for every completion, v_i = v + e_i,
    and then s_ij is about v^T R (e_j - e_i), one score per completion. On a cycle that is only
    noise, and the loss falls by making all completions equal, where no gradient is left. Centering
    removes v instead; without it a fit may stay at accuracy 1/2.
    """

    config: GeneralPreferenceConfig

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        rows_Rd = _rows(output_T, micro)
        if rows_Rd.shape[1] % 2:
            raise ValueError(
                "a general preference model has an even number of outputs, "
                f"the score head has {rows_Rd.shape[1]}"
            )
        chosen_Pd = rows_Rd[0::2]
        rejected_Pd = rows_Rd[1::2]
        logit_P = general_preference_score(chosen_Pd, rejected_Pd) / self.config.temperature
        loss_P = -logsigmoid(logit_P)
        if self.config.centering:
            loss_P = loss_P + self.config.centering * centering(chosen_Pd, rejected_Pd).sum(-1)
        return _output(loss_P.sum() / max(micro.totals.examples, 1.0), logit_P, micro)


def reward_loss(objective: Objective) -> Loss:
    """Return the loss of an objective."""
    match objective:
        case BradleyTerryConfig() | BradleyTerryMarginConfig() | BradleyTerryScaledConfig():
            return BradleyTerryLoss(objective)
        case RegressionConfig() | RegressionBradleyTerryConfig():
            return RegressionLoss(objective)
        case PairwiseConfig():
            return PairwiseLoss(objective)
        case GeneralPreferenceConfig():
            return GeneralPreferenceLoss(objective)
