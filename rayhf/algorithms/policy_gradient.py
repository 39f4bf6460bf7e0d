"""Base of the policy-gradient family: PPO, GRPO and its variants, RLOO, REINFORCE++.

One iteration: n scored samples per prompt; token rewards, which are the score at the last token
minus the KL penalty; advantages, in which the subclasses differ; a policy-gradient loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from rayhf.algorithms.advantages import (
    Array,
    kl_penalty,
    missing_eos_penalty,
    overlong_penalty,
    row_sums,
    token_rewards,
)
from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_score,
    scored,
)
from rayhf.algorithms.coefficients import AdaptiveEntropy, AdaptiveKL
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.policy_gradient_config import PolicyGradientConfig
from rayhf.config.algorithms import InitialReference, ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.losses.base import Loss
from rayhf.losses.kl import KLTerm
from rayhf.types import (
    Completion,
    Example,
    FloatArray,
    Group,
    JsonObject,
    Prompt,
    Row,
    Sampling,
    make_row,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTokens:
    """All rows of an iteration: values per token are end to end, N in all."""

    prompt_ids: Sequence[str]
    """Prompt of each row; the rows of one prompt are a group."""
    lengths: npt.NDArray[np.int64]
    """Number of tokens of each row: (R,)."""
    scores: Array
    """(R,)."""
    kl: Array
    """KL penalty per token, in nats: (N,)."""
    value: FloatArray | None
    """The critic's value per token, where there is a critic: (N,)."""
    turn_rewards: Array
    """Of episodes, each turn's reward on its last token, part of the scores: (N,)."""

    def rewards(self, kl_coef: float) -> Array:
        """Return the reward of every token: its turn's, the KL penalty's share, the score's rest.

        The rest is what the score has besides the turns' rewards (other scorers, shaping); it is on
        the last token.
        """
        rest = self.scores - row_sums(self.turn_rewards, self.lengths)
        return token_rewards(self.kl, kl_coef, rest, self.lengths) + self.turn_rewards


