"""A second role beside the policy: a policy of its own, or the policy itself with one more task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayhf.algorithms.base import OtherPolicy, TrainSchedule
from rayhf.config.base import Section
from rayhf.config.models import ModelName
from rayhf.errors import ConfigError

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig


class SecondPolicyConfig(Section):
    """The model of a second role, and its training."""

    shared: bool = False
    """Use one model for both roles: the second role's examples then train the policy, with
    learner.lr."""
    model: ModelName | None = None
    """Initial model (directory or hub name), with the policy's tokenizer. Default: the policy's
    model."""
    lr: PositiveFloat = 1e-6
    """Learning rate; constant after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    epochs: PositiveInt = 1
    """Passes over an iteration's examples of this role."""
    examples_per_step: PositiveInt = 64
    """Examples per optimizer step."""
    max_tokens: PositiveInt | None = None
    """Maximum number of tokens per text of this role. Default: rollout.max_tokens."""

    @model_validator(mode="after")
    def _one_model(self) -> SecondPolicyConfig:
        if self.shared and self.model is not None:
            raise ValueError("shared is true, so model must be null: the policy has both roles")
        return self

    def check_schedule(self, campaign: CampaignConfig, key: str) -> None:
        """Refuse a learning-rate schedule of unknown length. Raises ConfigError."""
        schedule = campaign.learner.schedule
        if self.shared and schedule != "constant":
            raise ConfigError(
                f"learner.schedule is {schedule}: with {key}.shared the number of optimizer steps "
                "depends on what is generated; expected constant"
            )


class SecondPolicy:
    """Base of algorithms with one role besides "policy" (TrainsSeveralPolicies).

    Its objective has the role's name, and so has its policy where that is not shared.
    """

    def set_role(self, name: str, config: SecondPolicyConfig) -> None:
        """Name the role; to be called by the constructor."""
        self._role = name
        self._role_config = config
        self.policies = ("policy",) if config.shared else ("policy", name)

    @property
    def role_policy(self) -> str:
        """Name of the policy that has the second role."""
        return self.policies[-1]

    def trained_policy(self, objective: str) -> str:
        """Return the second policy for its own objective, where it is a policy of its own."""
        return objective if objective in self.policies else "policy"

    def train_schedule(self, objective: str) -> TrainSchedule:
        """Return the second role's schedule. Raises KeyError for any other objective."""
        if objective != self._role:
            raise KeyError(f"{type(self).__name__} has no further objective {objective!r}")
        return TrainSchedule(
            epochs=self._role_config.epochs,
            examples_per_step=self._role_config.examples_per_step,
        )

    def other_policy(self, name: str) -> OtherPolicy:
        """Return the second policy's settings. Raises KeyError for any other policy."""
        if name not in self.policies[1:]:
            raise KeyError(f"{type(self).__name__} has no further policy {name!r}")
        role = self._role_config
        return OtherPolicy(model=role.model, lr=role.lr, warmup_steps=role.warmup_steps)
