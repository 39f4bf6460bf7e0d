"""Ready rule functions for `scorer.train[].function`, for example
`rayhf.scorer.rules:final_number`.

In: a completion's text and the prompt's reference answer. Out: 1.0 or 0.0. A prompt without a
usable answer raises, so that the completion counts as Failed and never as wrong. Text is compared,
never evaluated; time is linear in its length, but for the regular expressions, which are yours: the
rule's time limit ends one that runs away.

Others: rayhf.scorer.math_rules:math_equal, rayhf.scorer.constraints:{all_constraints,
share_of_constraints}.
"""

from __future__ import annotations

import re
from decimal import Decimal

# A sign only where no word or bracket stands before it ("10-5" ends in 5); thousands separators
# only in groups of three; the exponent is bounded so that a number stays cheap to compare.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3}(?!\d))?",
    re.ASCII | re.IGNORECASE,
)


def exact_match(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 where completion and answer are the same text, surrounding white space aside.

    Raises ValueError for a prompt without an answer.
    """
    return float(completion.strip() == _required(answer).strip())


def final_number(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 where the last number in the text equals the answer as a number ("1,250.0" equals
    "1250").

    Raises ValueError for a prompt whose answer is missing or is not one number.
    """
    text = _required(answer).strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"the answer is not a number: {text[:40]!r}")
    last = ""
    for found in _NUMBER.finditer(completion):
        last = found.group()
    return float(bool(last) and _value(last) == _value(text))


def regex_search(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 where the answer, a Python regular expression, matches somewhere in the completion.

    Raises ValueError for a prompt whose answer is missing or is no regular expression.
    """
    return float(_pattern(answer).search(completion) is not None)


def regex_match(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 where the answer, a Python regular expression, matches the whole completion, surrounding
    white space aside.

    Raises ValueError for a prompt whose answer is missing or is no regular expression.
    """
    return float(_pattern(answer).fullmatch(completion.strip()) is not None)


def _pattern(answer: str | None) -> re.Pattern[str]:
    try:
        return re.compile(_required(answer))
    except re.error as error:
        raise ValueError(f"the answer is no regular expression ({error}): {answer!r:.60}") from None


def _required(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the prompt has no answer")
    return answer


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
