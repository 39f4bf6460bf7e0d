"""Monte Carlo tree search: numbers worked out by hand, and invariances.

The model is a pair of small functions.
"""

import asyncio
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayhf.search.grow import choose, grow, search
from rayhf.search.mcts import (
    MCTSSettings,
    Step,
    Tree,
    TreeNode,
    descend,
    mean_value,
    parent_visits,
    prior,
    puct,
)
from rayhf.types import Completion, float_array, token_array


def step(text, p=0.5, end=None):
    """Return a step of one token whose prior is p."""
    completion = Completion(
        prompt_id="p",
        index=0,
        seed=0,
        text=text,
        token_ids=token_array((ord(text[0]),)),
        logprobs=float_array((math.log(p),)),
        finish_reason="stop",
        policy_version=0,
    )
    return Step(completion=completion, end=end)


class World:
    """Table of text of the path -> its continuations as {text: (p, R, end)}.

    A path that is not in the table has no continuations.
    """

    def __init__(self, table, delay=None):
        self.table, self.delay, self.expanded = table, delay, []

    async def expand(self, tree, node, width):
        where = "".join(n.text for n in tree.path(node))
        self.expanded.append((where, width))
        await self._wait()
        return [step(text, p, end) for text, (p, _, end) in self.table.get(where, {}).items()]

    async def evaluate(self, tree, node):
        await self._wait()
        *before, last = [n.text for n in tree.path(node)]
        return self.table["".join(before)][last][1]

    async def _wait(self):
        if self.delay is not None:
            await asyncio.sleep(self.delay.random() / 500)


SMALL = {
    "": {"A": (0.5, 1.0, None), "B": (0.4, -1.0, None)},
    "A": {"1": (0.5, 1.0, "answer"), "2": (0.2, 0.0, None)},
}
ONE = MCTSSettings(iterations=4, depth=4, width=(2,), reroot="never", expansion="leaf")


def changed(settings, **changes):
    return MCTSSettings.model_validate(settings.model_dump() | changes)


def run(world, config=ONE):
    async def go():
        tree = Tree()
        await search(tree, tree.root, config, world.expand, world.evaluate)
        return tree

    return asyncio.run(go())


def facts(tree):
    """Return everything but the order of creation."""
    rows = [
        (
            "".join(n.text for n in tree.path(node)),
            node.visits,
            node.q,
            node.value,
            node.estimate,
            node.chosen,
            node.prior,
        )
        for node in tree.nodes
    ]
    return sorted(rows, key=lambda row: row[0])


def named(tree):
    return {"".join(n.text for n in tree.path(node)): node for node in tree.nodes}


def test_prior_is_length_normalized():
    assert prior(float_array([-0.5, -1.5]), 1.25) == pytest.approx(math.exp(-2.0 / 2**1.25))
    assert prior(float_array([-0.5, -1.5]), 1.0) == pytest.approx(math.exp(-1.0))
    assert prior(float_array([]), 1.25) == 1.0


def test_puct_example():
    a = TreeNode(id=1, parent=0, step=None, depth=1, prior=0.5, q=0.25, visits=3)
    b = TreeNode(id=2, parent=0, step=None, depth=1, prior=0.8, q=-1.0, visits=0)
    config = MCTSSettings(exploration=2.0)
    assert parent_visits([a, b]) == 4
    assert puct(a, [a, b], config) == pytest.approx(0.25 + 2 * 0.5 * 2 / 4)
    assert puct(b, [a, b], config) == pytest.approx(-1.0 + 2 * 0.8 * 2 / 1)
    # Two iterations in flight through a: five visits, of which two brought back -1; the parent has
    # six.
    a.pending = 2
    assert puct(a, [a, b], config) == pytest.approx((3 * 0.25 - 2) / 5 + 2 * 0.5 * math.sqrt(6) / 6)


def test_four_iterations_example():
    world = World(SMALL)
    tree = run(world)
    node = named(tree)
    # 1 expands the root; 2 goes to A (1 + .5 > -1 + .4) and expands it; 3 and 4 end at A1, which is
    # terminal.
    assert [where for where, _ in world.expanded] == ["", "A"]
    assert {name: n.visits for name, n in node.items()} == {"": 0, "A": 3, "B": 0, "A1": 2, "A2": 0}
    assert {name: n.reward for name, n in node.items()} == {
        "": 0,
        "A": 1,
        "B": -1,
        "A1": 0,
        "A2": -1,
    }
    assert node["A"].value == pytest.approx((2 * 0 + 1 * -1) / 3)
    assert node["A"].q == pytest.approx(1 - 1 / 3)
    assert node[""].value == pytest.approx((3 * (2 / 3) + 1 * -1) / 4)
    assert node["B"].q == -1 and node["A1"].q == 0 and node["A2"].q == -1
    halved = named(run(World(SMALL), changed(ONE, gamma=0.5)))
    assert halved["A"].q == pytest.approx(1 - 0.5 / 3)


