"""Settings of self-rewarding (Yuan et al. 2024, arXiv 2401.10020).

Defaults are those of the source unless a line says ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rayhf.algorithms.conversation import (
    Conversation,
    check_conversation,
    check_pattern,
    user_turn,
)
from rayhf.algorithms.online_dpo import OnlineDPOConfig
from rayhf.algorithms.policy_gradient_config import PolicyLossSetting
from rayhf.algorithms.second_policy import SecondPolicyConfig
from rayhf.config.algorithms import PreviousReference, ReferenceSchedule, refuse_staleness
from rayhf.errors import ConfigError
from rayhf.losses.policy import ClippedSurrogateConfig

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig

JUDGE_REQUEST = """\
Rate the answer to the question below with up to five points, one for each statement that holds:
1. It is about the question and has some of what was asked for.
2. It covers a large part of the question.
3. It answers the question itself, in a useful way.
4. It is complete, well ordered, and written for the person who asks.
5. Nothing in it is wrong or superfluous; an expert would not change it.

Question:
{{ instruction }}

Answer:
{{ response }}

Give your reasons in at most 100 words. Then end with the line
Score: (the number of points)"""


class JudgeConfig(SecondPolicyConfig):
    """The judge, where it is trained."""

    shared: bool = True
    """The policy itself judges. false, with train_judge: a policy of its own does."""


class SelfRewardingConfig(OnlineDPOConfig):
    """Self-rewarding: the policy judges its own samples (Yuan et al. 2024)."""

    plays_episodes: ClassVar[bool] = False

    type: str = "self_rewarding"
    samples: Annotated[int, Field(ge=2)] = 4
    """Completions per prompt (rollout.temperature 0.7 and top_p 0.9 in the source)."""
    judgments: PositiveInt = 3
    """Judgments per completion; its score is the mean of their verdicts."""
    judge_temperature: PositiveFloat | None = None
    """Sampling temperature of judgments. Default: rollout.temperature."""
    judge_template: Conversation = user_turn(JUDGE_REQUEST)
    """Conversation that requests a judgment: turns of Jinja2, or a string for one user turn.
    Variables: instruction, response. (Ours, with the source's five points.)"""
    verdict_pattern: str = r"(?i)\bscore:\W*([0-5](?:\.[0-9]+)?)\b"
    """Regular expression that finds the verdict in a judgment: group 1 of its last match."""
    verdicts: dict[str, float] | None = None
    """Score of each verdict where it is a word, for example {yes: 1, no: 0}; case does not matter.
    Default: the verdict is a number."""
    pass_verdict: float = 3.0
    """Verdict from which a judgment says that the completion is good (ours)."""
    pass_score: float = 0.5
    """Score of the scorers from which a completion is good (ours)."""
    train_judge: bool = False
    """Also train the judge on its own judgments, by GRPO: a completion's judgments are a group, and
    one that agrees with the scorers on whether the completion is good has reward 1, another one, or
    one without a verdict, 0. The scorers must be verifiers then; they never make the pairs."""
    judge: JudgeConfig = JudgeConfig()
    judge_loss: PolicyLossSetting = ClippedSurrogateConfig(aggregate="sequence_mean")
    """The judge's policy-gradient loss (ours; DeepSeekMath's mean of completions)."""
    reference: ReferenceSchedule = PreviousReference()
    """Schedule of the reference: the source trains each iteration's model from, and against, the
    one before. Reference-free losses ignore it."""

    @field_validator("judge_template")
    @classmethod
    def _check_judge(cls, value: Conversation) -> Conversation:
        return check_conversation(value, {"instruction", "response"})

    @field_validator("verdict_pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        return check_pattern(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train_judge and self.judgments < 2:
            raise ValueError(
                "train_judge compares the judgments of a completion with each other; expected "
                "judgments to be at least 2"
            )
        if not self.judge.shared and not self.train_judge:
            raise ValueError(
                "judge.shared is false, but train_judge is too: a judge that is another model and "
                "does not learn is a scorer of type judge, for online_dpo; expected judge.shared: "
                "true, or train_judge: true"
            )
        if self.judge_loss.aggregate == "constant_length":
            raise ValueError("judge_loss.aggregate: constant_length is not for judgments")
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a judge that is trained on other log-probs than those that it sampled with.

        Raises ConfigError.
        """
        if not self.train_judge:
            return
        refuse_staleness(campaign, "trains the judge on judgments of its present weights")
        self.judge.check_schedule(campaign, "algorithm.judge")
        temperature = self.judge_temperature or campaign.rollout.temperature
        if temperature != 1:
            raise ConfigError(
                f"algorithm.judge_temperature: judgments are sampled at {temperature:g}, but "
                "train_judge trains on log-probs at 1; expected 1"
            )
