"""GSM8K: grade school mathematics with an integer as the answer (Cobbe et al. 2021, 2110.14168).

The two metrics are those of lm-evaluation-harness' task gsm8k: strict_match takes the number after
the first "#### ", flexible_extract the last number anywhere. The prompt there is a base model's,
with five examples; this one asks a chat model without examples, so that only figures with equal
prompts are comparable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rayhf.config.suites import SuiteConfig
from rayhf.evaluation.suites.base import Suite

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))
"""Removed from both sides before they are compared."""


class GSM8KConfig(SuiteConfig):
    """Rows with `question` and `answer`."""

    type: str = "gsm8k"


class GSM8K(Suite):
    """Grade school mathematics: strict and flexible exact match of the final number."""

    Config = GSM8KConfig
    dataset: ClassVar[Mapping[str, Any] | None] = {
        "type": "hub",
        "dataset": "openai/gsm8k",
        "config": "main",
        "split": "test",
    }
    columns: ClassVar[Mapping[str, Any]] = {
        "template": "{{ question }}\n\nThink step by step. End with a line of this form, with the "
        "answer as a number: #### 42",
    }
    functions: ClassVar[Mapping[str, str]] = {
        "strict_match": "rayhf.evaluation.suites.gsm8k:strict_match",
        "flexible_extract": "rayhf.evaluation.suites.gsm8k:flexible_extract",
    }

    def answer(self, text: str) -> str | None:
        """Return the last number, as flexible_extract reads it."""
        return None if (found := last_number(text)) is None else normalized(found)


def strict_match(completion: str, *, reference_answer: str) -> float:
    """Return 1.0 where the number after the first "#### " is the reference's."""
    found = _STRICT.search(completion)
    return float(found is not None and _equal(found[1], reference_answer))


def flexible_extract(completion: str, *, reference_answer: str) -> float:
    """Return 1.0 where the last number is the reference's."""
    found = last_number(completion)
    return float(found is not None and _equal(found, reference_answer))


def last_number(text: str) -> str | None:
    """Return the last run of digits, signs of money, points and commas; None without one."""
    matches = _FLEXIBLE.findall(text)
    return next(group for group in matches[-1] if group).strip() if matches else None


def normalized(text: str) -> str:
    """Return a number without thousands separators, signs of money, and a final point."""
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _equal(found: str, reference: str) -> bool:
    return normalized(found) == normalized(reference)
