"""Settings of the challenger-solver loop.

Defaults are those of R-Zero (Huang et al. 2025, arXiv 2508.05004), its paper's or else its code's,
unless a line says ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from rayhf.algorithms.conversation import (
    Conversation,
    check_conversation,
    check_pattern,
    user_turn,
)
from rayhf.algorithms.grpo import GRPOConfig, GRPOKLConfig
from rayhf.algorithms.second_policy import SecondPolicyConfig
from rayhf.config.algorithms import refuse_staleness
from rayhf.config.base import Section

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig

Rate = Annotated[float, Field(ge=0, le=1)]

CHALLENGE_REQUEST = """\
Write one new exercise about the subject below. It has a single final answer that can be checked, \
and it is so hard that a good student solves it about half of the time. Think about it first, then \
give the whole exercise, without its solution, between [[task]] and [[/task]].

Subject:
{{ instruction }}"""
SOLVE_REQUEST = """\
{{ task }}

Reason step by step, and put the final answer into \\boxed{}."""


class ChallengerConfig(SecondPolicyConfig):
    """The second policy: it proposes tasks."""

    examples_per_step: PositiveInt = 128
    """Examples per optimizer step."""


class RepetitionConfig(Section):
    """Penalty on tasks that repeat others of the iteration."""

    weight: NonNegativeFloat = 1.0
    """Weight of the share of the iteration's tasks that are in a task's cluster; 0 is off."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Likeness from which two tasks are in one cluster (ours: Jaccard index of neighboring words;
    the source clusters by BLEU). 1: only equal ones."""


class SolverKLConfig(GRPOKLConfig):
    """KL penalty of the solver to the initial policy; the challenger has none (ours)."""

    coef: NonNegativeFloat = 0.01
    """Coefficient of the penalty."""


class ChallengerSolverConfig(GRPOConfig):
    """Tasks by one policy at the edge of the other's ability (R-Zero, Huang et al. 2025)."""

    plays_episodes: ClassVar[bool] = False

    type: str = "challenger_solver"
    tasks: Annotated[int, Field(ge=2)] = 4
    """Tasks per prompt: the group that normalizes the challenger's rewards."""
    samples: Annotated[int, Field(ge=2)] = 10
    """The solver's answers per task: the group that normalizes its scores."""
    label: Literal["majority", "verified", "verified_or_majority"] = "majority"
    """What an answer's score is. majority: 1 where it has the task's most common answer, else 0; a
    tie of several is no label. verified: the scorers' score; a task that all of them skip is
    invalid. verified_or_majority: the scorers' score, or majority for a task that all skip."""
    pass_score: float = 0.5
    """Score from which an answer counts as right in the solver's success rate (ours)."""
    min_rate: Rate = 0.3
    """Smallest success rate of a task that the solver is trained on (the paper: 0.25)."""
    max_rate: Rate = 0.8
    """Largest one (the paper: 0.75)."""
    invalid_reward: float = -1.0
    """The challenger's reward for a text without a task, or with an invalid one (the paper: 0)."""
    repetition: RepetitionConfig = RepetitionConfig()
    challenger: ChallengerConfig = ChallengerConfig()
    kl: SolverKLConfig = SolverKLConfig()
    challenge_template: Conversation = user_turn(CHALLENGE_REQUEST)
    """Conversation that requests a task: turns of Jinja2, or a string for one user turn. Variable:
    instruction, the prompt's text (ours)."""
    task_pattern: str = r"(?s)\[\[task\]\](.*?)\[\[/task\]\]"
    """Regular expression that finds the task in the challenger's text: group 1 of its last
    match."""
    solve_template: Conversation = user_turn(SOLVE_REQUEST)
    """Conversation that requests an answer. Variable: task (ours)."""
    answer_pattern: str = r"\\boxed\{([^{}]*)\}"
    """Regular expression that finds the final answer in the solver's text, for majority: group 1 of
    its last match, without spaces around it."""

    @field_validator("challenge_template")
    @classmethod
    def _check_challenge(cls, value: Conversation) -> Conversation:
        return check_conversation(value, {"instruction"})

    @field_validator("solve_template")
    @classmethod
    def _check_solve(cls, value: Conversation) -> Conversation:
        return check_conversation(value, {"task"})

    @field_validator("task_pattern", "answer_pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        return check_pattern(value)

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.min_rate >= self.max_rate:
            raise ValueError(
                f"min_rate is {self.min_rate:g} and max_rate {self.max_rate:g}; expected min_rate "
                "to be smaller"
            )
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse what the family refuses, earlier weights, and a schedule of unknown length.

        Raises ConfigError.
        """
        super().check_campaign(campaign)
        refuse_staleness(campaign, "rewards the challenger by the present solver's success")
        self.challenger.check_schedule(campaign, "algorithm.challenger")
