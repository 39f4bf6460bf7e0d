"""The config of `rayhf fit-scorer`. One batch unit: pairs. Imports no torch; a docstring under a
field is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rayhf.config.base import Section
from rayhf.config.schema import ClusterConfig, Fraction, LearnerConfig, LoraConfig

UNREAD = {
    "epochs": "use epochs",
    "prompts_per_step": "use batch, in pairs",
    "critic_lr": "there is no critic; use learner.lr",
    "critic_model": "there is no critic; use model",
    "bucket_mib": "weights do not travel",
}
"""Keys of `learner` that mean something in a campaign only, and what to set here."""


class _Centered(Section):
    centering: NonNegativeFloat = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0."""


class BradleyTerryObjective(_Centered):
    """-log sigmoid(r_chosen - r_rejected)."""

    type: Literal["bradley_terry"] = "bradley_terry"


class BradleyTerryMarginObjective(_Centered):
    """-log sigmoid(r_chosen - r_rejected - margin). Llama 2's. Every training row needs
    `margin`."""

    type: Literal["bradley_terry_margin"] = "bradley_terry_margin"


class BradleyTerryScaledObjective(_Centered):
    """-margin * log sigmoid(r_chosen - r_rejected). HelpSteer2-Preference's. Every training row
    needs `margin`, above 0."""

    type: Literal["bradley_terry_scaled"] = "bradley_terry_scaled"


class RegressionObjective(Section):
    """Squared error to the ratings. Every training row needs `score_chosen` and
    `score_rejected`."""

    type: Literal["regression"] = "regression"


class RegressionBradleyTerryObjective(Section):
    """mix * squared error + (1 - mix) * Bradley-Terry. Every training row needs `score_chosen` and
    `score_rejected`."""

    type: Literal["regression_bradley_terry"] = "regression_bradley_terry"
    mix: Fraction = 0.5
    """Ours."""


class PairwiseObjective(Section):
    """A cross-encoder reads both answers, in both orders. Not transitive: it can hold cycles.
    Quadratic cost in the answers."""

    type: Literal["pairwise"] = "pairwise"


class GeneralPreferenceObjective(Section):
    """A skew-symmetric product of two answers' embeddings (Zhang et al. 2024). Can hold cycles;
    linear cost in the answers."""

    type: Literal["general_preference"] = "general_preference"
    temperature: PositiveFloat = 0.1
    """tau: P(i beats j) = sigmoid(s_ij / tau)."""
    blocks: PositiveInt = 3
    """2x2 blocks of the product: the head has twice as many outputs. The authors use 4 to 6
    outputs."""
    centering: NonNegativeFloat = 0.1
    """Weight of |v_chosen + v_rejected|^2, which takes away what all embeddings have in common.
    Ours; the authors have 0."""


Objective = Annotated[
    BradleyTerryObjective
    | BradleyTerryMarginObjective
    | BradleyTerryScaledObjective
    | RegressionObjective
    | RegressionBradleyTerryObjective
    | PairwiseObjective
    | GeneralPreferenceObjective,
    Field(discriminator="type"),
]


class FitConfig(Section):
    """Pairs in, a directory out that serves as a scorer."""

    seed: NonNegativeInt = 0
    model: Path
    """Hugging Face directory to start from, with a chat template: a causal language model, or a
    scorer fitted before."""
    train: Path
    """JSONL or Parquet; rows have `prompt` or `messages`, `chosen`, `rejected`, optionally
    `margin`, `score_chosen` and `score_rejected`."""
    test: Path
    """Held-out pairs of the same form; only `chosen` over `rejected` is read of them."""
    output: Path
    """Directory to write; must not exist or be empty."""
    objective: Objective
    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    batch: PositiveInt = 64
    """Pairs per optimizer step: the one batch unit."""
    lora: LoraConfig | None = None
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("learner")
    @classmethod
    def _only_what_is_read(cls, learner: LearnerConfig) -> LearnerConfig:
        for name, instead in UNREAD.items():
            if getattr(learner, name) != LearnerConfig.model_fields[name].default:
                raise ValueError(f"{name} is not read when a scorer is fitted; {instead}")
        return learner
