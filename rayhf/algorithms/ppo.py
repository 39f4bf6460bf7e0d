"""PPO for RLHF, with a critic (GAE) or a critic-free estimator (GRPO, RLOO, REINFORCE++) of the
advantage.

One round: n samples per prompt, judged; token rewards are the score at the last token minus the KL
penalty; advantages; the clipped surrogate, and for GAE the value loss of the critic. ALGORITHMS.md
A1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayhf.algorithms.advantages import (
    AdaptiveKL,
    Array,
    gae,
    grpo,
    kl_penalty,
    missing_eos_penalty,
    overlong_penalty,
    reinforce_plus_plus,
    rloo,
    token_rewards,
    whiten,
)
from rayhf.algorithms.base import Selection, SelectionContext, Stateless, sample_and_score, scored
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import InitialReference, PPOConfig, ReferenceSchedule
from rayhf.losses.base import Loss
from rayhf.losses.policy import PolicyLoss
from rayhf.losses.value import ValueLoss
from rayhf.types import Example, Group, Prompt, Row, make_row


class PPO(Stateless):
    def __init__(self, config: PPOConfig, *, max_tokens: int) -> None:
        self.config = config
        self.samples = config.samples
        self.critic = config.advantage == "gae"
        kl = config.kl
        self.reference: ReferenceSchedule | None = InitialReference() if kl.coef > 0 else None
        self._controller = (
            AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.target is not None else None
        )
        self._max_tokens = max_tokens
        self._responses = 0

    @property
    def kl_coef(self) -> float:
        return self._controller.coef if self._controller else self.config.kl.coef

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        return await sample_and_score(prompt, context, self.config.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """One example per scored response; groups too small for their estimator are dropped and
        counted."""
        needed = 2 if self.config.advantage in ("grpo", "rloo") else 1
        examples: list[Example] = []
        small = uniform = 0
        for group in groups:
            usable = [
                (i, self._shape(s.completion.finish_reason, len(s.completion.token_ids), v))
                for i, s, v in scored(group)
            ]
            if len({score for _, score in usable}) == 1 and len(usable) > 1:
                uniform += 1
                if self.config.drop_uniform_groups:
                    continue
            if len(usable) < needed:
                small += 1
                continue
            examples += [Example(rows=(make_row(group, i, score=score),)) for i, score in usable]
        self._responses = len(examples)
        metrics = {
            "ppo/groups_uniform": uniform / max(len(groups), 1),
            "ppo/groups_dropped": float(small),
        }
        return Selection(examples=tuple(examples), metrics=metrics)

    def _shape(self, finish_reason: str, length: int, score: float) -> float:
        config = self.config
        if config.reward_clip is not None:
            score = float(np.clip(score, -config.reward_clip, config.reward_clip))
        score -= missing_eos_penalty(
            truncated=finish_reason == "length", penalty=config.missing_eos_penalty
        )
        return score - overlong_penalty(
            length,
            max_tokens=self._max_tokens,
            buffer=config.overlong_buffer,
            penalty=config.overlong_penalty,
        )

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        rows = [example.rows[0] for example in examples]
        config = self.config
        kl = [self._kl(row) for row in rows]
        in_reward = self.kl_coef if config.kl.where == "reward" else 0.0
        metrics = {"ppo/kl_coef": self.kl_coef} if self.reference else {}
        if config.advantage in ("grpo", "rloo"):
            credited = self._group_credit(rows, kl, in_reward)
        else:
            rewards = [
                token_rewards(k, in_reward, row.scalars["score"])
                for k, row in zip(kl, rows, strict=True)
            ]
            if config.whiten_rewards:
                rewards = whiten(rewards, keep_mean=True)
            credited = (
                self._gae_credit(rows, rewards)
                if self.critic
                else self._reinforce_credit(rows, rewards)
            )
        return [
            replace(example, rows=(row,)) for example, row in zip(examples, credited, strict=True)
        ], metrics

    def _kl(self, row: Row) -> Array:
        """Per-token penalty of the policy that wrote the row (the learner's own log-probs where
        they were recomputed)."""
        logp = row.tokens.get("old_logp", row.tokens["behavior_logp"])
        return kl_penalty(logp, row.tokens.get("ref_logp", logp), self.config.kl.estimator)

    def _group_credit(self, rows: list[Row], kl: list[Array], in_reward: float) -> list[Row]:
        estimate = grpo if self.config.advantage == "grpo" else rloo
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            groups[row.prompt_id].append(index)
        out = list(rows)
        for members in groups.values():
            advantages = estimate(
                [rows[i].scalars["score"] - in_reward * kl[i].sum() for i in members]
            )
            for i, advantage in zip(members, advantages, strict=True):
                out[i] = rows[i].with_tokens(
                    advantage=np.full(len(rows[i].response_ids), advantage, dtype=np.float32)
                )
        return out

    def _gae_credit(self, rows: list[Row], rewards: list[Array]) -> list[Row]:
        pairs = [
            gae(r, row.tokens["value"], self.config.gamma, self.config.lam)
            for r, row in zip(rewards, rows, strict=True)
        ]
        advantages = [advantage for advantage, _ in pairs]
        if self.config.whiten_advantages:
            advantages = whiten(advantages)
        return [
            row.with_tokens(
                **{"advantage": a.astype(np.float32), "return": returns.astype(np.float32)}
            )
            for row, a, (_, returns) in zip(rows, advantages, pairs, strict=True)
        ]

    def _reinforce_credit(self, rows: list[Row], rewards: list[Array]) -> list[Row]:
        advantages = reinforce_plus_plus(rewards, self.config.gamma)
        return [
            row.with_tokens(advantage=a.astype(np.float32))
            for row, a in zip(rows, advantages, strict=True)
        ]

    def loss(self, objective: str = "policy") -> Loss:
        config = self.config
        in_loss = self.reference is not None and config.kl.where == "loss"
        return PolicyLoss(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregate=config.aggregate,
            kl_coef=self.kl_coef,
            kl_estimator=config.kl.estimator if in_loss else None,
            entropy_coef=config.entropy_coef,
            importance_cap=config.importance.cap,
        )

    def critic_loss(self) -> Loss | None:
        return ValueLoss(value_clip=self.config.value_clip) if self.critic else None

    def trains_policy(self, iteration: int) -> bool:
        return iteration > self.config.critic_warmup

    def observe(self, metrics: Mapping[str, float]) -> None:
        if self._controller and "reference/kl" in metrics:
            self._controller.update(metrics["reference/kl"], self._responses)

    def state_dict(self) -> dict[str, Any]:
        return self._controller.state_dict() if self._controller else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._controller:
            self._controller.load_state_dict(state)
