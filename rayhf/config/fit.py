"""The config of `rayhf fit-scorer`. One batch unit: pairs. A docstring under a field is its help.

An objective's settings also declare what the fit must know of it: the kind of scorer that results,
the outputs of the score head, and the numbers that training rows need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rayhf.config.base import Section
from rayhf.config.models import ModelName
from rayhf.config.schema import ClusterConfig, Fraction, LearnerConfig, LoraConfig
from rayhf.config.scorers import ScorerKind

UNREAD = {
    "epochs": "use epochs",
    "prompts_per_step": "use batch, in pairs",
    "critic_lr": "there is no critic; use learner.lr",
    "critic_model": "there is no critic; use model",
    "bucket_mib": "no weights are sent",
    "stream_values": "there is no critic",
}
"""Keys of `learner` that mean something in a campaign only, and what to set here."""


class ObjectiveConfig(Section):
    """Settings and declared facts of any objective."""

    kind: ClassVar[ScorerKind] = "pointwise"
    """What the fitted scorer reads and returns."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Numbers that every training row must have besides its texts."""

    @property
    def outputs(self) -> int:
        """Outputs of the score head."""
        return 1

    @property
    def served_temperature(self) -> float:
        """Divisor of log-odds when the scorer is served."""
        return 1.0


class _CenteredConfig(ObjectiveConfig):
    centering: NonNegativeFloat = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0. The term is from
    Eisenstein et al. 2023 (2312.09244), the weight is what TRL recommends for it."""


class BradleyTerryConfig(_CenteredConfig):
    """-log sigmoid(r_chosen - r_rejected)."""

    type: Literal["bradley_terry"] = "bradley_terry"


class BradleyTerryMarginConfig(_CenteredConfig):
    """-log sigmoid(r_chosen - r_rejected - margin), as in Llama 2.

    Every training row needs `margin`.
    """

    type: Literal["bradley_terry_margin"] = "bradley_terry_margin"
    needs: ClassVar[tuple[str, ...]] = ("margin",)


class BradleyTerryScaledConfig(_CenteredConfig):
    """-margin * log sigmoid(r_chosen - r_rejected), as in HelpSteer2-Preference.

    Every training row needs `margin`, above 0.
    """

    type: Literal["bradley_terry_scaled"] = "bradley_terry_scaled"
    needs: ClassVar[tuple[str, ...]] = ("margin",)


class RegressionConfig(ObjectiveConfig):
    """Squared error to the ratings.

    Every training row needs `score_chosen` and `score_rejected`.
    """

    type: Literal["regression"] = "regression"
    needs: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")
    mix: ClassVar[float] = 1.0


class RegressionBradleyTerryConfig(ObjectiveConfig):
    """mix * squared error + (1 - mix) * Bradley-Terry.

    Every training row needs `score_chosen` and `score_rejected`.
    """

    type: Literal["regression_bradley_terry"] = "regression_bradley_terry"
    needs: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")
    mix: Fraction = 0.5
    """Share of the squared error. Convex, so that both ends are the losses of that name; the
    default is ours."""


class PairwiseConfig(ObjectiveConfig):
    """A cross-encoder reads both completions, in both orders.

    Not transitive: it can hold cycles. Quadratic cost in the completions.
    """

    type: Literal["pairwise"] = "pairwise"
    kind: ClassVar[ScorerKind] = "pairwise"


class GeneralPreferenceConfig(ObjectiveConfig):
    """A skew-symmetric product of two completions' embeddings (Zhang et al. 2024).

    Not transitive: it can hold cycles. Linear cost in the completions.
    """

    type: Literal["general_preference"] = "general_preference"
    kind: ClassVar[ScorerKind] = "general_preference"
    temperature: PositiveFloat = 0.1
    """tau: P(i beats j) = sigmoid(s_ij / tau)."""
    blocks: PositiveInt = 3
    """2x2 blocks of the product: the head has twice as many outputs. The authors use 4 to 6
    outputs."""
    centering: NonNegativeFloat = 0.1
    """Weight of |v_chosen + v_rejected|^2, which removes what all embeddings have in common. Ours;
    the authors have 0."""

    @property
    def outputs(self) -> int:
        """Outputs of the score head."""
        return 2 * self.blocks

    @property
    def served_temperature(self) -> float:
        """Divisor of log-odds when the scorer is served."""
        return self.temperature


Objective = Annotated[
    BradleyTerryConfig
    | BradleyTerryMarginConfig
    | BradleyTerryScaledConfig
    | RegressionConfig
    | RegressionBradleyTerryConfig
    | PairwiseConfig
    | GeneralPreferenceConfig,
    Field(discriminator="type"),
]


class FitConfig(Section):
    """Preference pairs in, a directory that serves as a scorer out."""

    seed: NonNegativeInt = 0
    model: ModelName
    """Model directory or hub name to start from, with a chat template: a causal language model, or
    a scorer fitted before."""
    train: Path
    """JSONL or Parquet; rows have `prompt` or `messages`, `chosen`, `rejected`, optionally
    `margin`, `score_chosen` and `score_rejected`."""
    test: Path
    """Held-out pairs of the same form; only the texts are read."""
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

    @field_validator("lora")
    @classmethod
    def _refuse_quantize(cls, lora: LoraConfig | None) -> LoraConfig | None:
        if lora is not None and lora.quantize is not None:
            raise ValueError("quantize is for policies, not for scorers; leave it out")
        return lora

    @field_validator("learner")
    @classmethod
    def _refuse_unread(cls, learner: LearnerConfig) -> LearnerConfig:
        for name, instead in UNREAD.items():
            if getattr(learner, name) != LearnerConfig.model_fields[name].default:
                raise ValueError(f"{name} is not read when a scorer is fitted; {instead}")
        return learner
