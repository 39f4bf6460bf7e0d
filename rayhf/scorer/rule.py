"""Rules: the user's functions, in processes that may hang, crash or grow without harm.

In: ScoreRequests. Out: one Outcome per completion (Rule), or one verdict per pair of completions
(PairwiseRule). rule_pool.py divides the calls among processes, rule_arguments.py gives a function
what its parameters name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from rayhf.scorer.comparisons import Pair, Problem, compare_pairs
from rayhf.scorer.protocol import BaseScorer, PairwiseScorer, PointwiseScorer, ScorerSetup
from rayhf.scorer.rule_arguments import Call
from rayhf.scorer.rule_check import check_rule
from rayhf.scorer.rule_config import FunctionEntryConfig, PairwiseRuleConfig, RuleConfig
from rayhf.scorer.rule_pool import RulePool
from rayhf.scorer.rule_process import Child
from rayhf.types import Comparison, Invalid, Outcome, Prompt, Scored, ScoreRequest

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=FunctionEntryConfig)


class _FunctionScorer(BaseScorer[F]):
    """A user's function in processes of its own, restarted where one was lost.

    `setup.base` is last on their sys.path, and their working directory. Raises ConfigError where
    the function cannot be imported or called.
    """

    def __init__(self, config: F, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        style = self.style(config)
        self.pool = RulePool(
            config.function,
            lambda: Child(config, style, base=setup.base),
            workers=config.workers,
            concurrency=config.concurrency,
            conversational=getattr(config, "conversational", None),
        )
        if self.pool.unprotected:
            logger.warning("rule %s: %s", config.function, self.pool.unprotected)

    @classmethod
    def style(cls, config: F) -> str:
        """Return the style of the function's parameters; "" to recognize it."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: F, base: Path) -> None:
        """Import the function in a child process. Raises ConfigError naming module and function."""
        cls.check_prompts(config, base, ())

    @classmethod
    def check_prompts(cls, config: F, base: Path, prompts: Sequence[Prompt]) -> str:
        """Check also what the prompts must provide; return how the function is called.

        Raises ConfigError for a parameter without a value, and for reference answers that the
        function cannot use.
        """
        return check_rule(config, cls.style(config), base, prompts)

    def close(self) -> None:
        """End the processes."""
        self.pool.close()


class Rule(_FunctionScorer[RuleConfig], PointwiseScorer[RuleConfig]):
    """A Python function that scores each completion."""

    Config = RuleConfig

    @classmethod
    def style(cls, config: RuleConfig) -> str:
        """Return the configured style."""
        return config.style or ""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion, in order."""
        calls: list[Call] = [
            (request.prompt, (completion,))
            for request in requests
            for completion in request.completions
        ]
        outcomes = iter(self.pool.run(calls, batch=self.config.batch))
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]


class PairwiseRule(_FunctionScorer[PairwiseRuleConfig], PairwiseScorer[PairwiseRuleConfig]):
    """A Python function that compares two completions.

    It is called once for each i < j and mirrored; equal texts are 1/2 without a call. A number
    outside [0, 1] is Invalid.
    """

    Config = PairwiseRuleConfig

    @classmethod
    def style(cls, config: PairwiseRuleConfig) -> str:
        """Return the only style of functions that compare."""
        return "pairwise"

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return one matrix per request, NaN for a pair without a verdict."""
        verdicts: list[dict[Pair, float | Problem]] = []
        calls: list[Call] = []
        positions: list[tuple[int, Pair]] = []  # request and pair of each call
        for index, request in enumerate(requests):
            pairs = list(combinations(range(len(request.completions)), 2))
            verdicts.append(dict.fromkeys(pairs, 0.5))
            for i, j in pairs:
                first = request.completions[i]
                second = request.completions[j]
                if first.text != second.text:
                    calls.append((request.prompt, (first, second)))
                    positions.append((index, (i, j)))
        for (index, pair), outcome in zip(positions, self.pool.run(calls), strict=True):
            verdicts[index][pair] = _probability(outcome)
        return [
            compare_pairs(len(request.completions), known)
            for request, known in zip(requests, verdicts, strict=True)
        ]


def _probability(outcome: Outcome) -> float | Problem:
    if not isinstance(outcome, Scored):
        return outcome
    if not 0.0 <= outcome.value <= 1.0:
        return Invalid(reason=f"the rule returned {outcome.value:g}, not a probability")
    return outcome.value
