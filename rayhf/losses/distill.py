"""Distillation: a policy-gradient loss plus the reverse KL to a teacher at each position.

In: a MicroBatch whose rows carry the teacher's K likeliest tokens (reference_top_TK, and top_TK
under the policy), and otherwise what the policy-gradient loss reads. Out: this micro-batch's share.

With p the policy, q the teacher and S the teacher's K likeliest tokens of a position,

    KL = sum over S of p log(p / q) + p(rest) log(p(rest) / q(rest))

The rest of the vocabulary is one more token. Without it p could move away from S at no cost, and
with both renormalized over S the loss would not see how much of p is in S. Joining tokens only
makes a KL smaller, so it is at most that of the whole vocabulary, and equal for K = V. It is what
Huebotter et al. 2026 (SDPO, with the student's likeliest tokens) call top-K distillation with a
tail; on the teacher's tokens, renormalized, it is in 2603.25562.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch
from rayhf.losses.policy import PolicyLoss, aggregate

SMALLEST_REST = 1e-6
"""Probability that the rest has at least: 1 minus a sum in float32 is not known better."""


def top_reverse_kl(logp_TK: Tensor, ref_logp_TK: Tensor) -> Tensor:
    """Return KL(policy || teacher) at each position over K tokens and the rest, in nats: (T,).

    Its gradient is exact, for the prefix held fixed: nothing of it depends on the sampled token.
    """
    p_TK = logp_TK.exp()
    rest_T = (1.0 - p_TK.sum(1)).clamp(min=SMALLEST_REST)
    ref_rest_T = (1.0 - ref_logp_TK.exp().sum(1)).clamp(min=SMALLEST_REST)
    return (p_TK * (logp_TK - ref_logp_TK)).sum(1) + rest_T * (rest_T.log() - ref_rest_T.log())


@dataclass(frozen=True)
class DistillLoss:
    """A policy-gradient loss, of the reward, plus the KL to the teacher; picklable.

    The KL has no importance weights: those are of the sampled token, and the KL does not depend on
    it.
    """

    policy: PolicyLoss
    coef: float

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return self.policy.entropy

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        logp_TK = micro.top_TK
        ref_logp_TK = micro.reference_top_TK
        if logp_TK is None or ref_logp_TK is None:
            raise ValueError("the loss needs the teacher's likeliest tokens; the rows have none")
        output = self.policy(output_T, micro)
        kl_T = top_reverse_kl(logp_TK, ref_logp_TK)
        kl = self.policy.aggregate(kl_T, micro)
        loss = output.loss + self.coef * kl
        masses_T = {
            "distill/policy_mass": logp_TK.detach().exp().sum(1),
            "distill/teacher_mass": ref_logp_TK.exp().sum(1),
        }
        metrics = dict(output.metrics) | {
            "learner/loss": loss.detach(),
            "ppo/kl_loss": kl.detach(),
            "distill/kl": aggregate(kl_T.detach(), micro, "sequence_sum"),
        }
        metrics |= {name: aggregate(m, micro, "token_mean") for name, m in masses_T.items()}
        return LossOutput(loss=loss, metrics=metrics)
