"""Nash-MD: policy gradient on win rates against a mixture of the policy and the initial policy.

Munos et al. 2023 (2312.00886), the deep variant Nash-MD-PG. The gradient is that of

    E[(P(y beats y') - 1/2 - tau * log(p(y) / p_ref(y))) * log p(y)]

with y from the policy p, and y' from the geometric mixture q ~ p^(1 - mixture) * p_ref^mixture.
With mixture 0 its fixed point is the Nash policy of the game with a KL penalty tau. The mixture
damps the circling of self-play; in the paper's tabular algorithm it is tau times the step size, and
the last policy converges. A larger one also moves the fixed point toward p_ref.

What differs from the paper:
- No engine samples the mixture: a prompt's other completions are the opponents, with weights
  q / (what sampled them), normalized to 1. This is exact with many samples; with few, its bias is
  toward the policy itself. It also averages over opponents, where the paper draws one.
- The mixture is of whole completions, as in the paper's theory; its experiments (and TRL) mix and
  normalize token by token.
- A completion's KL has the other completions' mean as baseline, which leaves the gradient's mean as
  it is. It is that of whole completions: TRL gives each token its own log-ratio only.
- p_ref is the initial policy, and a step may have PPO's bounds (learner.epochs above 1).

Metrics to watch: nash_md/opponents (near 1: one opponent has all the weight, as with long
completions far from the reference; a smaller `mixture` helps) and reference/kl.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, model_validator

from rayhf.algorithms.advantages import Array, rloo
from rayhf.algorithms.base import (
    Selection,
    SelectionContext,
    sample_and_compare,
    scored,
    with_ties,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient, group_advantages
from rayhf.algorithms.policy_gradient_config import (
    KLConfig,
    PolicyGradientConfig,
    PolicyLossSetting,
)
from rayhf.config.algorithms import InitialReference
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.losses.policy import ClippedSurrogateConfig
from rayhf.types import Example, Group, Prompt, Row


class NashMDKLConfig(KLConfig):
    """KL penalty to the initial policy; a completion's whole penalty is part of its reward."""

    coef: NonNegativeFloat = 0.1
    """The paper's tau (TRL's default, there named beta)."""


