"""Outcomes of any scorer, also of other packages', are bounded and can be stored."""

import numpy as np
import pytest
from score_requests import request

from rayhf.errors import clean_line, last_line, one_line
from rayhf.scorer.comparisons import check_comparisons, check_outcomes
from rayhf.types import Failed, Invalid, Scored


def checked(outcome):
    [(result,)] = check_outcomes([(outcome,)], [request("a")])
    return result


@pytest.mark.parametrize("value", [-1e6, 0.0, 1e6, 1e-300])
def test_scores_within_the_bound(value):
    outcome = Scored(value=value, parts={"tokens": 1e15})
    assert checked(outcome) is outcome


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 1, True])
def test_other_numbers_become_floats(value):
    outcome = checked(Scored(value=value, parts={"a": value}))
    assert outcome == Scored(value=float(value), parts={"a": float(value)})
    assert isinstance(outcome.value, float) and isinstance(outcome.parts["a"], float)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e200, "1e+200"),
        (-1.8e308, "-inf"),
        (1_000_001, "an integer of 20 bits"),
        pytest.param(10**5000, "an integer of 16610 bits", id="huge integer"),
        ("1", "'1'"),
        (None, "None"),
        (1j, "1j"),
    ],
)
def test_scores_out_of_bounds(value, shown):
    expected = f"the score is {shown}; expected a number from -1e+06 to 1e+06"
    assert checked(Scored(value=value)) == Invalid(reason=expected)
    part = checked(Scored(value=0.0, parts={"a": value}))
    assert isinstance(part, Invalid) or value == 1_000_001


def test_what_is_no_outcome():
    assert checked(0.5) == Invalid(reason="the scorer returned a float, not an outcome")
    [comparison] = check_comparisons([None], [request("a", "b")])
    assert comparison == Failed(reason="the scorer returned a NoneType, not a comparison")


def test_reasons_are_cleaned():
    dirty = "\x1b[31mone\x1b[0m\ntwo \ud800\x00\u202e"
    assert checked(Failed(reason=dirty, transient=True)) == Failed(
        reason="one two ???", transient=True
    )
    [comparison] = check_comparisons([Invalid(reason=dirty)], [request("a", "b")])
    assert comparison == Invalid(reason="one two ???")
    assert len(clean_line("x" * 10_000)) == 600


def test_last_line_of_an_error():
    class UnprintableError(Exception):
        def __str__(self):
            raise ValueError

    assert last_line(ValueError("a\n\x1b[36mb\x1b[39m\n")) == "ValueError: b"
    assert last_line(UnprintableError()) == one_line(UnprintableError()) == "UnprintableError"
    assert one_line(ValueError()) == "ValueError"
