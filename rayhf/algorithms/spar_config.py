"""Settings of SPaR (Cheng et al. 2024, arXiv 2412.11605).

Defaults are those of the paper's released code unless a line says ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayhf.algorithms.conversation import (
    Conversation,
    TurnTemplate,
    check_conversation,
    check_pattern,
    user_turn,
)
from rayhf.algorithms.second_policy import SecondPolicyConfig
from rayhf.config.algorithms import (
    AlgorithmConfig,
    PreviousReference,
    ReferenceSchedule,
    refuse_staleness,
    refuse_thinking,
)
from rayhf.config.base import Section
from rayhf.config.registry import LOSSES
from rayhf.losses.pairs import PairLossConfig
from rayhf.losses.preference import SigmoidConfig
from rayhf.search.refine import RefineSettings

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig

JUDGE_REQUEST = """\
You check whether an answer does what its instruction asks. Take the requirements of the \
instruction one by one and say of each whether the answer meets it. An answer that misses a single \
one has failed.

Instruction:
{{ instruction }}

Answer:
{{ response }}

Use this form:
Step-by-step verification: (each requirement, and whether it is met)
Final Judgement (are all requirements met?): (Yes or No)"""
REFINE_REQUEST = """\
Going by your judgement, improve the answer until it meets every requirement of the instruction. \
Say first what has to change, then give the whole improved answer between [[start]] and [[end]]:
Reflection: (what has to change)
[[start]](the improved answer)[[end]]"""


JUDGE_TEMPLATE = user_turn(JUDGE_REQUEST)
REFINE_TEMPLATE = (
    TurnTemplate(role="user", content="{{ judge_prompt }}"),
    TurnTemplate(role="assistant", content="{{ judgement }}"),
    TurnTemplate(role="user", content=REFINE_REQUEST),
)


class RefinerConfig(SecondPolicyConfig):
    """The second policy: it judges and refines, and is fine-tuned on its own accepted texts."""

    lr: PositiveFloat = 2e-6
    """Learning rate; constant after the warm-up, as in the source."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up (ours; the source warms up too)."""
    epochs: PositiveInt = 5
    """Passes over an iteration's refiner examples."""
    examples_per_step: PositiveInt = 64
    """Examples per optimizer step: 2 per device, 4 accumulated, on 8 devices (the number of devices
    is ours)."""


class RefinerDataConfig(Section):
    """Maximum number of refiner examples per iteration, by kind; 0 excludes a kind."""

    refinements: NonNegativeInt = 4000
    """Refinements that ended a successful search, after their parent's judgment."""
    tree_yes: NonNegativeInt = 1500
    """Judgments in a tree with a majority, but not all votes, for yes; one per tree."""
    tree_no: NonNegativeInt = 1000
    """Judgments in a tree with a majority, but not all votes, for no; one per tree."""
    answers_yes: NonNegativeInt = 2500
    """Judgments of the actor's completions with a majority, but not all votes, for yes."""
    answers_no: NonNegativeInt = 500
    """Judgments of the actor's completions with a majority, but not all votes, for no."""


class SPaRConfig(RefineSettings, AlgorithmConfig):
    """Self-play with tree-search refinement (Cheng et al. 2024)."""

    plays_episodes: ClassVar[bool] = False

    type: str = "spar"
    samples: PositiveInt = 5
    """Completions per prompt (the source has 5, temperature 0.9 and top_p 0.9: rollout.*)."""
    judge_votes: PositiveInt = 5
    """Judgments per text; the majority decides."""
    judge_temperature: PositiveFloat = 0.7
    """Sampling temperature of judgments."""
    refine_temperature: PositiveFloat = 0.7
    """Sampling temperature of refinements."""
    loss: Annotated[PairLossConfig, LOSSES.defaulting("sigmoid")] = SigmoidConfig()
    """The actor's preference loss (the source: DPO with beta 0.1)."""
    nll_coef: NonNegativeFloat = 0.1
    """Weight of the chosen completion's negative log-likelihood, mean per token."""
    reference: ReferenceSchedule = PreviousReference()
    """Schedule of the reference."""
    refiner: RefinerConfig = RefinerConfig()
    refiner_data: RefinerDataConfig = RefinerDataConfig()
    judge_template: Conversation = JUDGE_TEMPLATE
    """Conversation that requests a judgment: turns of Jinja2, or a string for one user turn.
    Variables: instruction, response."""
    refine_template: Conversation = REFINE_TEMPLATE
    """Conversation that requests a refinement. Variables: instruction, response, judgement, and
    judge_prompt (the rendered last turn of judge_template)."""
    verdict_pattern: str = r"(?i)final judgement[^\n]*:\W*(yes|no)\b"
    """Regular expression that finds the verdict in a judgment: group 1 of its last match."""
    verdict_yes: str = "yes"
    """Group 1 for a completion that meets its instruction; case does not matter."""
    verdict_no: str = "no"
    """Group 1 for a completion that does not."""
    refined_pattern: str | None = r"(?s)\[\[start\]\](.*?)\[\[end\]\]"
    """Regular expression that finds the refined completion in a refinement: group 1 of its last
    match. null: the whole text."""
    test_time_refine: bool = False
    """Also judge held-out completions, refine those that fail, and score the result (the source's
    test-time search)."""

    @field_validator("judge_template", "refine_template")
    @classmethod
    def _known_variables(cls, value: Conversation, info: ValidationInfo) -> Conversation:
        known = {"instruction", "response"}
        if info.field_name == "refine_template":
            known |= {"judgement", "judge_prompt"}
        return check_conversation(value, known)

    @field_validator("verdict_pattern", "refined_pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        return None if value is None else check_pattern(value)

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a thinking model, samples of earlier weights, and a schedule of unknown length.

        Raises ConfigError.
        """
        refuse_staleness(
            campaign, "has no importance weights: its chosen answers are the refiner's"
        )
        refuse_thinking(campaign, "a refined answer has no thinking of its own to train on")
        self.refiner.check_schedule(campaign, "algorithm.refiner")

    @model_validator(mode="after")
    def _two_verdicts(self) -> SPaRConfig:
        if self.verdict_yes.casefold() == self.verdict_no.casefold():
            raise ValueError(f"verdict_yes and verdict_no are both {self.verdict_yes!r}")
        return self