def test_exploration_spreads_visits_by_prior():
    # With c = 0 only Q counts; a large c spreads visits by prior.
    flat = {"": {"A": (0.9, 0.5, "answer"), "B": (0.3, 0.4, "answer")}}
    assert [
        n.visits for n in run(World(flat), changed(ONE, iterations=21, exploration=0.0)).nodes[1:]
    ] == [20, 0]
    visits = [
        n.visits for n in run(World(flat), changed(ONE, iterations=201, exploration=50.0)).nodes[1:]
    ]
    assert sum(visits) == 200 and visits[0] / visits[1] == pytest.approx(3.0, rel=0.1)


def random_world(seed, depth=4):
    """Return a table with two to four steps at every place, some of which end."""
    rng = random.Random(seed)
    table, level = {}, [""]
    for d in range(depth):
        following = []
        for where in level:
            texts = rng.sample("abcdef", rng.randint(2, 4))
            ends = ["answer" if d == depth - 1 or rng.random() < 0.2 else None for _ in texts]
            table[where] = {
                t: (rng.uniform(0.1, 0.9), rng.uniform(-1, 1), e)
                for t, e in zip(texts, ends, strict=True)
            }
            following += [where + t for t, e in zip(texts, ends, strict=True) if e is None]
        level = following
    return table