class NashMDConfig(PolicyGradientConfig):
    """Nash-MD (Munos et al. 2023)."""

    type: str = "nash_md"
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, each compared with every other (ours; the paper and TRL compare one
    with one)."""
    mixture: Annotated[float, Field(ge=0, le=1)] = 0.125
    """Share of the initial policy in the opponent; 0 is self-play, 1 plays against the initial
    policy. The paper's experiments did best at 0.125 to 0.375; TRL has 0.5."""
    kl: NashMDKLConfig = NashMDKLConfig()
    loss: PolicyLossSetting = ClippedSurrogateConfig(aggregate="sequence_sum")
    """A policy-gradient loss; the mean over completions of summed log-probs, as in the paper."""

    @model_validator(mode="after")
    def _check_kl(self) -> Self:
        if self.kl.where != "reward" or self.kl.estimator != "k1":
            raise ValueError(
                "kl: nash_md's penalty is the log-ratio of whole completions; expected where: "
                "reward and estimator: k1"
            )
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse sampling whose probabilities are not known. Raises ConfigError."""
        rollout = campaign.rollout
        if rollout.top_p < 1 or rollout.top_k:
            raise ConfigError(
                "rollout: nash_md weights completions by their probability; expected top_p 1 and "
                f"top_k 0, got {rollout.top_p:g} and {rollout.top_k}"
            )
        super().check_campaign(campaign)


class NashMD(PolicyGradient):
    """Nash-MD: REINFORCE against a mixture of policy and initial policy (Munos et al. 2023)."""

    Config = NashMDConfig
    config: NashMDConfig
    min_group = 2
    has_group_baseline = True

    def __init__(self, config: NashMDConfig) -> None:
        super().__init__(config)
        self.mixture = config.mixture
        self.reference = InitialReference()

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and compare each with every other."""
        return await sample_and_compare(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make one example per compared completion, which carries its win probabilities."""
        selection = super().select(groups, context)
        tables = {group.prompt.prompt_id: _win_rows(group) for group in groups}
        examples = []
        for example in selection.examples:
            (row,) = example.rows
            scalars = {**row.scalars, **tables[row.prompt_id][row.sample]}
            examples.append(replace(example, rows=(replace(row, scalars=scalars),)))
        return replace(selection, examples=tuple(examples))

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Replace win rates against the policy by those against the mixture; add advantages."""
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            groups[example.rows[0].prompt_id].append(index)
        rated = list(examples)
        win_rates: list[float] = []
        opponents: list[float] = []
        for members in groups.values():
            rows = [examples[index].rows[0] for index in members]
            win = np.array([[row.scalars[_win(other.sample)] for other in rows] for row in rows])
            rates, effective = mixture_win_rates(win, self._log_weights(rows))
            win_rates += rates.tolist()
            opponents += effective.tolist()
            for index, row, rate in zip(members, rows, rates.tolist(), strict=True):
                rated[index] = replace(examples[index], rows=(_rated(row, rate),))
        credited, metrics = super().credit(rated)
        if rated:
            metrics["nash_md/win_rate"] = float(np.mean(win_rates))
            metrics["nash_md/opponents"] = float(np.mean(opponents))
        return credited, metrics

    def _log_weights(self, rows: Sequence[Row]) -> Array:
        """Return log(mixture / what sampled it) of each completion, up to a constant: (K,)."""
        sums = []
        for row in rows:
            behavior = row.tokens["behavior_logp"]
            policy = row.tokens.get("old_logp", behavior)
            mixed = (1 - self.mixture) * policy + self.mixture * row.tokens["ref_logp"]
            sums.append(np.sum(mixed - behavior, dtype=np.float64))
        return np.array(sums)

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`: win rate - 1/2, minus the KL penalty with its baseline."""
        penalties = replace(tokens, scores=np.zeros_like(tokens.scores))
        penalty = group_advantages(penalties, kl_coef, rloo)
        return {"advantage": np.repeat(tokens.scores - 0.5, tokens.lengths) + penalty}


def mixture_win_rates(win: Array, log_weights: Array) -> tuple[Array, Array]:
    """Return each completion's win rate against the other ones by weight, and how many count.

    In: win probabilities, NaN where unknown: (K, K); log-weights up to a constant: (K,). Out: win
    rates, and effective numbers of opponents (sum of weights)^2 / sum of squares: (K,) each.
    Every completion must have a known opponent.
    """
    usable = np.isfinite(win) & ~np.eye(len(win), dtype=bool)
    log_weights = np.where(usable, log_weights[None, :], -np.inf)
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    rates: Array = (weights * np.where(usable, win, 0.0)).sum(axis=1)
    return rates, 1.0 / np.square(weights).sum(axis=1)


def _rated(row: Row, rate: float) -> Row:
    """Return a row whose score has another win rate; penalties on length stay part of it."""
    scalars = {name: value for name, value in row.scalars.items() if not name.startswith("win")}
    score = row.scalars["score"] - row.scalars["win_rate"] + rate
    return replace(row, scalars={**scalars, "score": score})


def _win(sample: int) -> str:
    return f"win/{sample}"


def _win_rows(group: Group) -> dict[int, dict[str, float]]:
    """Return each compared completion's win rate and win probabilities, as scalars of its row."""
    if group.compared is None:
        return {}
    completions = [sample.completion.token_ids.tolist() for sample in group.samples]
    win = with_ties(group.compared.win, completions)
    return {
        i: {"win_rate": rate} | {_win(j): float(p) for j, p in enumerate(win[i])}
        for i, _, rate in scored(group)
    }
