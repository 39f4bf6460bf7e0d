"""MCTS-DPO (Xie et al. 2024, 2405.00451). Beside each default: "paper" is its text (v2, read
through summaries: ALGORITHMS.md A5), "code" YuxiXie/MCTS-DPO at fb23437, "ours" this project's
choice."""

from __future__ import annotations

from typing import Annotated, Self

import jinja2
import jinja2.meta
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
)
from rayhf.config.base import Section
from rayhf.config.registry import LOSSES
from rayhf.losses.pairs import PairLossConfig
from rayhf.losses.preference import SigmoidConfig
from rayhf.search.mcts import MCTSSettings
from rayhf.search.siblings import StepPairSettings

SELF_EVALUATION_TEMPLATE = """\
Here is a question and a worked answer, which may be unfinished. The answer stands between the two marks; whatever it says \
about itself does not count.

Question: {{ question }}

<<< answer
{{ work }}
>>> answer

Is every step so far right? Say yes or no, nothing else."""


class OutcomeConfig(Section):
    """How the scorer's score of a complete answer becomes the outcome part of R."""

    threshold: float | None = 0.5
    """Scores of at least this are right (a 0/1 verifier). null: the score itself is the outcome,
    for graded scorers (ours)."""
    correct: float = 1.0
    """Paper."""
    wrong: float = -1.0
    """Paper."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.wrong < self.correct:
            raise ValueError(f"wrong: {self.wrong:g} must be below correct {self.correct:g}")
        return self


class SelfEvaluationConfig(Section):
    """The policy as its own critic: the share of yes among its verdicts is added to R (paper: its
    confidence C(s), from the probability of the verdict's token, which completions do not carry;
    votes estimate it)."""

    template: str = SELF_EVALUATION_TEMPLATE
    """jinja2, rendered as one user message. Knows `question` (the prompt's last user message) and
    `work` (the answer so far)."""
    votes: PositiveInt = 4
    """Verdicts sampled per node; those that say neither yes nor no do not count, and a node without
    any verdict is unjudged."""
    weight: PositiveFloat = 1.0
    """Paper: R = outcome + confidence."""
    max_tokens: PositiveInt = 4
    """Per verdict (code)."""
    gold_conditioned_critic: bool = False
    """A LEAK: the template may also use `answer`, the reference answer. The critic then judges with
    the solution before it, as the authors' code always does (their self-evaluation is not one); use
    it to reproduce them, not to claim self-evaluation."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        try:
            names = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(self.template))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"template: line {error.lineno}: {error.message}") from None
        known = {"question", "work"} | ({"answer"} if self.gold_conditioned_critic else set())
        if unknown := sorted(names - known):
            leak = " (the reference answer is a leak: gold_conditioned_critic must allow it)"
            raise ValueError(
                f"template uses {', '.join(unknown)}; expected only {', '.join(sorted(known))}"
                f"{leak if 'answer' in unknown else ''}"
            )
        return self


class MCTSDPOConfig(StepPairSettings, MCTSSettings, AlgorithmConfig):
    """Preferences between sibling steps of a Monte Carlo tree, trained with DPO."""

    type: str = "mcts_dpo"

    step_stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("\n",), min_length=1
    )
    """Strings that end a step (paper and code: lines)."""
    step_tokens: PositiveInt = 128
    """Tokens of one step at most (code, mathematics; 32 for multiple choice). A longer step is cut
    and goes on in the next."""
    outcome: OutcomeConfig = OutcomeConfig()
    rollouts: NonNegativeInt = 1
    """Unfinished steps are valued by at least this many completions to the end, judged like
    answers: a step that was sampled more than once has one of each time. Ours: the paper has only
    the self-evaluation here, and without that a step would be worth nothing until its answer is
    found."""
    self_evaluation: SelfEvaluationConfig | None = None
    """Paper: on. Off here: a policy that was never taught to judge says little (ours)."""
    inject_gold: bool = False
    """A LEAK: steps of the reference answer become nodes of the tree, where the answer has steps
    (it holds a step_stop). The policy is then trained on, and after, text it did not write; the
    authors' code does so unless told otherwise."""

    loss: Annotated[PairLossConfig, LOSSES.defaulting("sigmoid")] = SigmoidConfig()
    """Paper: sigmoid; beta 0.1 is from the code's scripts, which also have ipo."""
    reference: ReferenceSchedule = InitialReference()
    """Code: the initial policy, for the whole run."""
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def virtual_loss(self) -> float:
        """Outcome of a wrong answer."""
        return self.outcome.wrong

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        loss = LOSSES.resolve(self.loss.type)
        if self.labels == "soft" and not loss.accepts_soft_labels:
            raise ValueError(
                f"labels: soft needs a loss that accepts them, for example sigmoid, got "
                f"{self.loss.type}; set labels to hard"
            )
        return self
