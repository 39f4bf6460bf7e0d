"""TPO: its loss by hand, and lists of the branches of a tree."""

import math

import pytest
import torch
from campaigns import make_config
from fakes import make_prompts
from scripted_spar import make_completion

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.mcts_samples import tree_samples
from rayhf.algorithms.tpo import TPO, TPOConfig
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.losses.lists import ListLoss, lambda_weights
from rayhf.planning.preflight import check_settings
from rayhf.search.mcts import Step, Tree, TreeNode
from rayhf.types import Example, Group, Row, Sampling, float_array, token_array

CONTEXT = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=9))
(PROMPT,) = make_prompts(1)


def row(value, ref, sample=0):
    return Row(
        prompt_id="p",
        sample=sample,
        prompt_ids=token_array((1,)),
        response_ids=token_array((2,)),
        tokens={"behavior_logp": float_array([-1.0]), "ref_logp": float_array([ref])},
        scalars={"value": value},
    )


def loss_of(lists, logps, beta=0.5):
    examples = [
        Example(rows=tuple(rows), scalars={"ordered_pairs": pairs}) for rows, pairs in lists
    ]
    total = sum(pairs for _, pairs in lists)
    rows = sum(len(rows) for rows, _ in lists)
    totals = Totals(
        tokens=rows, rows=rows, examples=len(lists), scalars={"ordered_pairs": float(total)}
    )
    micro = build_micro_batch(examples, totals, "cpu")
    output = torch.tensor(logps, dtype=torch.float32, requires_grad=True)
    result = ListLoss(beta=beta)(output, micro)
    result.loss.backward()
    return result, output.grad.tolist()


def test_loss_by_hand():
    """Rewards 0.2 and 0.5 for values 1 and -1: the worse branch ranks first."""
    result, gradient = loss_of([([row(1.0, -2.0), row(-1.0, -3.0)], 1.0)], [-1.6, -2.0])
    weight = (2.0 - 0.5) * abs(1 / math.log(3) - 1 / math.log(2))
    assert result.loss.item() == pytest.approx(weight * math.log(1 + math.exp(0.3)), rel=1e-5)
    slope = 0.5 * weight / (1 + math.exp(-0.3))
    assert gradient == pytest.approx([-slope, slope], rel=1e-5)
    assert result.metrics["tpo/accuracy"] == 0.0
    assert result.metrics["tpo/margin"].item() == pytest.approx(-0.3, rel=1e-5)


def test_lists_do_not_meet_and_equal_values_make_no_pair():
    first = [row(1.0, -2.0), row(-1.0, -3.0)]
    second = [row(0.5, -1.0, 0), row(0.5, -2.0, 1), row(0.0, -2.0, 2)]
    alone, one = loss_of([(first, 1.0)], [-1.6, -2.0])
    other, two = loss_of([(second, 2.0)], [-1.0, -1.0, -2.5])
    both, gradient = loss_of([(first, 1.0), (second, 2.0)], [-1.6, -2.0, -1.0, -1.0, -2.5])
    assert both.loss.item() == pytest.approx((alone.loss.item() + other.loss.item()) / 2)
    assert gradient == pytest.approx([value / 2 for value in (*one, *two)])
    assert both.metrics["tpo/accuracy"].item() == pytest.approx(2 / 3)
    value_R = torch.tensor([0.5, 0.5, 0.0])
    weights = lambda_weights(torch.zeros(3), value_R, torch.zeros(3, dtype=torch.long))
    assert weights.count_nonzero() == 2 and weights[0, 2] > weights[1, 2] > 0


def tree_of(*nodes):
    """Nodes as (parent, text, estimate)."""
    tree = Tree()
    for number, (parent, text, estimate) in enumerate(nodes, start=1):
        step = Step(completion=make_completion(text, index=0), end=None)
        depth = tree.nodes[parent].depth + 1
        node = TreeNode(id=number, parent=parent, step=step, depth=depth, estimate=estimate)
        tree.nodes.append(node)
        tree.nodes[parent].children.append(number)
    return tree


def selection_of(tree, **settings):
    group = Group(prompt=PROMPT, samples=tree_samples(PROMPT, tree, {}))
    return TPO(TPOConfig(**settings)).select([group], CONTEXT)


BRANCHING = ((0, "a", 0.2), (0, "b", -1.0), (1, "c", 1.0), (1, "d", -0.5), (3, "e", 0.7))


def test_branches_are_paths_to_leaves_in_the_order_of_their_values():
    tree = tree_of(*BRANCHING)
    selection = selection_of(tree)
    (example,) = selection.examples
    texts = ["ace", "ad", "b"]
    ids = [node.token_ids for node in tree.nodes]
    paths = [[1, 3, 5], [1, 4], [2]]
    for each, path, text in zip(example.rows, paths, texts, strict=True):
        assert each.response_ids.tolist() == [t for number in path for t in ids[number]], text
        assert each.prompt_ids.tolist() == list(PROMPT.token_ids)
        assert each.sample == path[-1] - 1
    assert [r.scalars["value"] for r in example.rows] == [0.7, -0.5, -1.0]
    assert example.scalars == {"ordered_pairs": 3.0}
    assert selection.metrics == {"tpo/lists": 1.0, "tpo/ties": 0.0, "tpo/branches": 3.0}


def test_long_lists_are_thinned_and_trees_of_one_value_are_ties():
    leaves = [(0, text, value / 10) for value, text in enumerate("abcdefghi")]
    (example,) = selection_of(tree_of(*leaves), branches=3).examples
    assert [r.scalars["value"] for r in example.rows] == [0.8, 0.4, 0.0]
    for flat in ([(0, "a", 0.5), (0, "b", 0.5)], [(0, "a", 0.5)], [(0, "a", None), (0, "b", 1.0)]):
        selection = selection_of(tree_of(*flat))
        assert selection.examples == () and selection.metrics["tpo/ties"] == 1.0
    assert selection_of(tree_of(*leaves), min_margin=0.8).no_signal == 1.0


def test_staleness_is_refused(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "tpo"}, run={"max_staleness": 1})
    with pytest.raises(ConfigError, match="trains on trees of the current policy only"):
        check_settings(config)
