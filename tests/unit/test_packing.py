"""Packing: every example once, equal counts per rank, under the budget, nothing fed twice."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayhf.config.schema import Packing
from rayhf.errors import ConfigError
from rayhf.learner.packing import plan_micro_batches
from rayhf.models.packing import batch_cost, distinct_tokens, pack_examples, pack_rows
from rayhf.models.prefix_tree import build_tree, shared_prefix
from rayhf.types import Row, token_array

Lengths = list[list[int]]
PACKINGS: tuple[Packing, ...] = ("off", "rows", "tree")


def make_row(prompt_id: str, prompt: Sequence[int], response: Sequence[int]) -> Row:
    return Row(
        prompt_id=prompt_id,
        sample=0,
        prompt_ids=token_array(prompt),
        response_ids=token_array(response),
    )


def of_lengths(lengths: Lengths) -> list[list[Row]]:
    """Return examples that share nothing; a row of n tokens has half of them as its prompt."""
    numbers = iter(range(10**6))
    return [
        [
            make_row(f"p{i}", [next(numbers)] * (n - n // 2), [next(numbers)] * (n // 2))
            for n in rows
        ]
        for i, rows in enumerate(lengths)
    ]


def samples(prompts: int, prompt: int, count: int, response: int, seed: int = 0) -> list[list[Row]]:
    rng = random.Random(seed)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(size)]

    examples = []
    for p in range(prompts):
        shared = ids(prompt)
        examples += [[make_row(f"p{p}", shared, ids(response))] for _ in range(count)]
    return examples


def fed(examples: Sequence[Sequence[Row]], plans: list[list[list[int]]]) -> int:
    micros = [[row for e in micro for row in examples[e]] for plan in plans for micro in plan]
    return sum(len(build_tree(rows, share=True).ids_N) for rows in micros if rows)


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=3), max_size=40),
    st.integers(1, 5),
    st.integers(150, 400),
    st.sampled_from(PACKINGS),
)
def test_every_example_once_within_budget_and_equal_counts(
    lengths: Lengths, ranks: int, budget: int, packing: Packing
) -> None:
    examples = of_lengths(lengths)
    plans = plan_micro_batches(examples, packing=packing, ranks=ranks, budget=budget)
    assert len(plans) == ranks
    assert len({len(micros) for micros in plans}) == 1
    assert sorted(e for micros in plans for micro in micros for e in micro) == list(
        range(len(lengths))
    )
    costs = [batch_cost(examples, micro, packing) for micros in plans for micro in micros]
    assert all(cost <= budget for cost in costs)
    assert plans == plan_micro_batches(examples, packing=packing, ranks=ranks, budget=budget)


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=2), min_size=8, max_size=40),
    st.integers(1, 4),
    st.sampled_from(PACKINGS),
)
def test_rank_is_empty_only_when_no_micro_batch_can_be_split(
    lengths: Lengths, ranks: int, packing: Packing
) -> None:
    plans = plan_micro_batches(of_lengths(lengths), packing=packing, ranks=ranks, budget=200)
    if any(not micro for micros in plans for micro in micros):
        assert max(len(micro) for micros in plans for micro in micros) == 1


@pytest.mark.parametrize(("packing", "least"), [("off", 120), ("rows", 88), ("tree", 88)])
def test_example_over_the_budget_is_refused(packing: Packing, least: int) -> None:
    message = f"example 1 alone has 2 rows of up to 60 tokens; it needs at least {least}"
    with pytest.raises(ConfigError, match=message):
        plan_micro_batches(of_lengths([[10], [60, 30]]), packing=packing, ranks=1, budget=80)


def test_example_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="example 0 has no rows"):
        plan_micro_batches([[]], packing="tree", ranks=1, budget=100)


@pytest.mark.parametrize("packing", PACKINGS)
def test_few_examples(packing: Packing) -> None:
    plan = plan_micro_batches([], packing=packing, ranks=3, budget=100)
    assert plan == [[], [], []]
    examples = of_lengths([[5], [7]])
    plan = plan_micro_batches(examples, packing=packing, ranks=4, budget=100)
    assert plan == [[[1]], [[0]], [[]], [[]]]
    plan = plan_micro_batches(of_lengths([[10]] * 8), packing=packing, ranks=4, budget=1000)
    assert [len(micros[0]) for micros in plan] == [2, 2, 2, 2]


@pytest.mark.parametrize("packing", PACKINGS)
def test_little_waste_and_balanced_ranks_for_long_tails(packing: Packing) -> None:
    rng = random.Random(0)
    lengths = [[16 + min(1000, int(rng.expovariate(1 / 200)))] for _ in range(512)]
    examples = of_lengths(lengths)
    plans = plan_micro_batches(examples, packing=packing, ranks=4, budget=8192)
    costs = [[batch_cost(examples, micro, packing) for micro in micros] for micros in plans]
    work = [sum(rank) for rank in costs]
    assert sum(work) < 1.15 * sum(sum(rows) for rows in lengths)
    assert max(work) < 1.05 * min(work)
    for step in zip(*costs, strict=True):
        assert max(step) < 1.25 * min(step) or max(step) - min(step) < 2048


@pytest.mark.parametrize(
    ("lengths", "budget", "long"),
    [([5, 50, 7, 7, 120, 6], 60, 4), ([5, 9, 2, 40, 5, 5, 2, 17], 20, 3)],
)
def test_rows_are_packed_once_within_the_budget(lengths: list[int], budget: int, long: int) -> None:
    rows = of_lengths([[n] for n in lengths])
    for packing in PACKINGS:
        packed = pack_examples(rows, packing=packing, budget=budget)
        batches = [batch.examples for batch in packed]
        assert [batch.cost for batch in packed] == [batch_cost(rows, b, packing) for b in batches]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(
            batch_cost(rows, batch, packing) <= budget for batch in batches if len(batch) > 1
        )
        assert [long] in batches, "a row over the budget gets its own batch"
        if packing == "off":
            assert batches == pack_rows(lengths, budget)


# ------------------------------------------------------------------------------------------- trees


def test_samples_of_a_prompt_share_a_batch() -> None:
    examples = samples(prompts=12, prompt=40, count=8, response=10)
    rows = [row for example in examples for row in example]
    distinct = distinct_tokens(rows)
    assert distinct == pytest.approx(12 * (40 + 8 * 9), abs=12)  # chance may share a first token
    for ranks in (1, 2):
        plans = plan_micro_batches(examples, packing="tree", ranks=ranks, budget=300)
        assert fed(examples, plans) == distinct
    # Cut in two, a prompt is fed twice.
    plans = plan_micro_batches(examples, packing="tree", ranks=1, budget=85)
    assert fed(examples, plans) < 1.6 * distinct


def test_pairs_and_search_trees_are_fed_once() -> None:
    rng = random.Random(1)
    examples = []
    for p in range(6):
        stem = [rng.randrange(99) for _ in range(20)]
        for depth in range(4):
            steps = [[depth, side, *(rng.randrange(99) for _ in range(6))] for side in (0, 1)]
            examples.append([make_row(f"p{p}", stem, step) for step in steps])
            stem = stem + steps[0]
    plans = plan_micro_batches(examples, packing="tree", ranks=2, budget=400)
    distinct = distinct_tokens([row for example in examples for row in example])
    assert fed(examples, plans) <= 1.05 * distinct
    assert distinct < 0.5 * sum(len(row) - 1 for example in examples for row in example)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.lists(st.integers(0, 1), min_size=1, max_size=8),
            st.lists(st.integers(0, 1), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_each_node_sees_the_tokens_of_its_row(
    spec: list[tuple[str, list[int], list[int]]], share: bool
) -> None:
    rows = [make_row(*parts) for parts in spec]
    tree = build_tree(rows, share=share)
    predict = iter(tree.predict_T.tolist())
    for row in rows:
        for position in range(len(row.response_ids)):
            node = next(predict)
            seen = [j for j in range(node + 1) if node < tree.end_N[j]]
            tokens = row.fed_ids[: len(row.prompt_ids) + position]
            assert tree.ids_N[seen].tolist() == tokens.tolist()
            assert tree.depth_N[seen].tolist() == list(range(len(tokens)))
    expected = distinct_tokens(rows) if share else sum(len(row) - 1 for row in rows)
    assert len(tree.ids_N) == expected


def test_different_prompts_share_long_prefixes_only() -> None:
    def nodes(length: int) -> int:
        rows = [make_row(p, [*range(length), 100 + i], [1]) for i, p in enumerate("ab")]
        return len(build_tree(rows, share=True).ids_N)

    assert nodes(31) == 2 * 32
    assert nodes(32) == 32 + 2


@given(st.lists(st.integers(0, 1), max_size=200), st.lists(st.integers(0, 1), max_size=200))
def test_shared_prefix(first: list[int], second: list[int]) -> None:
    both = first[:150]
    a = token_array([*both, *first])
    b = token_array([*both, *second])
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert shared_prefix(a, b) == (min(len(a), len(b)) if expected is None else expected)
