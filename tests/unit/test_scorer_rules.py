"""The ready rules, as functions."""

from __future__ import annotations

import time

import pytest

from rayhf.scorer.rules import exact_match, final_number


def judge(completion: str, answer: str | None) -> float:
    return final_number(completion, prompt="", answer=answer, finish_reason="stop")


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("The answer is 42.", "42", 1.0),
        ("first 41, then 42", "41", 0.0),
        ("1,250.00 dollars", "1250", 1.0),
        ("1250", "1,250", 1.0),
        ("one of 1,2,3", "3", 1.0),
        ("one of 1,2,3", "123", 0.0),
        ("x = 10-5", "5", 1.0),
        ("it is -5", "-5", 1.0),
        ("it is -5", "5", 0.0),
        ("(-5)", "-5", 1.0),
        ("0.10", "0.1", 1.0),
        ("3.0000000000000000000000001", "3", 0.0),
        ("1e3", "1000", 1.0),
        ("1e999999999999", "5", 0.0),
        ("$5 per kg", "5", 1.0),
        ("no number here", "5", 0.0),
        ("", "5", 0.0),
        ("__import__('os').getpid()", "5", 0.0),
        ("٤٢", "42", 0.0),
    ],
)
def test_final_number(completion: str, answer: str, score: float) -> None:
    assert judge(completion, answer) == score


@pytest.mark.parametrize("answer", [None, "", "forty", "1 or 2", "1/2"])
def test_final_number_needs_an_answer(answer: str | None) -> None:
    with pytest.raises(ValueError, match="answer"):
        judge("42", answer)


@pytest.mark.parametrize("text", ["9" * 1_000_000, "1," * 500_000, "1,111" * 200_000, "-" * 1_000_000, "1.1" * 300_000])
def test_final_number_is_linear_in_the_text(text: str) -> None:
    start = time.monotonic()
    judge(text, "5")
    assert time.monotonic() - start < 2.0


def test_exact_match() -> None:
    assert exact_match(" yes\n", prompt="", answer="yes", finish_reason="stop") == 1.0
    assert exact_match("Yes", prompt="", answer="yes", finish_reason="stop") == 0.0
    with pytest.raises(ValueError, match="no answer"):
        exact_match("yes", prompt="", answer=None, finish_reason="stop")
