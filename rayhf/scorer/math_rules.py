r"""Mathematical equivalence for `scorer.train[].function`: `rayhf.scorer.math_rules:math_equal`.
Needs the package math-verify.

In: a completion's text and the prompt's reference answer. Out: 1.0 or 0.0. What counts is the last
formula or number that the completion states (in \boxed{}, in $...$, or plain), compared as a value:
1/2, 0.5, 50\% and \frac{2}{4} are equal. The library's own time limits are off, because they turn
"too late" into "wrong": the rule's time limit makes it Failed.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


def math_equal(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 where the completion's last formula or number equals the answer; a completion without one
    is wrong.

    Raises ValueError for a prompt whose answer is missing or is no mathematics, and whatever the
    library raises.
    """
    if answer is None:
        raise ValueError("the prompt has no answer")
    return float(
        verify(list(_gold(answer)), _parse(completion), timeout_seconds=None, raise_on_error=True)
    )


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer.strip()}$"
    found = _parse(marked)
    if not found:
        raise ValueError(f"the answer is no mathematics: {answer!r:.60}")
    return tuple(found)


def _parse(text: str) -> list[Any]:
    """Parsed expressions only: the library's fallback would compare unparsable ones as text."""
    found: list[Any] = parse(
        text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return found
