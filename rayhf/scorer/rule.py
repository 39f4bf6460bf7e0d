"""Rule functions of the user, run in a child process that may hang, crash or grow without harm to
the campaign.

In: ScoreRequests. Out: one Outcome per completion (Rule), or one verdict per pair of completions
(PairwiseRule). Calls are pipelined to the child (rule_process.py) over a pipe and answered in
order. Whoever is first in the queue is the one being judged: it alone is Failed when no answer
comes within the time limit or the child dies; a fresh child goes on behind it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from rayhf.errors import ConfigError
from rayhf.scorer.comparisons import Pair, compare_pairs, compare_scores, mean_wins
from rayhf.scorer.rule_process import (
    DEFAULT_LIMITS,
    ONE,
    TWO,
    Child,
    LostError,
    ProcessLimits,
    Signature,
)
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
"""Calls in a row that may hang or kill the child before the rest is given up."""


class _RuleProcess:
    """One function of the user in its own process. One caller at a time.

    Args:
        function: `module:function`, called with `signature`. `prompt` is the content of the last
        user message. base: first on the child's sys.path, and its working directory.

    Raises ConfigError where the function cannot be imported or called.
    """

    signature = ONE

    def __init__(
        self, function: str, *, base: Path, limits: ProcessLimits = DEFAULT_LIMITS
    ) -> None:
        self._function, self._base, self._limits = function, base, limits
        self._child: Child | None = self._start()
        if not self._child.apart:
            logger.warning(
                "rule %s: the kernel gives it no namespace of its own; it has its user's network and processes",
                function,
            )
        self.fingerprint = self._child.fingerprint
        """SHA-256 of the module's source file, as first loaded."""

    def _call(self, calls: Sequence[tuple[Prompt, tuple[Completion, ...]]]) -> list[Outcome]:
        """What the function says of each, in order. Never raises for one that the function cannot
        judge."""
        lines = [
            _encode(number, prompt, shown, self.signature)
            for number, (prompt, shown) in enumerate(calls)
        ]
        outcomes: list[Outcome] = []
        lost = 0
        try:
            while len(outcomes) < len(lines) and lost < MAX_LOST:
                before = len(outcomes)
                alive = self._judge(lines, outcomes)
                lost = 0 if alive else 1 if len(outcomes) > before + 1 else lost + 1
        except BaseException:
            self.close()  # answers may still be under way; the next call starts with a clean pipe
            raise
        if missing := len(lines) - len(outcomes):
            # A rule that hangs on everything would take timeout_s for each call of the round.
            last = outcomes[-1]
            reason = last.reason if isinstance(last, Failed) else ""
            outcomes.extend(
                [Failed(reason=f"not judged, {lost} in a row were lost: {reason}")] * missing
            )
        return outcomes

    def close(self) -> None:
        """Kill the child. A later call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _judge(self, lines: list[bytes], outcomes: list[Outcome]) -> bool:
        """Append outcomes until all are there (True), or the child is lost, which costs the call it
        was at (False)."""
        try:
            child = self._live_child()
        except (ConfigError, OSError) as error:
            reason = f"the rule's process could not be started again: {error}"
            outcomes.extend([Failed(reason=reason)] * (len(lines) - len(outcomes)))
            return True
        try:
            for kind, value in child.answers(
                lines, first=len(outcomes), timeout_s=self._limits.timeout_s
            ):
                if kind == "scored":
                    outcomes.append(Scored(value=value))
                elif kind == "invalid":
                    outcomes.append(Invalid(reason=value))
                elif kind in ("failed", "unreachable"):
                    outcomes.append(Failed(reason=value, transient=kind == "unreachable"))
                else:
                    raise LostError(value)
        except LostError as lost:
            logger.warning("rule %s: %s; starting a fresh process", self._function, lost)
            outcomes.append(Failed(reason=str(lost)))
            self.close()
            return False
        return True

    def _live_child(self) -> Child:
        if self._child is not None and not self._child.alive():
            self.close()
        if self._child is None:
            child = self._start()
            if child.fingerprint != self.fingerprint:
                child.kill()
                raise ConfigError(
                    f"the source of {self._function} changed since the scorer started"
                )
            self._child = child
        return self._child

    def _start(self) -> Child:
        return Child(self._function, self.signature, base=self._base, limits=self._limits)


class Rule(_RuleProcess):
    """`function(completion, *, prompt, answer, finish_reason) -> float`: a score for each
    completion."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion, in order. Never raises for a completion that the rule cannot
        judge."""
        outcomes = iter(
            self._call(
                [
                    (request.prompt, (completion,))
                    for request in requests
                    for completion in request.completions
                ]
            )
        )
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Sigmoids of score differences."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]


class PairwiseRule(_RuleProcess):
    """`function(first, second, *, prompt, answer) -> float`: the probability that the first text is
    better than the second.

    Asked once for each i < j and mirrored; equal texts are 1/2 and nobody is asked. A number
    outside [0, 1] is Invalid.
    """

    signature = TWO

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """One matrix per request, NaN for a pair that the rule cannot judge."""
        pairs = [list(combinations(range(len(request.completions)), 2)) for request in requests]
        verdicts: list[dict[Pair, float | Invalid | Failed]] = [
            dict.fromkeys(of_request, 0.5) for of_request in pairs
        ]
        asked: list[tuple[int, Pair]] = []
        calls: list[tuple[Prompt, tuple[Completion, ...]]] = []
        for index, (request, of_request) in enumerate(zip(requests, pairs, strict=True)):
            for i, j in of_request:
                if request.completions[i].text != request.completions[j].text:
                    asked.append((index, (i, j)))
                    calls.append((request.prompt, (request.completions[i], request.completions[j])))
        for (index, pair), outcome in zip(asked, self._call(calls), strict=True):
            verdicts[index][pair] = _probability(outcome)
        return [
            compare_pairs(len(request.completions), known)
            for request, known in zip(requests, verdicts, strict=True)
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Mean win probability against the request's other completions."""
        compared = zip(requests, self.compare(requests), strict=True)
        return [mean_wins(comparison, len(request.completions)) for request, comparison in compared]


def _probability(outcome: Outcome) -> float | Invalid | Failed:
    if not isinstance(outcome, Scored):
        return outcome
    if not 0.0 <= outcome.value <= 1.0:
        return Invalid(reason=f"the rule returned {outcome.value:g}, not a probability")
    return outcome.value


def check_function(function: str, *, base: Path, signature: Signature = ONE) -> None:
    """Import the function in a child, as Rule will. Raises ConfigError with one line that names
    module and function."""
    Child(function, signature, base=base, limits=DEFAULT_LIMITS).kill()


def _encode(
    number: int, prompt: Prompt, shown: Sequence[Completion], signature: Signature
) -> bytes:
    messages = [dict(message) for message in prompt.messages]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    known = {
        "prompt": contents[-1] if contents else messages[-1]["content"],
        "answer": prompt.answer,
        "finish_reason": shown[0].finish_reason,
    }
    context = {keyword: known[keyword] for keyword in signature.keywords}
    request = [number, [completion.text for completion in shown], context, messages]
    # Not ascii: escapes would join a lone pair of surrogates into one character on the other side.
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