@given(
    seed=st.integers(0, 10**6),
    iterations=st.integers(1, 30),
    parallel=st.integers(1, 4),
    depth=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_counts_and_values_are_consistent(seed, iterations, parallel, depth):
    config = changed(ONE, iterations=iterations, parallel=parallel, depth=depth)
    tree = run(World(random_world(seed)), config)
    assert 1 + sum(n.visits for n in tree.children(tree.root)) == iterations
    for node in tree.nodes:
        children = tree.children(node)
        assert node.pending == 0 and node.depth <= depth
        if children:
            assert node.parent is None or node.visits == 1 + sum(c.visits for c in children)
            assert node.value == mean_value(children)
        assert node.parent is None or node.q == pytest.approx(node.reward + node.value)
        # Rewards are differences of R: along a path they add up to the R of its end.
        assert sum(n.reward for n in tree.path(node)) == pytest.approx(node.estimate)


def test_an_iteration_expands_its_whole_way_down():
    """Depth 4 with widths 4, 2, 2, 2: the first iteration makes 10 nodes and ends at depth 4."""
    table = {}
    level = [""]
    for width in (4, 2, 2, 2):
        for where in level:
            table[where] = dict.fromkeys("abcd"[:width], (0.5, 0.0, None))
        level = [where + c for where in level for c in "abcd"[:width]]
    config = changed(ONE, expansion="path", iterations=1, width=(4, 2))
    tree = run(World(table), config)
    assert len(tree.nodes) - 1 == 4 + 2 + 2 + 2
    assert [n.depth for n in tree.nodes if n.visits] == [1, 2, 3, 4]
    # Of one expansion each, four iterations under one leaf reach depth 4 only once.
    assert len(run(World(table), changed(config, expansion="leaf")).nodes) - 1 == 4
    five = run(World(table), changed(config, iterations=5))
    assert sum(n.visits for n in five.nodes if n.depth == 4) == 5
    assert sorted(n.visits for n in five.children(five.root)) == [1, 1, 1, 2]
    assert all(n.pending == 0 for n in five.nodes)


@pytest.mark.parametrize("parallel", [1, 3])
def test_iterations_of_a_wave_do_not_meet(parallel):
    config = changed(ONE, expansion="path", iterations=9, parallel=parallel)
    for seed in range(20):
        world = World(random_world(seed))
        tree = run(world, config)
        wheres = [where for where, _ in world.expanded]
        assert len(wheres) == len(set(wheres))
        assert sum(n.visits for n in tree.children(tree.root)) == (9 if len(tree.nodes) > 1 else 0)


@given(seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_of_siblings_does_not_matter(seed, order):
    table = random_world(seed)
    shuffled = {
        where: dict(order.sample(list(steps.items()), len(steps))) for where, steps in table.items()
    }
    config = changed(ONE, iterations=25)
    assert facts(run(World(table), config)) == facts(run(World(shuffled), config))


@pytest.mark.parametrize("reroot", ["step", "never"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_arrival_order_does_not_matter(reroot, parallel):
    config = changed(ONE, iterations=9, parallel=parallel, reroot=reroot)

    def grown(delay):
        world = World(random_world(7), delay)
        return asyncio.run(grow(config, world.expand, world.evaluate))

    first, second, third = grown(None), grown(random.Random(1)), grown(random.Random(2))
    assert first.nodes == second.nodes == third.nodes and len(first.nodes) > 6


def test_wave_expands_different_leaves_and_counts_iterations():
    table = {
        "": dict.fromkeys("abc", (0.5, 0.1, None)),
        **{t: {"x": (0.5, 0.1, "answer")} for t in "abc"},
    }
    world = World(table)
    tree = run(world, changed(ONE, iterations=4, parallel=3))
    # The root is expanded alone: a second iteration could only expand it again.
    assert [where for where, _ in world.expanded] == ["", "a", "b", "c"]
    assert [n.visits for n in tree.children(tree.root)] == [1, 1, 1]


def test_duplicates_are_left_out_and_counted():
    class Repeating(World):
        async def expand(self, tree, node, width):
            steps = list(await super().expand(tree, node, width))
            return [*steps, *steps, replace(steps[0], end="limit")]

    tree = run(Repeating(SMALL), changed(ONE, iterations=1))
    # An "A" that ends the completion is not the "A" that continues.
    assert [(n.text, n.terminal) for n in tree.nodes[1:]] == [
        ("A", False),
        ("B", False),
        ("A", True),
    ]
    assert tree.duplicates == 2


def test_step_without_estimate_is_not_selected_or_backed_up():
    table = {"": {"A": (0.9, None, None), "B": (0.1, -0.5, None), "C": (0.1, -0.7, None)}}
    tree = run(World(table), changed(ONE, iterations=9))
    node = named(tree)
    assert (node["A"].visits, node["A"].q) == (0, 0.0)
    assert node["B"].visits + node["C"].visits == 8
    weights = [n.visits for n in (node["B"], node["C"])]
    assert tree.root.value == pytest.approx((weights[0] * -0.5 + weights[1] * -0.7) / 8)
    nothing = run(World({"": {"A": (0.9, None, None)}}), changed(ONE, iterations=5))
    assert nothing.root.value == 0.0 and choose(nothing, nothing.root) is None
    with pytest.raises(ValueError, match="nan"):
        run(World({"": {"A": (0.9, math.nan, None)}}))


def test_rerooting_searches_every_step_and_keeps_statistics():
    world = World(random_world(11))
    config = changed(ONE, iterations=6, reroot="step")

    async def go():
        frozen = Tree()
        await search(frozen, frozen.root, config, world.expand, world.evaluate)
        return frozen, await grow(config, world.expand, world.evaluate)

    once, tree = asyncio.run(go())
    path = [n for n in tree.nodes if n.chosen]
    assert (
        path[-1].terminal
        and [n.depth for n in path] == list(range(1, len(path) + 1))
        and len(path) > 1
    )
    assert [(n.visits, n.q) for n in tree.children(tree.root)] == [
        (n.visits, n.q) for n in once.children(once.root)
    ]
    assert path[0].text == choose(once, once.root).text
    # The search from the first step adds its own iterations to the visits below it.
    before = sum(c.visits for c in once.children(once.nodes[path[0].id]))
    assert sum(c.visits for c in tree.children(path[0])) in (before + 6, before + 5)
    assert len(
        list(asyncio.run(grow(changed(config, max_steps=1), world.expand, world.evaluate)).nodes)
    ) == len(once.nodes)


def test_one_search_walks_down_by_visits():
    world = World(SMALL)
    tree = asyncio.run(grow(ONE, world.expand, world.evaluate))
    assert [n.text for n in tree.nodes if n.chosen] == ["A", "1"]
    tie = {"": {"A": (0.5, 0.0, "answer"), "B": (0.6, 0.0, "answer"), "C": (0.6, 0.0, "answer")}}
    tree = asyncio.run(grow(changed(ONE, iterations=1), World(tie).expand, World(tie).evaluate))
    assert [n.text for n in tree.nodes if n.chosen] == ["B"]


def test_depth_and_width_schedules():
    endless = {"x" * d: {"x": (0.5, 0.0, None)} for d in range(9)}
    world = World(endless)
    tree = run(world, changed(ONE, iterations=9, depth=3, width=(4, 2)))
    assert (
        world.expanded == [("", 4), ("x", 2), ("xx", 2)] and max(n.depth for n in tree.nodes) == 3
    )
    # Re-rooted, the limit restarts at each step; max_steps ends a search that would never end.
    world = World(endless)
    tree = asyncio.run(
        grow(
            changed(ONE, iterations=9, depth=2, reroot="step", max_steps=3),
            world.expand,
            world.evaluate,
        )
    )
    assert max(n.depth for n in tree.nodes) == 4 and not any(n.terminal for n in tree.nodes)


def test_no_continuations_end_the_search():
    world = World({})
    tree = asyncio.run(grow(changed(ONE, reroot="step"), world.expand, world.evaluate))
    assert (
        len(tree.nodes) == 1
        and descend(tree, tree.root, ONE) == [tree.root]
        and world.expanded == [("", 2)]
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"depth": 0},
        {"width": ()},
        {"width": (4, 0)},
        {"parallel": 0},
        {"max_steps": 0},
        {"gamma": -0.1},
        {"exploration": math.nan},
    ],
)
def test_invalid_search_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=f"\n{next(iter(wrong))}"):
        MCTSSettings(**wrong)