class PolicyGradient(AlgorithmBase, ABC):
    """Base class; subclasses turn scores and KL penalties into advantages."""

    min_group: ClassVar[int] = 1
    """Smallest number of scored completions in a prompt's group."""
    has_group_baseline: ClassVar[bool] = False
    """Whether advantages are scores minus a baseline of the group: reward_clip then bounds the
    advantage, because clipping scores would make different ones equal."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.refill_budget = config.refill.budget
        kl = config.kl
        self.reference: ReferenceSchedule | None = InitialReference() if kl.coef > 0 else None
        self._adaptive_kl = (
            AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.target is not None else None
        )
        entropy = config.entropy
        self._adaptive_entropy = (
            AdaptiveEntropy(target=entropy.target, step=entropy.step, largest=entropy.largest)
            if entropy
            else None
        )
        self._completions = 0
        """Of the iteration that was credited last."""
        self._max_tokens: int | None = None
        """Longest completion, once it is known."""

    @property
    def kl_coef(self) -> float:
        """Current coefficient of the KL penalty."""
        return self._adaptive_kl.coef if self._adaptive_kl else self.config.kl.coef

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and score them."""
        return await sample_and_score(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make one example per scored completion; groups that are too small are dropped."""
        self._max_tokens = context.sampling.max_tokens
        examples: list[Example] = []
        small = 0
        uniform = 0
        clipped = 0
        for group in groups:
            scores = self._scores(group)
            clipped += sum(score != scores[i] for i, _, score in scored(group))
            if _is_uniform(scores):
                uniform += 1
                if self.config.drops_uniform:
                    continue
            if len(scores) < self.min_group:
                small += 1
                continue
            for i, score in scores.items():
                shaped = self._shape_score(group.samples[i].completion, score, context.sampling)
                examples.append(Example(rows=(make_row(group, i, score=shaped),)))
        uniform_share = uniform / max(len(groups), 1)
        metrics = {"ppo/groups_uniform": uniform_share, "ppo/groups_dropped": float(small)}
        if examples and not self.has_group_baseline:
            metrics["ppo/reward_clipped"] = clipped / len(examples)
        return Selection(
            examples=tuple(examples),
            metrics=metrics,
            no_signal=uniform_share,
        )

    def has_signal(self, group: Group) -> bool:
        """Whether a group is trained on where uniform ones are dropped.

        Scores decide before penalties on length, as in DAPO (eq. 11): completions that are all
        wrong do not become a lesson in length.
        """
        scores = self._scores(group)
        return len(scores) >= self.min_group and not _is_uniform(scores)

    def _scores(self, group: Group) -> dict[int, float]:
        """Return the bounded score of every scored completion, by its index."""
        return {i: self._clip_score(score) for i, _, score in scored(group)}

    def _clip_score(self, score: float) -> float:
        """Bound a score that no group baseline is subtracted from."""
        limit = self.config.reward_clip
        if limit is None or self.has_group_baseline:
            return score
        return min(max(score, -limit), limit)

    def _shape_score(self, completion: Completion, score: float, sampling: Sampling) -> float:
        """Subtract the penalties on truncation and length from a score."""
        config = self.config
        max_tokens = sampling.max_tokens
        score -= missing_eos_penalty(
            truncated=completion.finish_reason == "length", penalty=config.missing_eos_penalty
        )
        buffer = max_tokens // 5 if config.overlong_buffer is None else config.overlong_buffer
        return score - overlong_penalty(
            len(completion.token_ids),
            max_tokens=max_tokens,
            buffer=buffer,
            penalty=config.overlong_penalty,
        )

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Give every token its advantage."""
        self._completions = len(examples)
        metrics = {"ppo/kl_coef": self.kl_coef} if self.reference else {}
        if self._adaptive_entropy:
            metrics["ppo/entropy_coef"] = self._adaptive_entropy.applied
        if not examples:
            return [], metrics
        rows = [example.rows[0] for example in examples]
        in_reward = self.kl_coef if self.config.kl.where == "reward" else 0.0
        tokens = self._tokens(rows)
        credit = self.advantages(tokens, in_reward)
        limit = self.config.reward_clip
        if limit is not None and self.has_group_baseline:
            bounded = np.clip(credit["advantage"], -limit, limit)
            changed = row_sums(bounded != credit["advantage"], tokens.lengths) > 0
            metrics["ppo/reward_clipped"] = float(changed.mean())
            credit = {**credit, "advantage": bounded}
        credited = [
            replace(example, rows=(row,))
            for example, row in zip(examples, with_token_values(rows, credit), strict=True)
        ]
        if self.config.drop_truncated:
            kept = [e for e in credited if not e.rows[0].scalars["truncated"]]
            metrics["ppo/truncated_dropped"] = float(len(credited) - len(kept))
            credited = kept
        return credited, metrics

    @abstractmethod
    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`, and further values per token, by name: (N,).

        Args:
            tokens: the rows of the iteration.
            kl_coef: weight of the KL penalty in the reward; 0 where it is in the loss.
        """

    def _tokens(self, rows: Sequence[Row]) -> IterationTokens:
        """Return the rows' tokens, with the learner's own log-probs where it computed them."""
        logp = np.concatenate([r.tokens.get("old_logp", r.tokens["behavior_logp"]) for r in rows])
        frozen = logp
        if "ref_logp" in rows[0].tokens:
            frozen = np.concatenate([row.tokens["ref_logp"] for row in rows])
        value = None
        if "value" in rows[0].tokens:
            value = np.concatenate([row.tokens["value"] for row in rows])
        return IterationTokens(
            prompt_ids=[row.prompt_id for row in rows],
            lengths=np.array([len(row.response_ids) for row in rows]),
            scores=np.array([row.scalars["score"] for row in rows]),
            kl=kl_penalty(logp, frozen, self.config.kl.estimator),
            value=value,
            turn_rewards=np.concatenate(
                [
                    row.tokens.get("turn_reward", np.zeros(len(row.response_ids), np.float32))
                    for row in rows
                ]
            ).astype(np.float64),
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the configured loss, with the KL term where it is in the loss."""
        kl = self.config.kl
        term = None
        if self.reference is not None and kl.where == "loss":
            term = KLTerm(coef=self.kl_coef, estimator=kl.estimator, unbiased=kl.unbiased)
        adaptive = self._adaptive_entropy
        loss: Loss = LOSSES.build(
            self.config.loss,
            importance=self.config.importance,
            kl=term,
            entropy_coef=adaptive.applied if adaptive else None,
            max_tokens=self._max_tokens,
        )
        return loss

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Adapt the coefficients to the iteration's KL and entropy."""
        if self._adaptive_kl and "reference/kl" in metrics:
            self._adaptive_kl.update(metrics["reference/kl"], self._completions)
        if self._adaptive_entropy and "policy/entropy" in metrics:
            self._adaptive_entropy.update(metrics["policy/entropy"])

    def state_dict(self) -> JsonObject:
        """Return the adaptive coefficients."""
        state: dict[str, JsonValue] = {}
        if self._adaptive_kl:
            state["kl"] = dict(self._adaptive_kl.state_dict())
        if self._adaptive_entropy:
            state["entropy"] = dict(self._adaptive_entropy.state_dict())
        return state

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore what `state_dict` returned."""
        kl = state.get("kl")
        entropy = state.get("entropy")
        if self._adaptive_kl and isinstance(kl, dict):
            self._adaptive_kl.load_state_dict(kl)
        if self._adaptive_entropy and isinstance(entropy, dict):
            self._adaptive_entropy.load_state_dict(entropy)


def _is_uniform(scores: Mapping[int, float]) -> bool:
    """Whether several completions all have one score."""
    return len(scores) > 1 and len(set(scores.values())) == 1


def with_token_values(rows: Sequence[Row], values: Mapping[str, Array]) -> list[Row]:
    """Return the rows with further token values, given for all rows end to end: (N,)."""
    short = {name: array.astype(np.float32) for name, array in values.items()}
    out = []
    start = 0
    for row in rows:
        end = start + len(row.response_ids)
        out.append(row.with_tokens(**{name: array[start:end] for name, array in short.items()}))
        start = end
    return out


def group_advantages(
    tokens: IterationTokens, kl_coef: float, estimate: Callable[[Array], Array]
) -> Array:
    """Return the advantage that `estimate` computes within each prompt's group: (N,).

    The score of a row is its own score minus the summed penalty. `estimate` takes the scores of
    groups of one size, (G, K), and returns as many advantages.
    """
    scores = tokens.scores - kl_coef * row_sums(tokens.kl, tokens.lengths)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt_id in enumerate(tokens.prompt_ids):
        groups[prompt_id].append(index)
    by_size: defaultdict[int, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_size[len(members)].append(members)
    out = np.empty_like(scores)
    for same_size in by_size.values():
        index_GK = np.array(same_size)
        out[index_GK] = estimate(scores[index_GK])
    return np.repeat(out, tokens.lengths)
