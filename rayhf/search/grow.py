"""Iterations of a Monte Carlo tree search: what is expanded, in which order, the path chosen.

In: a Tree, `expand` and `evaluate`, and settings (all in mcts.py, which also states the algorithm).
Out: the tree, grown. Model calls of a wave are started together, in a fixed order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rayhf.search.mcts import (
    Evaluate,
    Expand,
    MCTSSettings,
    Tree,
    TreeNode,
    backup,
    descend,
    known_children,
    record_estimate,
)


async def search(
    tree: Tree, root: TreeNode, settings: MCTSSettings, expand: Expand, evaluate: Evaluate
) -> None:
    """Run `settings.iterations` iterations from `root`, in waves of up to `settings.parallel`.

    A wave ends early where it would expand a leaf a second time. An iteration that ends where
    nothing can be expanded (the end of a completion, the depth limit) only counts a visit.
    """
    done = 0
    while done < settings.iterations:
        wave, leaves = _select_wave(tree, root, settings, settings.iterations - done)
        while leaves:
            await _expand_all(tree, leaves, settings, expand, evaluate)
            go_on = settings.expansion == "path"
            leaves = _extend(tree, root, wave, leaves, settings) if go_on else []
        for path in wave:
            backup(tree, path, settings.gamma)
            for node in path:
                node.pending -= 1
        done += len(wave)


async def _expand_all(
    tree: Tree,
    leaves: Sequence[TreeNode],
    settings: MCTSSettings,
    expand: Expand,
    evaluate: Evaluate,
) -> None:
    """Expand the leaves and evaluate all their children."""
    expansions = await asyncio.gather(
        *(expand(tree, leaf, settings.width_at(leaf)) for leaf in leaves)
    )
    created = [
        node
        for leaf, steps in zip(leaves, expansions, strict=True)
        for node in tree.attach(leaf, steps, length_exponent=settings.length_exponent)
    ]
    estimates = await asyncio.gather(*(evaluate(tree, node) for node in created))
    for node, estimate in zip(created, estimates, strict=True):
        record_estimate(tree, node, estimate)


def _extend(
    tree: Tree,
    root: TreeNode,
    wave: Sequence[list[TreeNode]],
    expanded: Sequence[TreeNode],
    settings: MCTSSettings,
) -> list[TreeNode]:
    """Extend the paths that end at a node just expanded; return the leaves to expand next.

    Each such node ends one path, so no two paths meet below.
    """
    ends = {node.id for node in expanded}
    leaves: list[TreeNode] = []
    for path in wave:
        if path[-1].id not in ends:
            continue
        below = descend(tree, path[-1], settings)[1:]
        for node in below:
            node.pending += 1
        path += below
        if below and _can_expand(path[-1], root, settings):
            leaves.append(path[-1])
    return leaves


def _can_expand(leaf: TreeNode, root: TreeNode, settings: MCTSSettings) -> bool:
    return not (leaf.terminal or leaf.expanded or leaf.depth - root.depth >= settings.depth)


def _select_wave(
    tree: Tree, root: TreeNode, settings: MCTSSettings, left: int
) -> tuple[list[list[TreeNode]], list[TreeNode]]:
    """Return the paths of the next wave, at most `left`, and the leaves that it expands."""
    wave: list[list[TreeNode]] = []
    leaves: list[TreeNode] = []
    while len(wave) < min(settings.parallel, left):
        path = descend(tree, root, settings)
        leaf = path[-1]
        if _can_expand(leaf, root, settings):
            if leaf.pending:
                break
            leaves.append(leaf)
        for node in path:
            node.pending += 1
        wave.append(path)
    return wave, leaves


def choose(tree: Tree, node: TreeNode) -> TreeNode | None:
    """Return the best child by visits, then Q, prior and age; None where no child has an estimate.

    The authors' code multiplies visits by 1 + the spread of the grandchildren's visits; the paper
    does not.
    """
    return max(
        known_children(tree, node), key=lambda n: (n.visits, n.q, n.prior, -n.id), default=None
    )


async def grow(settings: MCTSSettings, expand: Expand, evaluate: Evaluate) -> Tree:
    """Search for a completion, and mark the chosen path.

    The path ends at the end of a completion, at the token limit, or where no child has an estimate.
    """
    tree = Tree()
    node = tree.root
    searches = 0
    limit = settings.max_steps if settings.reroot == "step" else 1
    while not node.terminal:
        if searches < limit:
            await search(tree, node, settings, expand, evaluate)
            searches += 1
        best = choose(tree, node)
        if best is None:
            break
        best.chosen = True
        node = best
    return tree
