"""Preference pairs from hand-made trees: siblings, levels, confidence."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayhf.search.mcts import Step, Tree, TreeNode
from rayhf.search.siblings import (
    StepPair,
    StepPairSettings,
    pair_rows,
    soft_label,
    step_pairs,
)
from rayhf.types import Completion, Prompt, float_array, token_array

PROMPT = Prompt(
    prompt_id="p0",
    messages=({"role": "user", "content": "?"},),
    token_ids=(1, 2),
    reference_answer="123",
)


def hand_tree(rows):
    """Return a tree of rows (parent, tokens, Q, N, chosen)."""
    tree = Tree()
    for number, (parent, tokens, q, visits, chosen) in enumerate(rows, start=1):
        completion = Completion(
            prompt_id="p",
            index=0,
            seed=0,
            text=str(tokens),
            token_ids=token_array(tokens),
            logprobs=float_array(-float(t) for t in tokens),
            finish_reason="stop",
            policy_version=0,
        )
        above = tree.nodes[parent]
        tree.nodes.append(
            TreeNode(
                id=number,
                parent=parent,
                step=Step(completion=completion, end=None),
                depth=above.depth + 1,
                estimate=0.0,
                q=q,
                visits=visits,
                chosen=chosen,
                prior=0.5,
            )
        )
        above.children.append(number)
    return tree


def names(selected):
    return [(p.better.id, p.worse.id) for p in selected.pairs]


RNG = np.random.default_rng(0)


def pairs_of(tree, **settings):
    return step_pairs(tree, RNG, StepPairSettings(**settings))


FAMILY = [
    (0, (3, 4), 0.1, 1, False),
    (0, (3, 5), 0.7, 6, True),
    (0, (6,), -0.4, 2, False),
    (0, (7,), 0.7, 3, False),
]


def test_pair_rules():
    tree = hand_tree(FAMILY)
    assert names(pairs_of(tree)) == [(2, 3)]
    every = pairs_of(tree, pairs="all")
    assert names(every) == [(2, 1), (2, 3)] and every.ties == 1
    assert [p.label_smoothing for p in every.pairs] == pytest.approx([1 / 7, 2 / 8])
    assert [p.margin for p in every.pairs] == pytest.approx([0.6, 1.1])
    assert names(pairs_of(tree, pairs="all", max_pairs=1)) == [(2, 1)]
    assert names(pairs_of(tree, min_margin=1.2)) == [] and pairs_of(tree, min_margin=1.2).ties == 1
    assert names(pairs_of(tree, min_visits=3)) == [] and pairs_of(tree, min_visits=3).ties == 1
    drawn = Counter(names(pairs_of(tree, pairs="random"))[0] for _ in range(400))
    assert set(drawn) == {(2, 1), (2, 3)} and min(drawn.values()) > 140


def test_levels():
    below = [
        (2, (8,), 0.3, 1, True),
        (2, (9,), 0.2, 1, False),
        (1, (8,), 0.3, 1, False),
        (1, (9,), 0.5, 1, False),
    ]
    tree = hand_tree([*FAMILY, *below])
    assert names(pairs_of(tree)) == [(2, 3), (5, 6)]
    assert names(pairs_of(tree, levels="all")) == [(2, 3), (8, 7), (5, 6)]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_order_of_siblings_does_not_change_the_pairs(seed):
    rng = random.Random(seed)
    rows = [
        (0, (i,), rng.choice([-1.0, 0.0, rng.random()]), rng.randint(0, 3) * 10 + i, False)
        for i in range(6)
    ]
    shuffled = rng.sample(rows, len(rows))

    def by_tokens(tree, rule):
        selected = pairs_of(tree, pairs=rule)
        pairs = {
            (p.better.token_ids.tobytes(), p.worse.token_ids.tobytes(), p.margin, p.label_smoothing)
            for p in selected.pairs
        }
        return pairs, selected.ties, selected.unvisited

    for rule in ("worst", "all"):
        assert by_tokens(hand_tree(rows), rule) == by_tokens(hand_tree(shuffled), rule)


def test_unvisited_pairs_have_no_confidence():
    assert soft_label(0, 0) is None
    assert soft_label(3, 0) == 0.0 and soft_label(0, 3) == 0.5 and soft_label(2, 5) == 0.5
    assert soft_label(6, 2) == pytest.approx(1 / (6 / 2 + 1)) and soft_label(4, 4) == 0.5
    tree = hand_tree([(0, (1,), 0.5, 0, False), (0, (2,), -0.5, 0, False)])
    selected = pairs_of(tree, min_visits=0)
    assert selected.pairs == () and selected.unvisited == 1
    assert names(pairs_of(tree, min_visits=0, labels="hard")) == [(1, 2)]
    assert pairs_of(tree).pairs == () and pairs_of(tree).ties == 0


def test_rounding_errors_are_ties():
    third = (0.1 + 0.2) - 0.3
    assert third != 0.0
    tree = hand_tree([(0, (1,), third, 2, False), (0, (2,), 0.0, 2, False)])
    assert pairs_of(tree).ties == 1


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((3, 4), (3, 5), 1),
        ((4,), (5,), 0),
        ((3, 4, 5), (3, 4), 1),
        ((3, 4), (3, 4, 5), 1),
        ((3,), (3, 4), 0),
    ],
)
def test_rows_begin_where_the_steps_differ(first, second, shared):
    tree = hand_tree(
        [(0, (8, 9), 0.0, 1, True), (1, first, 1.0, 2, True), (1, second, 0.0, 1, False)]
    )
    prompt = PROMPT
    pair = StepPair(better=tree.nodes[2], worse=tree.nodes[3], margin=1.0, label_smoothing=0.0)
    better, worse = pair_rows(prompt, tree, pair, merge_chains=False)
    context = [1, 2, 8, 9, *first[:shared]]
    assert better.prompt_ids.tolist() == worse.prompt_ids.tolist() == context
    assert tuple(better.response_ids) == first[shared:]
    assert tuple(worse.response_ids) == second[shared:]
    assert better.tokens["behavior_logp"].tolist() == [-float(t) for t in first[shared:]]
    assert (better.sample, worse.sample) == (1, 2) and better.scalars["score"] == 1.0


def test_chains_may_be_merged():
    tree = hand_tree(
        [
            (0, (3,), 1.0, 3, True),
            (0, (4,), 0.0, 1, False),
            (1, (5,), 1.0, 2, True),
            (3, (6,), 1.0, 1, True),
        ]
    )
    tree.nodes[2].children = []
    pair = pairs_of(tree).pairs[0]
    rows = [
        pair_rows(PROMPT, tree, pair, merge_chains=merge)[0].response_ids.tolist()
        for merge in (False, True)
    ]
    assert rows == [[3], [3, 5, 6]]
