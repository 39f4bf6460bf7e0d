"""One config class per algorithm: `type` alone gives the source's setting, with the source named beside each default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rayhf.config.base import Section


class InitialReference(Section):
    """The policy the campaign started from, for the whole campaign."""

    type: Literal["initial"] = "initial"


class PreviousReference(Section):
    """The policy as it was at the last refresh."""

    type: Literal["previous"] = "previous"
    every: PositiveInt = 1
    """Rounds between refreshes."""


class EmaReference(Section):
    """reference <- alpha * policy + (1 - alpha) * reference. Gorbatovski et al. 2024 (TR-DPO), eq. 3."""

    type: Literal["ema"] = "ema"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    every: PositiveInt = 512
    """Rounds between updates."""


ReferenceSchedule = Annotated[InitialReference | PreviousReference | EmaReference, Field(discriminator="type")]


class ImportanceConfig(Section):
    """Truncated importance weights exp(log p_learner - log p_rollout) against the rollout-learner mismatch and staleness."""

    cap: PositiveFloat | None = 2.0
    """Upper truncation (verl's rollout correction default); null turns the correction off."""


class KLConfig(Section):
    """The KL penalty of PPO (ALGORITHMS A1)."""

    coef: NonNegativeFloat = 0.01
    """OpenRLHF's default."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Schulman's estimators."""
    where: Literal["reward", "loss"] = "reward"
    """A penalty on each token's reward, or a term of the loss."""
    target: PositiveFloat | None = None
    """Adaptive controller (Ziegler et al. 2019): aim at this KL per response, in nats."""
    horizon: PositiveInt = 10000
    """Responses, for the adaptive controller."""


class PPOConfig(Section):
    """PPO for RLHF; `advantage` chooses between a critic and the critic-free estimators."""

    type: Literal["ppo"] = "ppo"
    samples: PositiveInt = 1
    """Responses per prompt; group estimators need at least 2."""
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE lambda (Huang et al. 2024, "N+ implementation details")."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c for negative advantages (Ye et al. 2020)."""
    value_clip: PositiveFloat | None = 0.2
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation, keeping the mean."""
    reward_clip: PositiveFloat | None = 10.0
    """Scores are clipped to +- this (OpenRLHF)."""
    kl: KLConfig = KLConfig()
    entropy_coef: NonNegativeFloat = 0.0
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """Over the whole optimiser step: per token, mean of per-response means, or mean of per-response sums."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response that was cut off (finish_reason "length")."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before the limit over which the length penalty grows (DAPO); 0 is off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """The penalty at the limit."""
    drop_uniform_groups: bool = False
    """Leave out prompts whose responses all have one score: they carry no advantage (DAPO's dynamic sampling)."""
    critic_warmup: NonNegativeInt = 0
    """Rounds in which only the critic learns."""
    importance: ImportanceConfig = ImportanceConfig()


class OnlineDPOConfig(Section):
    """Online DPO (Guo et al. 2024, OAIF) with k samples per prompt and the offline losses of the DPO family."""

    type: Literal["online_dpo"] = "online_dpo"
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt (RLHFlow uses 8)."""
    pairs: Literal["best_worst", "all_pairs", "best_random"] = "best_worst"
    min_margin: NonNegativeFloat = 0.0
    """Pairs whose scores differ by this or less are ties: dropped and counted."""
    loss: Literal[
        "sigmoid", "ipo", "hinge", "robust", "simpo", "cpo", "orpo", "exo", "nca", "apo_zero", "apo_down", "sppo_hard", "discopop"
    ] = "sigmoid"
    beta: PositiveFloat = 0.1
    """TRL's and RLHFlow's default."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """cDPO for sigmoid, flip rate for robust; exo needs more than 0."""
    simpo_gamma: NonNegativeFloat = 1.0
    """Target margin of SimPO (gamma in nats of beta-scaled mean log-prob)."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the chosen answer's negative log-likelihood (cpo and orpo always have theirs)."""
    discopop_tau: PositiveFloat = 0.05
    missing_eos_penalty: NonNegativeFloat = 0.0
    reference: ReferenceSchedule = InitialReference()
    importance: ImportanceConfig = ImportanceConfig()


AlgorithmConfig = Annotated[PPOConfig | OnlineDPOConfig, Field(discriminator="type")]
