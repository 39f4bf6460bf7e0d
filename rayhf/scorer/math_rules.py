r"""Mathematical equivalence, `function: rayhf.scorer.math_rules:math_equal`.

In: a completion's text and the prompt's reference answer. Out: 1.0 or 0.0. The completion's answer
is its last \boxed{}, or else what follows "the answer is", or else its last formula or number (in
$...$, or plain), compared as a value: 1/2, 0.5, 50\% and \frac{2}{4} are equal; signs of money
count for nothing. A reference answer like 12:00 or 3:2 is compared as text. The time limits of the
library (math-verify) are off: they turn "too late" into "wrong", where the rule's makes it Failed.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rayhf.scorer.rules import plain_signs

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_COLON = re.compile(r"(?<![\d:])\d+(?::\d+)+(?![\d:])")
"""A time of day, a duration, a ratio."""
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_MONEY = re.compile(r"\\?[$€£¥]\s*(?=[-+]?[\d.])")
_UNIT = re.compile(rf"({_NUMBER.pattern})\s+[^\W\d_]+")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!; ]|\{,\}(?:\\!)?)(?=\d{3}(?!\d))")
_LEADING_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
_SMALL = 1e-5
"""Below it, numbers are compared by their ratio: the library compares differences to 15 digits."""
_RATIO_TOLERANCE = 1e-6


def math_equal(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where the completion's last formula or number equals the reference answer.

    A completion without one is wrong. Raises ValueError for a prompt whose reference answer is
    missing or is no mathematics, and whatever the library raises.
    """
    answer = _answer_of(plain_signs(completion))
    reference = _reference(reference_answer)
    if isinstance(reference, str):
        found = _COLON.findall(answer.replace("{:}", ":"))
        return float(bool(found) and found[-1] == reference)
    given = _parse(answer)
    equal = verify(list(reference), given, timeout_seconds=None, raise_on_error=True)
    return float(equal and _same_magnitude(reference, given))


def _reference(answer: str | None) -> str | tuple[Any, ...]:
    """Return the expressions of a reference answer, or a text that is compared as it is."""
    if answer is None:
        raise ValueError("the prompt has no reference answer")
    return _parse_reference(answer)


math_equal.check_reference_answer = _reference  # type: ignore[attr-defined]  # for `rayhf check`


@lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> str | tuple[Any, ...]:
    text = plain_signs(answer).strip()
    if _COLON.fullmatch(text):
        return text
    if "\\boxed" in text:
        text = _answer_of(text)
    elif "$" in _MONEY.sub("", text):  # formulas between dollar signs
        text = _without_money(text)
    else:
        text = _MONEY.sub("", text)
        unit = _UNIT.fullmatch(text)
        text = f"${_plain_numbers(unit[1] if unit else text)}$"
    expressions = _parse(text)
    if not expressions:
        raise ValueError(f"the reference answer is no mathematics: {answer!r:.60}")
    return tuple(expressions)


def _answer_of(text: str) -> str:
    r"""Return the last complete \boxed{}, or else the text."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        closed = _closing_brace(text, start + len("\\boxed{"))
        if closed is not None:
            content = text[start + len("\\boxed{") : closed]
            return f"\\boxed{{{_plain_numbers(_MONEY.sub('', content))}}}"
        end = start
    return _plain_numbers(_without_money(text))


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _without_money(text: str) -> str:
    r"""Drop \$ before numbers: it stands for the sign, where $ alone may begin a formula."""
    return re.sub(r"\\\$\s*(?=[-+]?[\d.])", "", text)


def _plain_numbers(text: str) -> str:
    r"""Write numbers as the library reads them: 1234 and 0.5 for 1\,234 and .5."""
    return _LEADING_POINT.sub("0.", _SPACED_THOUSANDS.sub("", text))


def _same_magnitude(reference: tuple[Any, ...], given: list[Any]) -> bool:
    """Return whether two tiny numbers are equal up to rounding; True for others."""
    first = reference[0]
    second = given[0]
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return True
    size = abs(first.evalf())
    if not (size.is_comparable and 0 < size < _SMALL):
        return True
    return bool(abs((second / first).evalf() - 1) < _RATIO_TOLERANCE)


def _parse(text: str) -> list[Any]:
    """Return parsed expressions only: the library's fallback would compare text."""
    expressions: list[Any] = parse(
        text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return expressions
