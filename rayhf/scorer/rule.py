"""Rules: the user's functions, in a child process that may hang, crash or grow without harm.

In: ScoreRequests. Out: one Outcome per completion (Rule), or one verdict per pair of completions
(PairwiseRule). Calls are pipelined to the child (rule_process.py) over a pipe and answered in
order. When no response arrives within the time limit, or the child exits, only the first call
without a response is Failed; a fresh child continues with the next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rayhf.config.scorers import PairwiseEntryConfig, PointwiseEntryConfig
from rayhf.errors import ConfigError
from rayhf.scorer.comparisons import Pair, Problem, compare_pairs
from rayhf.scorer.protocol import BaseScorer, PairwiseScorer, PointwiseScorer, ScorerSetup
from rayhf.scorer.rule_process import Child, FunctionEntryConfig, LostError, Signature
from rayhf.types import (
    Comparison,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
)

logger = logging.getLogger(__name__)

MAX_LOST = 3
"""Calls in a row that may hang or crash the child before the rest is given up."""

F = TypeVar("F", bound=FunctionEntryConfig)
Call = tuple[Prompt, tuple[Completion, ...]]
"""A prompt and the completions that one call of the function gets."""


class RuleConfig(FunctionEntryConfig, PointwiseEntryConfig):
    """A function `module:function` of a completion's text that returns its score."""

    type: str = "rule"


class PairwiseRuleConfig(FunctionEntryConfig, PairwiseEntryConfig):
    """A function `module:function(first, second, *, prompt, reference_answer) -> float`.

    It returns the probability that first is better. It is called once for each two completions of a
    prompt, the earlier one first; the other direction is one minus that.
    """

    type: str = "pairwise_rule"


class _FunctionScorer(BaseScorer[F]):
    """A user's function in a process of its own, restarted where it was lost. For one caller.

    `setup.base` is first on the process's sys.path, and its working directory. Raises ConfigError
    where the function cannot be imported or called.
    """

    signature: ClassVar[Signature]

    def __init__(self, config: F, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        self._child: Child | None = self._start()
        self._fingerprint = self._child.fingerprint
        if not self._child.apart:
            logger.warning(
                "rule %s: the kernel allows it no namespace of its own; it shares its user's "
                "network and processes",
                config.function,
            )

    @classmethod
    def check(cls, config: F, base: Path) -> None:
        """Import the function in a child process. Raises ConfigError naming module and function."""
        Child(config, cls.signature, base=base).kill()

    def close(self) -> None:
        """Kill the child. A later call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _call(self, calls: Sequence[Call]) -> list[Outcome]:
        """Return the function's results in order; never raise for one without a result."""
        lines = [
            _encode(number, prompt, completions, self.signature)
            for number, (prompt, completions) in enumerate(calls)
        ]
        outcomes: list[Outcome] = []
        lost = 0
        try:
            while len(outcomes) < len(lines) and lost < MAX_LOST:
                before = len(outcomes)
                if self._run(lines, outcomes):
                    lost = 0
                else:
                    lost = 1 if len(outcomes) > before + 1 else lost + 1
        except BaseException:
            self.close()  # responses may still arrive; the next call starts with a clean pipe
            raise
        if missing := len(lines) - len(outcomes):
            # A rule that hangs on everything would take timeout_s for each call of the iteration.
            last = outcomes[-1]
            reason = last.reason if isinstance(last, Failed) else ""
            outcomes.extend(
                [Failed(reason=f"skipped: {lost} calls in a row were lost: {reason}")] * missing
            )
        return outcomes

    def _run(self, lines: list[bytes], outcomes: list[Outcome]) -> bool:
        """Append outcomes until all are there (True) or the child is lost (False).

        A lost child costs the call that it was at.
        """
        try:
            child = self._live_child()
        except (ConfigError, OSError) as error:
            reason = f"the rule's process could not be restarted: {error}"
            outcomes.extend([Failed(reason=reason)] * (len(lines) - len(outcomes)))
            return True
        try:
            for status, value in child.call(
                lines, first=len(outcomes), timeout_s=self.config.timeout_s
            ):
                outcomes.append(_outcome(status, value))
        except LostError as lost:
            logger.warning("rule %s: %s; restarting its process", self.config.function, lost)
            outcomes.append(Failed(reason=str(lost)))
            self.close()
            return False
        return True

    def _live_child(self) -> Child:
        if self._child is not None and not self._child.is_alive():
            self.close()
        if self._child is None:
            child = self._start()
            if child.fingerprint != self._fingerprint:
                child.kill()
                raise ConfigError(
                    f"the source of {self.config.function} changed since the scorer started"
                )
            self._child = child
        return self._child

    def _start(self) -> Child:
        return Child(self.config, self.signature, base=self.setup.base)


class Rule(_FunctionScorer[RuleConfig], PointwiseScorer[RuleConfig]):
    """A Python function that scores each completion."""

    Config = RuleConfig
    signature = Signature(
        positional=("completion",), keywords=("prompt", "reference_answer", "finish_reason")
    )

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion, in order."""
        calls = [
            (request.prompt, (completion,))
            for request in requests
            for completion in request.completions
        ]
        outcomes = iter(self._call(calls))
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]


class PairwiseRule(_FunctionScorer[PairwiseRuleConfig], PairwiseScorer[PairwiseRuleConfig]):
    """A Python function that compares two completions.

    It is called once for each i < j and mirrored; equal texts are 1/2 without a call. A number
    outside [0, 1] is Invalid.
    """

    Config = PairwiseRuleConfig
    signature = Signature(positional=("first", "second"), keywords=("prompt", "reference_answer"))

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
        for (index, pair), outcome in zip(positions, self._call(calls), strict=True):
            verdicts[index][pair] = _probability(outcome)
        return [
            compare_pairs(len(request.completions), known)
            for request, known in zip(requests, verdicts, strict=True)
        ]


def _outcome(status: str, value: Any) -> Outcome:
    """Translate a response of the child. Raises LostError for one that calls for a restart."""
    match status:
        case "scored":
            return Scored(value=value)
        case "invalid":
            return Invalid(reason=value)
        case "failed" | "unreachable":
            return Failed(reason=value, transient=status == "unreachable")
    raise LostError(value)


def _probability(outcome: Outcome) -> float | Problem:
    if not isinstance(outcome, Scored):
        return outcome
    if not 0.0 <= outcome.value <= 1.0:
        return Invalid(reason=f"the rule returned {outcome.value:g}, not a probability")
    return outcome.value


def _encode(
    number: int, prompt: Prompt, completions: Sequence[Completion], signature: Signature
) -> bytes:
    messages = [dict(message) for message in prompt.messages]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    known = {
        "prompt": contents[-1] if contents else messages[-1]["content"],
        "reference_answer": prompt.reference_answer,
        "finish_reason": completions[0].finish_reason,
    }
    context = {keyword: known[keyword] for keyword in signature.keywords}
    request = [number, [completion.text for completion in completions], context, messages]
    # Not ascii: escapes would join a lone pair of surrogates into one character on the other side.
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
