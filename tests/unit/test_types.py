"""Arrays of completions and rows: size, equality, and that nothing changes them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayhf.types import (
    Completion,
    Group,
    Prompt,
    Sample,
    float_array,
    given_row,
    make_row,
    token_array,
)


def completion(tokens: int = 512) -> Completion:
    return Completion(
        prompt_id="p",
        index=0,
        seed=1,
        text="",
        token_ids=token_array(range(100_000, 100_000 + tokens)),
        logprobs=float_array(-0.1 * i for i in range(tokens)),
        finish_reason="stop",
        policy_version=0,
    )


def test_a_token_takes_at_most_16_bytes() -> None:
    one = completion()
    assert one.token_ids.nbytes + one.logprobs.nbytes == 8 * 512
    group = Group(
        prompt=Prompt(prompt_id="p", messages=(), token_ids=tuple(range(40))),
        samples=tuple(Sample(completion=completion(), outcome=None) for _ in range(2)),
    )
    rows = [make_row(group, index, score=0.0) for index in range(2)]
    # Rows share the arrays of the completion, and those of the prompt among each other.
    assert rows[0].response_ids is group.samples[0].completion.token_ids
    assert rows[0].tokens["behavior_logp"] is group.samples[0].completion.logprobs
    assert rows[0].prompt_ids is rows[1].prompt_ids


def test_arrays_are_read_only() -> None:
    one = completion(3)
    for array in (one.token_ids, one.logprobs, given_row("p", (1,), (2,)).response_ids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5


def test_equality_is_by_value_also_after_pickling() -> None:
    one = completion(3)
    assert pickle.loads(pickle.dumps(one)) == one and one != completion(4)
    assert replace(one, logprobs=float_array([-1.0, -1.0, -1.0])) != one
    assert one != replace(one, text="other")
    gold = replace(one, logprobs=np.full(3, np.nan, np.float32))
    assert gold == replace(gold) and Sample(completion=one, outcome=None) == Sample(
        completion=completion(3), outcome=None
    )
    row = given_row("p", (1, 2), (3, 4), score=1.0)
    assert row == given_row("p", [1, 2], np.array([3, 4]), score=1.0)
    assert row != row.with_tokens(ref_logp=np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
