"""Refinement search on toy trees.

A text is its path from the root: "r" -> "r0", "r1", "r2" -> "r00" ...
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayhf.search.refine import Draft, RefineSettings, RefineVerdict, refine_search, root_node

SETTINGS = RefineSettings(
    branch=3, beam=2, depth=3, gate=0.5, max_nodes=1000, refine_retries=2, judge_retries=2
)


def votes(yes, total=5):
    return RefineVerdict(yes=yes, no=total - yes, critique=f"{yes} of {total}")


class Toy:
    """Refiner and judge.

    `yes` maps texts to votes of five (default 1) or to a list of verdicts, one per request for
    votes; `drafts` maps a parent to the refinements of each request, which replace its children.
    """

    def __init__(self, yes=None, drafts=None):
        self.yes = yes or {}
        self.drafts = {k: [list(r) for r in v] for k, v in (drafts or {}).items()}
        self.refined = []
        self.judged = []
        self.made = {}

    async def refine(self, requests):
        self.refined.append([(node.text, n) for node, n in requests])
        return [self._drafts(node, n) for node, n in requests]

    def _drafts(self, node, n):
        if node.text in self.drafts:
            texts = self.drafts[node.text].pop(0) if self.drafts[node.text] else [None] * n
            return [Draft(text=text, source=0) for text in texts]
        first = self.made.get(node.text, 0)
        self.made[node.text] = first + n
        return [Draft(text=f"{node.text}{i}", source=i) for i in range(first, first + n)]

    async def judge(self, drafts):
        self.judged.append([draft.text for draft in drafts])
        return [self._verdict(draft.text) for draft in drafts]

    def _verdict(self, text):
        verdict = self.yes.get(text, 1)
        return verdict.pop(0) if isinstance(verdict, list) else votes(verdict)


def search(toy, *, root=1, known=None, **changes):
    start = root_node("r", votes(root), source=7)
    settings = RefineSettings.model_validate(SETTINGS.model_dump() | changes)
    return asyncio.run(
        refine_search(start, refine=toy.refine, judge=toy.judge, settings=settings, known=known)
    )


def texts(tree):
    return [node.text for node in tree.nodes]


def test_breadth_first_by_hand():
    toy = Toy({"r1": 2, "r2": 2, "r10": 0, "r22": 2})
    tree = search(toy)
    assert toy.refined == [[("r", 3)], [("r1", 3), ("r2", 3)], [("r22", 3), ("r11", 3)]]
    assert toy.judged[1] == ["r10", "r11", "r12", "r20", "r21", "r22"]
    assert (len(tree.nodes), tree.tried, tree.malformed, tree.dropped, tree.passed) == (
        16,
        15,
        0,
        0,
        False,
    )
    assert tree.nodes[tree.final].text == "r1"  # 0.4 like r2 and r22, and made first
    by_text = {node.text: node for node in tree.nodes}
    assert (
        by_text["r22"].parent == by_text["r2"].id
        and by_text["r22"].depth == 2
        and by_text["r22"].value == pytest.approx(0.4)
    )
    assert [node.id for node in tree.nodes] == list(range(16)) and by_text["r"].source == 7


def test_whole_level_is_judged_and_its_best_passes():
    toy = Toy({"r00": 3, "r11": 5, "r12": 5})
    tree = search(toy)
    assert tree.passed and tree.nodes[tree.final].text == "r11" and tree.tried == 9
    assert len(toy.refined) == 2


def test_depth_first_follows_the_best_and_backtracks():
    toy = Toy({"r2": 2, "r21": 2, "r120": 4})
    tree = search(toy, search="dfs")
    expanded = [batch[0][0] for batch in toy.refined]
    assert expanded == ["r", "r2", "r21", "r20", "r0", "r00", "r01"]
    assert not tree.passed and tree.nodes[tree.final].text == "r2"
    toy = Toy({"r2": 2, "r0": 2, "r012": 3})
    tree = search(toy, search="dfs")
    assert [batch[0][0] for batch in toy.refined] == ["r", "r0", "r00", "r01"]
    assert tree.passed and tree.nodes[tree.final].text == "r012" and tree.tried == 12


@pytest.mark.parametrize(
    ("order", "budget", "expected"),
    [
        ("bfs", 4, [[("r", 3)], [("r0", 1)]]),
        ("bfs", 7, [[("r", 3)], [("r0", 3), ("r1", 1)]]),
        ("bfs", 2, [[("r", 2)]]),
        ("dfs", 7, [[("r", 3)], [("r0", 3)], [("r00", 1)]]),
        ("dfs", 6, [[("r", 3)], [("r0", 3)]]),
    ],
)
def test_budget_counts_refinements_and_favors_better_parents(order, budget, expected):
    toy = Toy()
    tree = search(toy, search=order, max_nodes=budget)
    assert toy.refined == expected
    assert tree.tried == budget and len(tree.nodes) == budget + 1


def test_budget_of_the_default_tree_never_binds():
    assert texts(search(Toy())) == texts(search(Toy(), max_nodes=RefineSettings().max_nodes))


def test_threshold_must_be_exceeded():
    toy = Toy({"r0": [RefineVerdict(yes=2, no=1)], "r00": [RefineVerdict(yes=3, no=1)]})
    tree = search(toy, gate=2 / 3)
    assert tree.nodes[tree.final].text == "r00" and tree.passed


@pytest.mark.parametrize("order", ["bfs", "dfs"])
def test_root_that_passes_is_the_result(order):
    toy = Toy()
    tree = search(toy, search=order, root=2, gate=0.3)
    assert (tree.passed, tree.final, tree.tried, toy.refined, toy.judged) == (True, 0, 0, [], [])


def test_fallback_may_be_the_root():
    toy = Toy({f"r{path}": 0 for path in ["0", "1", "2"]} | {"r00": 0})
    tree = search(toy, root=2, depth=1)
    assert (tree.passed, tree.final) == (False, 0)


def test_text_is_judged_once_and_is_in_the_beam_once():
    toy = Toy(drafts={"r": [["a", "a", "r"], ["b", "c", "c"]], "a": [["b", "a", "r"]]})
    tree = search(toy, depth=2, known={"b": votes(2)})
    assert toy.refined == [[("r", 3)], [("a", 3), ("r", 3)]]
    assert toy.judged == [["a"], ["c"]]
    assert texts(tree) == ["r", "a", "a", "r", "b", "a", "r", "b", "c", "c"]
    assert tree.final == 4 and tree.nodes[4].verdict == votes(2)


def test_tied_votes_are_repeated_and_then_dropped():
    even = RefineVerdict(yes=2, no=2, unparsable=1)
    none = RefineVerdict(yes=0, no=0, unparsable=5)
    toy = Toy({"r0": [even, none, even], "r1": [even, votes(4)], "r2": [votes(0)]})
    tree = search(toy)
    assert toy.judged == [["r0", "r1", "r2"], ["r0", "r1"], ["r0"]]
    assert tree.passed and tree.nodes[tree.final].text == "r1"
    assert texts(tree) == ["r", "r1", "r2"] and (tree.tried, tree.dropped) == (3, 1)


@pytest.mark.parametrize("order", ["bfs", "dfs"])
def test_judge_without_verdicts_ends_the_search(order):
    toy = Toy(dict.fromkeys(["r0", "r1", "r2"], RefineVerdict(yes=0, no=0, unparsable=5)))
    toy._verdict = toy.yes.get
    tree = search(toy, search=order)
    assert (texts(tree), tree.passed, tree.final, tree.dropped) == (["r"], False, 0, 3)
    assert len(toy.judged) == 1 + SETTINGS.judge_retries and len(toy.refined) == 1


def test_refinements_of_the_wrong_form_are_requested_again():
    toy = Toy({"a": 1, "b": 4}, drafts={"r": [[None, "a", None], [None, "b"]]})
    tree = search(toy)
    assert toy.refined == [[("r", 3)], [("r", 2)], [("r", 1)]]
    assert tree.nodes[tree.final].text == "b" and (tree.tried, tree.malformed) == (2, 4)
    never = search(Toy(drafts={"r": []}))
    assert (texts(never), never.passed, never.malformed, never.tried) == (["r"], False, 9, 0)


def test_search_needs_an_initial_critique():
    with pytest.raises(ValueError, match="2 yes and 2 no"):
        root_node("r", RefineVerdict(yes=2, no=2), source=0)


def test_value_and_majority_of_votes():
    assert (
        RefineVerdict(yes=3, no=1, unparsable=1).value,
        RefineVerdict(yes=0, no=0, unparsable=5).value,
    ) == (
        0.75,
        None,
    )
    assert [RefineVerdict(yes=y, no=n).settled for y, n in ((0, 0), (2, 2), (3, 2))] == [
        False,
        False,
        True,
    ]


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    order=st.sampled_from(["bfs", "dfs"]),
    branch=st.integers(1, 3),
    beam=st.integers(1, 3),
    depth=st.integers(1, 3),
    budget=st.integers(1, 20),
    gate=st.sampled_from([0.0, 0.5, 0.8]),
)
def test_invariants_of_the_tree_for_random_votes(data, order, branch, beam, depth, budget, gate):
    table = data.draw(st.lists(st.integers(0, 5), min_size=7, max_size=7))

    def toy():
        made = Toy()
        made._verdict = lambda text: RefineVerdict(
            yes=table[sum(map(ord, text)) % 7], no=5 - table[sum(map(ord, text)) % 7]
        )
        return made

    limits = {"branch": branch, "beam": beam, "depth": depth, "gate": gate, "max_nodes": budget}
    retries = {"refine_retries": 3, "judge_retries": 3}
    tree = search(toy(), search=order, root=0, **limits, **retries)
    assert tree == search(toy(), search=order, root=0, **limits, **retries)
    assert tree.tried <= budget and tree.tried == len(tree.nodes) - 1
    for node in tree.nodes[1:]:
        parent = tree.nodes[node.parent]
        assert (
            parent.id < node.id
            and node.depth == parent.depth + 1 <= depth
            and node.text.startswith(parent.text)
        )
    assert tree.passed == any(node.value > gate for node in tree.nodes)
    assert tree.nodes[tree.final].value == max(node.value for node in tree.nodes)
    if order == "bfs":
        for level in range(1, depth + 1):
            parents = {node.parent for node in tree.nodes if node.depth == level}
            assert len(parents) <= (1 if level == 1 else beam)
