"""One config class per algorithm: `type` alone gives the source's setting, with the source named
beside each default."""

from __future__ import annotations

from pathlib import Path
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
    """reference <- alpha * policy + (1 - alpha) * reference. Gorbatovski et al. 2024 (TR-DPO), eq.
    3."""

    type: Literal["ema"] = "ema"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    every: PositiveInt = 512
    """Rounds between updates."""


ReferenceSchedule = Annotated[
    InitialReference | PreviousReference | EmaReference, Field(discriminator="type")
]


class ImportanceConfig(Section):
    """Truncated importance weights exp(log p_learner - log p_rollout) against the rollout-learner
    mismatch and staleness."""

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
    """Over the whole optimizer step: per token, mean of per-response means, or mean of per-response
    sums."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response that was cut off (finish_reason "length")."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before the limit over which the length penalty grows (DAPO); 0 is off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """The penalty at the limit."""
    drop_uniform_groups: bool = False
    """Leave out prompts whose responses all have one score: they carry no advantage (DAPO's dynamic
    sampling)."""
    critic_warmup: NonNegativeInt = 0
    """Rounds in which only the critic learns."""
    importance: ImportanceConfig = ImportanceConfig()


class PairedConfig(Section):
    """What online and iterative DPO share: k samples per prompt, pairs of them, and a loss of the
    DPO family."""

    samples: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt (RLHFlow uses 8)."""
    min_margin: NonNegativeFloat = 0.0
    """Pairs whose scores differ by this or less are ties: dropped and counted."""
    loss: Literal[
        "sigmoid",
        "ipo",
        "hinge",
        "robust",
        "simpo",
        "cpo",
        "orpo",
        "exo",
        "nca",
        "apo_zero",
        "apo_down",
        "sppo_hard",
        "discopop",
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
    importance: ImportanceConfig = ImportanceConfig()


class OnlineDPOConfig(PairedConfig):
    """Online DPO (Guo et al. 2024, OAIF) with k samples per prompt and the offline losses of the
    DPO family."""

    type: Literal["online_dpo"] = "online_dpo"
    pairs: Literal["best_worst", "all_pairs", "best_random"] = "best_worst"
    reference: ReferenceSchedule = InitialReference()


class OfflineConfig(Section):
    """Preference pairs from a file."""

    path: Path
    """JSONL or Parquet with `prompt` or `messages`, `chosen`, `rejected`."""
    share: PositiveFloat = 1.0
    """Given pairs per round, as a share of prompts.batch."""


class IterativeDPOConfig(PairedConfig):
    """Iterative DPO (Dong et al. 2024, RLHFlow): few, large rounds; the policy of one is the
    reference of the next.

    Rounds are `run.iterations` (3 there), prompts per round `prompts.batch` (20,000), passes
    `learner.epochs` (2).
    """

    type: Literal["iterative_dpo"] = "iterative_dpo"
    pairs: Literal[
        "best_worst", "best_random", "best_second", "all_pairs", "length_penalized", "rso"
    ] = "best_worst"
    """length_penalized: best against worst of score - length_penalty * tokens. rso: rejection
    sampling (Liu et al. 2023), then pairs of the accepted."""
    length_penalty: NonNegativeFloat = 0.001
    """Score per token, for length_penalized. RLHFlow's is per character."""
    rso_temperature: PositiveFloat = 0.5
    """Of the acceptance exp((score - best) / temperature) (Liu et al. 2023), in units of the score.
    Our default."""
    rso_keep: Annotated[int, Field(ge=2)] = 4
    """Answers accepted per prompt."""
    reference: ReferenceSchedule = PreviousReference()
    disjoint_iterations: bool = True
    """Refuse a campaign with more prompts in its rounds than the file has."""
    earlier: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Pairs of rounds t-1, t-2, ... mixed in, as shares of this round's pairs (DNO, Rosset et al.
    2024: at most 0.3, 0.15)."""
    offline: OfflineConfig | None = None


class SPPOConfig(Section):
    """Self-play preference optimization (Wu et al. 2024): regress every answer's log-ratio onto eta
    * (P(win) - 1/2)."""

    type: Literal["sppo"] = "sppo"
    samples: Annotated[int, Field(ge=2)] = 5
    """Answers per prompt, which stand for the current policy as the opponent."""
    eta: PositiveFloat = 1000.0
    """Step of the multiplicative-weights update; the authors' beta is 1 / eta."""
    target: Literal["soft", "single", "hard"] = "soft"
    """soft: P(win) against the current policy. single: P(best beats worst). hard: 1 and 0. These
    two need train_on best_worst."""
    train_on: Literal["best_worst", "all"] = "best_worst"
    """The authors' code trains on two answers of the K; all of them use what was compared
    anyway."""
    min_margin: NonNegativeFloat = 0.0
    """A prompt whose best and worst win probabilities differ by this or less is dropped and counted
    as a tie."""
    reference: ReferenceSchedule = PreviousReference()


class INPOConfig(Section):
    """Iterative Nash policy optimization (Zhang et al. 2024): two references, a fixed one and the
    policy at the round's start."""

    type: Literal["inpo"] = "inpo"
    samples: Annotated[int, Field(ge=2)] = 8
    eta: PositiveFloat = 0.0075
    tau: NonNegativeFloat = 0.0025
    """Pull towards the fixed reference; eta / 3 in the source."""
    min_margin: NonNegativeFloat = 0.0
    """Between the win probabilities of best and worst."""
    reference: ReferenceSchedule = InitialReference()


class HyPOConfig(Section):
    """Hybrid preference optimization (Song et al. 2024): DPO on given pairs, KL on fresh samples.
    The numbers are ours where ALGORITHMS A6 calls the paper's unverified."""

    type: Literal["hypo"] = "hypo"
    offline: OfflineConfig
    samples: Annotated[int, Field(ge=2)] = 2
    """Fresh answers per prompt for the KL term (k of the leave-one-out baseline)."""
    beta: PositiveFloat = 0.1
    kl_coef: NonNegativeFloat = 0.1
    """Weight of the online KL; 0 is offline DPO."""
    clip: PositiveFloat = 100.0
    """Bound on an answer's log-ratio as its cost, in nats."""
    importance: ImportanceConfig = ImportanceConfig()


TAKES_LABELS = ("online_dpo", "iterative_dpo", "hypo")
"""Loops that train on pairs as people judge them: whatever better means, chosen over rejected is a
pair of theirs."""
