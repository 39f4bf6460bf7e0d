"""Ready-made rule functions, for example `function: rayhf.scorer.rules:final_number`.

In: a completion's text and the prompt's reference answer. Out: 1.0 or 0.0. A prompt without a
usable reference answer raises, so that the completion counts as Failed and never as wrong. Text is
compared, never evaluated. Time is linear in its length, except for regular expressions, which come
from your data: the rule's time limit ends one that runs away.

More: rayhf.scorer.math_rules:math_equal, rayhf.scorer.constraints:all_constraints and
rayhf.scorer.constraints:share_of_constraints.
"""

from __future__ import annotations

import re
from decimal import Decimal

_MINUS = re.compile("[\u2212\u2013\ufe63\uff0d](?=\\s?[\\d.\\\\(])")
"""Minus signs that are not ASCII's: minus, en dash, small and full-width hyphen."""
_CURRENCY = re.compile(r"\\?[$€£¥]\s?(?=[-+]?[\d.])")
# A sign only where no word or bracket stands before it ("10-5" ends in 5); thousands separators
# only in groups of three; the exponent is bounded so that a number stays cheap to compare.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3}(?!\d))?",
    re.ASCII | re.IGNORECASE,
)


def exact_match(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where completion and reference answer are equal, outer white space aside.

    Raises ValueError for a prompt without a reference answer.
    """
    return float(completion.strip() == _required(reference_answer).strip())


def final_number(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where the last number in the text equals the reference answer as a number.

    "1,250.0" equals "1250"; signs of money and percent count for nothing. Raises ValueError for a
    prompt whose reference answer is missing or is not one number.
    """
    expected = _number(reference_answer)
    last = ""
    for match in _NUMBER.finditer(_CURRENCY.sub("", plain_signs(completion))):
        last = match.group()
    return float(bool(last) and _value(last) == expected)


def regex_search(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where the reference answer, a regular expression, matches in the completion.

    Raises ValueError for a prompt whose reference answer is missing or is no regular expression.
    """
    return float(_pattern(reference_answer).search(completion) is not None)


def regex_match(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where the reference answer, a regular expression, matches the whole completion.

    Outer white space aside. Raises ValueError for a prompt whose reference answer is missing or is
    no regular expression.
    """
    return float(_pattern(reference_answer).fullmatch(completion.strip()) is not None)


def plain_signs(text: str) -> str:
    """Return the text with a hyphen for every other minus sign that stands before a number."""
    return _MINUS.sub("-", text)


def _number(answer: str | None) -> Decimal:
    text = _CURRENCY.sub("", plain_signs(_required(answer)).strip())
    text = text.removesuffix("%").removesuffix("\\").strip()
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"the reference answer is not a number: {answer!r:.40}")
    return _value(text)


def _pattern(answer: str | None) -> re.Pattern[str]:
    try:
        return re.compile(_required(answer))
    except re.error as error:
        raise ValueError(
            f"the reference answer is no regular expression ({error}): {answer!r:.60}"
        ) from None


def _required(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the prompt has no reference answer")
    return answer


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


# Checked by `rayhf check`, before anything is generated.
exact_match.check_reference_answer = _required  # type: ignore[attr-defined]
final_number.check_reference_answer = _number  # type: ignore[attr-defined]
regex_search.check_reference_answer = _pattern  # type: ignore[attr-defined]
regex_match.check_reference_answer = _pattern  # type: ignore[attr-defined]
