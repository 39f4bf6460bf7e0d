"""Packing: every example once, equal counts per rank, under the budget, little padding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayhf.errors import ConfigError
from rayhf.learner.packing import padded_tokens, padding_fraction, plan_micro_batches
from rayhf.models.packing import pack_rows

Lengths = list[list[int]]


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), max_size=40),
    st.integers(1, 5),
    st.integers(150, 400),
)
def test_every_example_once_within_budget_and_equal_counts(
    lengths: Lengths, ranks: int, budget: int
) -> None:
    plans = plan_micro_batches(lengths, ranks=ranks, budget=budget)
    assert len(plans) == ranks
    assert len({len(micros) for micros in plans}) == 1
    assert sorted(e for micros in plans for micro in micros for e in micro) == list(
        range(len(lengths))
    )
    assert all(padded_tokens(micro, lengths) <= budget for micros in plans for micro in micros)
    assert plans == plan_micro_batches(lengths, ranks=ranks, budget=budget)


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=2), min_size=8, max_size=40),
    st.integers(1, 4),
)
def test_rank_is_empty_only_when_no_micro_batch_can_be_split(lengths: Lengths, ranks: int) -> None:
    plans = plan_micro_batches(lengths, ranks=ranks, budget=200)
    if any(not micro for micros in plans for micro in micros):
        assert max(len(micro) for micros in plans for micro in micros) == 1


def test_example_over_the_budget_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="example 1 alone has 2 rows of up to 60 tokens; it needs at least 120"
    ):
        plan_micro_batches([[10], [60, 30]], ranks=1, budget=100)


def test_example_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="example 0 has no rows"):
        plan_micro_batches([[]], ranks=1, budget=100)


def test_no_examples_means_no_micro_batches() -> None:
    assert plan_micro_batches([], ranks=3, budget=100) == [[], [], []]


def test_fewer_examples_than_ranks_leaves_empty_micro_batches() -> None:
    assert plan_micro_batches([[5], [7]], ranks=4, budget=100) == [[[1]], [[0]], [[]], [[]]]


def test_one_micro_batch_is_split_over_the_ranks() -> None:
    plans = plan_micro_batches([[10]] * 8, ranks=4, budget=1000)
    assert [len(micros[0]) for micros in plans] == [2, 2, 2, 2]


def test_little_padding_and_balanced_ranks_for_long_tails() -> None:
    rng = random.Random(0)
    lengths = [[16 + min(1000, int(rng.expovariate(1 / 200)))] for _ in range(512)]
    plans = plan_micro_batches(lengths, ranks=4, budget=8192)
    work = [sum(padded_tokens(micro, lengths) for micro in micros) for micros in plans]
    assert sum(work) < 1.15 * sum(sum(rows) for rows in lengths)
    assert max(work) < 1.05 * min(work)
    for micros in zip(*plans, strict=True):
        costs = [padded_tokens(micro, lengths) for micro in micros]
        assert max(costs) < 1.25 * min(costs) or max(costs) - min(costs) < 2048


@pytest.mark.parametrize(
    ("lengths", "budget", "long"),
    [([5, 50, 7, 7, 120, 6], 60, 4), ([5, 9, 1, 40, 5, 5, 2, 17], 20, 3)],
)
def test_rows_are_packed_once_within_the_budget(lengths: list[int], budget: int, long: int) -> None:
    batches = pack_rows(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(
        len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches if len(batch) > 1
    )
    assert [long] in batches, "a row over the budget gets its own batch: without gradient it fits"
    assert batches == pack_rows(list(lengths), budget)


def test_padding_fraction_counts_what_is_computed_for_nothing() -> None:
    lengths = [[4], [2], [3, 1]]
    assert padding_fraction([[[0, 1]], [[2]]], lengths) == pytest.approx(1 - 10 / (8 + 6))
