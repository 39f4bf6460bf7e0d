"""Running statistics against numpy over all values at once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayhf.errors import CheckpointError
from rayhf.scorer.normalize import RunningNormalizer

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


@given(VALUES, st.integers(0, 40))
def test_batches_add_up_to_the_whole(values: list[float], cut: int) -> None:
    whole, parts = RunningNormalizer(), RunningNormalizer()
    whole.update(values)
    parts.update(values[:cut])
    parts.update(values[cut:])
    assert parts.state_dict() == whole.state_dict()
    assert whole.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    if np.std(values) > 1e-3:
        assert whole.std == pytest.approx(np.std(values), rel=1e-6)
        assert whole(values[0]) == pytest.approx(
            (values[0] - np.mean(values)) / np.std(values), rel=1e-5, abs=1e-6
        )


@given(VALUES, VALUES)
def test_state_resumes_exactly_from_json(before: list[float], after: list[float]) -> None:
    first, second = RunningNormalizer(), RunningNormalizer()
    first.update(before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for normalizer in (first, second):
        normalizer.update(after)
    assert second.state_dict() == first.state_dict()
    assert second(1.5) == first(1.5)


def test_equal_values_are_zero_and_no_values_the_identity() -> None:
    normalizer = RunningNormalizer()
    assert normalizer(3.0) == 3.0
    normalizer.update([0.1] * 1000)
    assert abs(normalizer(0.1)) < 1e-12 and normalizer.std == 1.0


def test_score_near_the_largest_float_does_not_affect_the_rest() -> None:
    normalizer = RunningNormalizer()
    normalizer.update([1.0, 3.0, 1e308, -1e308])
    assert (normalizer.count, normalizer.mean, normalizer.std) == (2, 2.0, 1.0)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"count": 1},
        {"count": "x", "mean": 0, "squares": 0},
        {"count": -1, "mean": 0, "squares": 0},
        {"count": 1, "mean": math.nan, "squares": 0},
        {"count": 1, "mean": 0, "squares": -1},
    ],
)
def test_invalid_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="normalizer's state"):
        RunningNormalizer().load_state_dict(state)
