"""The ready-made rules, as functions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from score_requests import make_rule, request

from rayhf.scorer.math_rules import math_equal
from rayhf.scorer.rules import exact_match, final_number, regex_match, regex_search
from rayhf.types import Failed, Scored


def check(completion: str, answer: str | None) -> float:
    return final_number(completion, prompt="", reference_answer=answer, finish_reason="stop")


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
        ("The answer is \u22125", "-5", 1.0),
        ("The answer is \u22125", "5", 0.0),
        ("it is \u20135", "-5", 1.0),
        ("pages 3\u20135", "5", 1.0),
        ("x = -.5", "-0.5", 1.0),
        (".5", "0.5", 1.0),
        ("0.5", ".5", 1.0),
        (r"it costs \$18.90", "18.90", 1.0),
        ("it costs $1,018.90", r"\$1018.90", 1.0),
        ("50%", "50%", 1.0),
        (r"50\%", "50", 1.0),
    ],
)
def test_final_number(completion: str, answer: str, score: float) -> None:
    assert check(completion, answer) == score


@pytest.mark.parametrize("answer", [None, "", "forty", "1 or 2", "1/2", "12:00", "nan"])
def test_final_number_needs_an_answer(answer: str | None) -> None:
    with pytest.raises(ValueError, match="answer"):
        check("42", answer)


@pytest.mark.parametrize(
    "text", ["9" * 1_000_000, "1," * 500_000, "1,111" * 200_000, "-" * 1_000_000, "1.1" * 300_000]
)
def test_final_number_is_linear_in_the_text(text: str) -> None:
    start = time.process_time()
    check(text, "5")
    assert time.process_time() - start < 2.0


def test_exact_match() -> None:
    assert exact_match(" yes\n", prompt="", reference_answer="yes", finish_reason="stop") == 1.0
    assert exact_match("Yes", prompt="", reference_answer="yes", finish_reason="stop") == 0.0
    with pytest.raises(ValueError, match="no reference answer"):
        exact_match("yes", prompt="", reference_answer=None, finish_reason="stop")


def test_regular_expressions() -> None:
    for completion, answer, found, whole in (
        ("it is red", r"r.d\b", 1.0, 0.0),
        (" red\n", r"r.d", 1.0, 1.0),
        ("blue", r"r.d", 0.0, 0.0),
        ("", r".*", 1.0, 1.0),
    ):
        assert (
            regex_search(completion, prompt="", reference_answer=answer, finish_reason="stop")
            == found
        )
        assert (
            regex_match(completion, prompt="", reference_answer=answer, finish_reason="stop")
            == whole
        )
    for rule in (regex_search, regex_match):
        with pytest.raises(ValueError, match=r"no regular expression \(missing \), unterminated"):
            rule("x", prompt="", reference_answer="(", finish_reason="stop")
        with pytest.raises(ValueError, match="no reference answer"):
            rule("x", prompt="", reference_answer=None, finish_reason="stop")


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("The answer is 1/2", "0.5", 1.0),
        (r"So $\frac{2}{4}$ it is", "1/2", 1.0),
        (r"\boxed{50\%}", "1/2", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        ("$x^2+2x+1$", "(x+1)^2", 1.0),
        (r"$\{1,2\}$", r"\{2,1\}", 1.0),
        ("it is 3 or 4", "4", 1.0),
        ("it is 4 or 3", "4", 0.0),
        ("the answer is 0.333", "1/3", 0.0),
        ("no idea", "1/2", 0.0),
        ("", "4", 0.0),
        ('__import__("os").getpid()', "5", 0.0),
        (r"\boxed{\$18.90}", r"\$18.90", 1.0),
        (r"\boxed{18.90}", r"\$18.90", 1.0),
        (r"The cost is \$18.90", "18.90", 1.0),
        (r"\boxed{18}", "$18", 1.0),
        (r"\boxed{18}", "18 dollars", 1.0),
        (r"\boxed{1\,234}", "1,234", 1.0),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"First \boxed{1}. Wait, so \boxed{2}.", "2", 1.0),
        (r"First \boxed{1}. Wait, so \boxed{2}.", "1", 0.0),
        ("\\boxed{1}\n\\boxed{2}", "2", 1.0),
        (r"\boxed{7} and \boxed{8", "7", 1.0),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}", 1.0),
        (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}", 0.0),
        (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{99}}", 1.0),
        ("The answer is \u22125", "-5", 1.0),
        ("The answer is \u22125", "5", 0.0),
        (r"\boxed{.5}", "0.5", 1.0),
        ("0.5", ".5", 1.0),
        (r"\boxed{12:00}", "12:00", 1.0),
        ("at 11:30, no, 12:00", "12:00", 1.0),
        (r"\boxed{3{:}2}", "3:2", 1.0),
        (r"\boxed{1:00}", "12:00", 0.0),
    ],
)
def test_math_equal(completion: str, answer: str, score: float) -> None:
    assert math_equal(completion, prompt="", reference_answer=answer, finish_reason="stop") == score


def test_math_equal_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="no reference answer"):
        math_equal("4", prompt="", reference_answer=None, finish_reason="stop")
    with pytest.raises(ValueError, match="no mathematics"):
        math_equal("4", prompt="", reference_answer=" ", finish_reason="stop")


def test_endless_math_is_failed_and_not_wrong(tmp_path: Path) -> None:
    rule = make_rule("rayhf.scorer.math_rules:math_equal", tmp_path, timeout_s=2.0)
    [(slow, right)] = rule.score([request("$9^{9^{9^{9}}}$", "4")])
    rule.close()
    assert isinstance(slow, Failed)
    assert right == Scored(value=1.0)
