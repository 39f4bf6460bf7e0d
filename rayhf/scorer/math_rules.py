r"""Mathematical equivalence, `function: rayhf.scorer.math_rules:math_equal`.

In: a completion's text and the prompt's reference answer. Out: 1.0 or 0.0. The last formula or
number of the completion counts (in \boxed{}, in $...$, or plain), compared as a value: 1/2, 0.5,
50\% and \frac{2}{4} are equal. The time limits of the library (math-verify) are off, because they
turn "too late" into "wrong": the rule's time limit makes it Failed.
"""

from __future__ import annotations

import logging
from functools import lru_cache

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


def math_equal(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where the completion's last formula or number equals the reference answer.

    A completion without one is wrong. Raises ValueError for a prompt whose reference answer is
    missing or is no mathematics, and whatever the library raises.
    """
    if reference_answer is None:
        raise ValueError("the prompt has no reference answer")
    reference = list(_parse_reference(reference_answer))
    return float(verify(reference, _parse(completion), timeout_seconds=None, raise_on_error=True))


@lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> tuple[object, ...]:
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer.strip()}$"
    expressions = _parse(marked)
    if not expressions:
        raise ValueError(f"the reference answer is no mathematics: {answer!r:.60}")
    return tuple(expressions)


def _parse(text: str) -> list[object]:
    """Return parsed expressions only: the library's fallback would compare text."""
    expressions: list[object] = parse(
        text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return expressions
