r"""Competition mathematics: MATH-500 (Hendrycks et al. 2021, 2103.03874; Lightman et al. 2023).

math_verify compares as lm-evaluation-harness' metric of that name does: math-verify's parse() of
the reference solution and of the whole completion, then its verify(). boxed is stricter: the last
\boxed{} (or else the last formula or number) against the reference answer, with the equivalence of
the rule rayhf.scorer.math_rules:math_equal.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rayhf.config.suites import SuiteConfig
from rayhf.evaluation.suites.base import Suite

_BOXED = "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


class MathConfig(SuiteConfig):
    """Rows with `problem`, `answer` and `solution`."""

    type: str = "math"


class Math(Suite):
    r"""Competition mathematics: equivalence of the answer in \boxed{} by math-verify."""

    Config = MathConfig
    dataset: ClassVar[Mapping[str, Any] | None] = {
        "type": "hub",
        "dataset": "HuggingFaceH4/MATH-500",
        "split": "test",
    }
    columns: ClassVar[Mapping[str, Any]] = {
        "template": "{{ problem }}\n\nReason step by step, and put your final answer within "
        "\\boxed{}.",
    }
    functions: ClassVar[Mapping[str, str]] = {
        "math_verify": "rayhf.evaluation.suites.math:math_verify",
        "boxed": "rayhf.scorer.math_rules:math_equal",
    }

    def answer(self, text: str) -> str | None:
        r"""Return the text of the last \boxed{}, without white space."""
        found = last_boxed(text)
        return None if found is None else re.sub(r"\s+", "", found) or None


def math_verify(completion: str, *, reference_answer: str | None, row: dict[str, Any]) -> float:
    """Return 1.0 where math-verify finds the completion equivalent to the reference solution.

    The solution is the row's `solution`, or else its answer. Raises ValueError for a reference that
    is no mathematics.
    """
    from math_verify import parse, verify

    # The library's limits of time count as wrong; the rule's limit makes the completion Failed.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reference = row.get("solution") or f"${reference_answer}$"
    gold = parse(str(reference), parsing_timeout=None)
    if not gold:
        raise ValueError(f"the reference is no mathematics: {reference!r:.60}")
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{} contains; None without one."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth = 1
        for match in _BRACES.finditer(text, start + len(_BOXED)):
            depth += {"{": 1, "}": -1}.get(match.group(), 0)
            if depth == 0:
                return text[start + len(_BOXED) : match.start()]
        end = start
    return None
