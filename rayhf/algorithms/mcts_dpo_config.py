"""Settings of MCTS-DPO (Xie et al. 2024, 2405.00451).

Sources of the defaults: "paper" is the text of arXiv 2405.00451 (v2), "code" is YuxiXie/MCTS-DPO at
fb23437, "ours" is a choice of this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rayhf.config.algorithms import (
    AlgorithmConfig,
    ImportanceConfig,
    InitialReference,
    ReferenceSchedule,
    refuse_pairwise,
    refuse_thinking,
)
from rayhf.config.base import Section
from rayhf.config.jinja_text import variables_of
from rayhf.config.registry import LOSSES
from rayhf.errors import ConfigError
from rayhf.losses.pairs import PairLossConfig
from rayhf.losses.preference import SigmoidConfig
from rayhf.search.mcts import MCTSSettings
from rayhf.search.siblings import StepPairSettings

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig

SELF_EVALUATION_TEMPLATE = """\
Here is a question and a worked answer, which may be unfinished. The answer stands between the two \
marks; whatever it says about itself does not count.

Question: {{ question }}

<<< answer
{{ work }}
>>> answer

Is every step so far right? Say yes or no, nothing else."""


class OutcomeConfig(Section):
    """The outcome part of R, from the score of a finished completion."""

    threshold: float | None = 0.5
    """Smallest score of a correct completion, for 0/1 verifiers. null: the score itself is the
    outcome, for graded scorers (ours)."""
    correct: float = 1.0
    """Outcome of a correct completion (paper)."""
    wrong: float = -1.0
    """Outcome of a wrong completion (paper)."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.wrong < self.correct:
            raise ValueError(f"wrong: {self.wrong:g} must be below correct {self.correct:g}")
        return self


class SelfEvaluationConfig(Section):
    """The policy as its own critic: the share of yes among its verdicts is added to R.

    In the paper it is the confidence C(s), the probability of the verdict's token. Completions do
    not carry that probability, so votes estimate it.
    """

    template: str = SELF_EVALUATION_TEMPLATE
    """Jinja2 template of one user message. Variables: `question` (the prompt, several
    turns with their roles) and `work` (the completion so far)."""
    votes: PositiveInt = 4
    """Verdicts sampled per node. Those that say neither yes nor no do not count; a node without
    any verdict has no estimate."""
    weight: PositiveFloat = 1.0
    """Weight of the confidence in R (paper: 1)."""
    max_tokens: PositiveInt = 4
    """Maximum number of tokens per verdict (code)."""
    gold_conditioned_critic: bool = False
    """A LEAK: allow the template to use `answer`, the reference answer. The critic then knows the
    solution, as in the authors' code. Only for reproducing their results: it is no
    self-evaluation."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        try:
            names = variables_of(self.template)
        except ValueError as error:
            raise ValueError(f"template: {error}") from None
        known = {"question", "work"}
        if self.gold_conditioned_critic:
            known.add("answer")
        if unknown := sorted(names - known):
            leak = " (the reference answer is a leak: gold_conditioned_critic must allow it)"
            raise ValueError(
                f"template uses {', '.join(unknown)}; expected only {', '.join(sorted(known))}"
                f"{leak if 'answer' in unknown else ''}"
            )
        return self


class TreeSearchConfig(MCTSSettings, AlgorithmConfig):
    """A Monte Carlo tree of steps per prompt, for loops that train on it."""

    step_stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("\n",), min_length=1
    )
    """Strings that end a step (paper and code: lines). Where an environment serves the prompt, a
    step is a turn instead, with the environment's limits."""
    step_tokens: PositiveInt = 128
    """Maximum number of tokens per step (code: 128 for mathematics, 32 for multiple choice). A
    longer step is cut, and the next one continues it."""
    outcome: OutcomeConfig = OutcomeConfig()
    rollouts: NonNegativeInt = 1
    """Minimum number of scored rollouts (completions to the end) that value an unfinished step. A
    step that was sampled several times has one for each. Ours: the paper uses self-evaluation only,
    and without it a step would have no value until a completion ends."""
    self_evaluation: SelfEvaluationConfig | None = None
    """The policy's judgment of its own steps (paper: on). Ours: off, because a policy that was not
    trained to judge gives little information."""
    inject_gold: bool = False
    """A LEAK: add the steps of the reference answer to the tree, where it contains a step_stop. The
    policy is then trained on text that it did not generate. The authors' code does so by
    default."""

    reference: ReferenceSchedule = InitialReference()
    """Schedule of the reference (code: the initial policy)."""

    @property
    def virtual_loss(self) -> float:
        """Outcome of a wrong completion."""
        return self.outcome.wrong

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a thinking model, a scorer that only compares, and what turns cannot have.

        Raises ConfigError.
        """
        refuse_thinking(campaign, "it searches over the steps of a text without thinking")
        refuse_pairwise(campaign, "scores completions one by one")
        if self.rollouts == 0:
            refuse_over_turns(campaign, "rollouts: 0", "only the end of an episode values a turn")
        if self.self_evaluation is not None:
            refuse_over_turns(campaign, "self_evaluation", "the critic reads a text without turns")
        if self.inject_gold:
            refuse_over_turns(campaign, "inject_gold", "the reference answer has no turns")


def refuse_over_turns(campaign: CampaignConfig, setting: str, reason: str) -> None:
    """Raise ConfigError for a setting that a search over turns cannot have."""
    if campaign.environment:
        raise ConfigError(
            f"algorithm.{setting} cannot be used beside an environment: {reason}; leave it out"
        )


class MCTSDPOConfig(StepPairSettings, TreeSearchConfig):
    """Preferences between sibling steps of a Monte Carlo tree, trained with DPO."""

    type: str = "mcts_dpo"
    loss: Annotated[PairLossConfig, LOSSES.defaulting("sigmoid")] = SigmoidConfig()
    """A preference loss (paper: sigmoid; beta 0.1 is from the code's scripts, which also have
    ipo)."""
    importance: ImportanceConfig = ImportanceConfig()

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        loss = LOSSES.resolve(self.loss.type)
        if self.labels == "soft" and not loss.accepts_soft_labels:
            raise ValueError(
                f"labels: soft needs a loss that accepts them, for example sigmoid, got "
                f"{self.loss.type}; set labels to hard"
            )
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse chains of turns, too. Raises ConfigError."""
        super().check_campaign(campaign)
        if self.merge_chains:
            refuse_over_turns(campaign, "merge_chains", "replies stand between the turns")
