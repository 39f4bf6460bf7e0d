"""Monte Carlo tree search over steps of text. Xie et al. 2024 (2405.00451), section 2.1.

In: `expand` (continue a node by so many steps) and `evaluate` (how good is a node), both
coroutines, and settings. Out: a Tree, which is data: it can be stored, read back and looked at.

One iteration selects by PUCT from the root to a leaf, expands the leaf, evaluates all its children
and backs up:

    select    argmax of Q + c * p * sqrt(N_parent) / (1 + N)
    reward    r = R - R_parent, R what `evaluate` said of the node (0 for the root): the paper's
              advantage form
    backup    N += 1;  V = sum max(1, N_c) Q_c / sum max(1, N_c) over the children;  Q = r + gamma *
              V

An evaluated child that was never selected weighs as one visit in V, as in the authors' code. A
child that could not be evaluated has no R: it is neither selected nor backed up, and counted. N and
Q belong to the edge into a node, so they are written only by searches that start above it: when the
root moves on, what led to the choice stays as it was (the authors' code goes on counting there,
which makes the chosen step look ever surer than its siblings). N_parent is 1 + the children's N:
the expansion and what came after, once per iteration (the authors' code counts a root twice).

Equal inputs give an equal tree: no clock, no arrival order. All model calls of a wave are asked for
in one order before any is awaited, children's evaluations wait for all of the wave's expansions,
and ties go to the older node.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayhf.errors import ConfigError
from rayhf.types import Completion, Outcome

End = Literal["answer", "limit"]
"""Why nothing follows a node: the policy ended its turn, or no token is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One continuation of a node."""

    completion: Completion
    """Its own tokens only; an injected step, which nobody sampled, has NaN for log-probs."""
    end: End | None
    """None: the answer goes on."""
    gold: bool = False
    """Injected from the reference answer: a leak."""
    onward: Completion | None = None
    """What was written after it, to the end of the answer; None where the writer stopped, or was
    not let go on."""


@dataclass(slots=True, kw_only=True)
class TreeNode:
    """A place in the tree, and the edge that leads to it."""

    id: int
    """Position in Tree.nodes; the root is 0, a child comes after its parent."""
    parent: int | None
    step: Step | None
    """None for the root."""
    depth: int
    """Steps from the root."""
    prior: float = 1.0
    """p of PUCT, see `prior`."""
    estimate: float | None = None
    """R: what `evaluate` said; None where it could not."""
    outcome: Outcome | None = None
    """Of a node that ends an answer: what the scorer said, for whoever evaluates to fill in."""
    visits: int = 0
    """N: iterations that passed through the edge."""
    reward: float = 0.0
    """r."""
    value: float = 0.0
    """V over the children; 0 without."""
    q: float = 0.0
    chosen: bool = False
    """On the path that the search settled for."""
    expanded: bool = False
    children: list[int] = field(default_factory=list)
    onward: list[Completion] = field(default_factory=list)
    """Of its step, and of its duplicates."""
    pending: int = 0
    """Iterations of the wave under way that passed here."""

    @property
    def terminal(self) -> bool:
        return self.step is not None and self.step.end is not None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.step.completion.token_ids if self.step else ()

    @property
    def text(self) -> str:
        return self.step.completion.text if self.step else ""


@dataclass(slots=True)
class Tree:
    """Nodes in the order they were made, the root first."""

    nodes: list[TreeNode] = field(
        default_factory=lambda: [TreeNode(id=0, parent=None, step=None, depth=0, estimate=0.0)]
    )
    duplicates: int = 0
    """Steps that said exactly what a sibling says: left out."""

    @property
    def root(self) -> TreeNode:
        return self.nodes[0]

    def children(self, node: TreeNode) -> list[TreeNode]:
        return [self.nodes[child] for child in node.children]

    def path(self, node: TreeNode) -> list[TreeNode]:
        """From the root's child to `node`, both included; empty for the root."""
        found = []
        while node.parent is not None:
            found.append(node)
            node = self.nodes[node.parent]
        return found[::-1]

    def token_ids(self, node: TreeNode) -> tuple[int, ...]:
        """What was written from the root to the end of `node`."""
        return tuple(token for each in self.path(node) for token in each.token_ids)

    def attach(
        self, parent: TreeNode, steps: Sequence[Step], *, length_exponent: float
    ) -> list[TreeNode]:
        """Give `parent` its children, each text once; returns them. The first of equal steps stays,
        and keeps what was written after the others of the same tokens."""
        parent.expanded = True
        seen = {(child.text, child.terminal): child for child in self.children(parent)}
        fresh = []
        for step in steps:
            key = (step.completion.text, step.end is not None)
            if twin := seen.get(key):
                self.duplicates += 1
                if step.onward is not None and step.completion.token_ids == twin.token_ids:
                    twin.onward.append(step.onward)
                continue
            likelihood = 1.0 if step.gold else prior(step.completion.logprobs, length_exponent)
            node = TreeNode(
                id=len(self.nodes),
                parent=parent.id,
                step=step,
                depth=parent.depth + 1,
                prior=likelihood,
            )
            if step.onward is not None:
                node.onward.append(step.onward)
            seen[key] = node
            self.nodes.append(node)
            parent.children.append(node.id)
            fresh.append(node)
        return fresh


Expand = Callable[[Tree, TreeNode, int], Awaitable[Sequence[Step]]]
"""(tree, node, width) -> at most about `width` continuations, in a reproducible order; none where
the model has no room."""
Evaluate = Callable[[Tree, TreeNode], Awaitable[float | None]]
"""(tree, node) -> R of the node; None where it could not be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """Raises ConfigError for numbers that are no search."""

    iterations: int = 5
    """Per root."""
    depth: int = 4
    """Steps below the current root that may be expanded."""
    width: tuple[int, ...] = (4, 2)
    """Steps asked for at each depth from the tree's root; the last one holds for all below."""
    exploration: float = 1.0
    """c of PUCT."""
    gamma: float = 1.0
    length_exponent: float = 1.25
    reroot: Literal["step", "never"] = "step"
    """step: search, take the best step, search again from there, to the end of an answer. never:
    one search."""
    max_steps: int = 16
    """Searches at most, with `step`."""
    parallel: int = 1
    """Leaves that one wave expands together."""
    virtual_loss: float = -1.0
    """What an iteration under way is taken to bring back, in units of Q, so that the wave's next
    one looks elsewhere."""

    def __post_init__(self) -> None:
        counts = {
            "iterations": self.iterations,
            "depth": self.depth,
            "max_steps": self.max_steps,
            "parallel": self.parallel,
        }
        for name, count in (*counts.items(), *(("width", width) for width in self.width or (0,))):
            if count < 1:
                raise ConfigError(f"algorithm.{name}: {count} must be at least 1")
        for name, number in (("exploration", self.exploration), ("gamma", self.gamma)):
            if not (math.isfinite(number) and number >= 0.0):
                raise ConfigError(
                    f"algorithm.{name}: {number} must be finite and at least 0; try 1.0"
                )

    def width_at(self, node: TreeNode) -> int:
        return self.width[min(node.depth, len(self.width) - 1)]


def prior(logprobs: Sequence[float], length_exponent: float) -> float:
    """p = exp(sum of log-probs / length^1.25), in 0..1; 1 for an empty step.

    The authors use log-probs of the policy itself. Here they are those of the sampling policy,
    which is what completions carry: the same at temperature 1 and without top-p and top-k, sharper
    or flatter otherwise. Not normalized over siblings.
    """
    return math.exp(math.fsum(logprobs) / len(logprobs) ** length_exponent) if logprobs else 1.0


def parent_visits(siblings: Sequence[TreeNode]) -> int:
    """N of the parent of `siblings`: its expansion, and every iteration that went on to one of
    them."""
    return 1 + sum(node.visits for node in siblings)


def puct(node: TreeNode, siblings: Sequence[TreeNode], settings: SearchSettings) -> float:
    """Q + c * p * sqrt(N_parent) / (1 + N); each pending iteration counts as a visit that brought
    back the virtual loss."""
    above = parent_visits(siblings) + sum(other.pending for other in siblings)
    weight = max(1, node.visits)
    q = (
        node.q
        if not node.pending
        else (weight * node.q + node.pending * settings.virtual_loss) / (weight + node.pending)
    )
    return q + settings.exploration * node.prior * math.sqrt(above) / (
        1 + node.visits + node.pending
    )


def known_children(tree: Tree, node: TreeNode) -> list[TreeNode]:
    """The children that could be evaluated."""
    return [child for child in tree.children(node) if child.estimate is not None]


def descend(tree: Tree, root: TreeNode, settings: SearchSettings) -> list[TreeNode]:
    """The nodes from `root` to the leaf that PUCT leads to, both included."""
    path = [root]
    while siblings := known_children(tree, path[-1]):
        path.append(
            max(siblings, key=lambda node: (puct(node, siblings, settings), node.prior, -node.id))
        )
    return path


def mean_value(children: Sequence[TreeNode]) -> float:
    """V = sum max(1, N) Q / sum max(1, N); 0 without children. Exact sums: the order of the
    children cannot matter."""
    weights = [max(1, child.visits) for child in children]
    return (
        math.fsum(w * child.q for w, child in zip(weights, children, strict=True)) / sum(weights)
        if weights
        else 0.0
    )


def settle(tree: Tree, node: TreeNode, estimate: float | None) -> None:
    """Enter what `evaluate` said of a new node. Raises ValueError for a number that is not
    finite."""
    if estimate is None:
        return
    if not math.isfinite(estimate):
        raise ValueError(
            f"a node was evaluated as {estimate}; a node that cannot be judged is None"
        )
    assert node.parent is not None
    above = tree.nodes[node.parent].estimate
    assert (
        above is not None
    )  # a node that could not be evaluated is never selected, so it has no children
    node.estimate = estimate
    node.reward = node.q = estimate - above


def backup(tree: Tree, path: Sequence[TreeNode], gamma: float) -> None:
    """Carry the leaf's news up to, not into, the root `path[0]`, of which only V changes."""
    root, *edges = path
    for node in reversed(edges):
        node.visits += 1
        node.value = mean_value(known_children(tree, node))
        node.q = node.reward + gamma * node.value
    root.value = mean_value(known_children(tree, root))


async def search(
    tree: Tree, root: TreeNode, settings: SearchSettings, expand: Expand, evaluate: Evaluate
) -> None:
    """`settings.iterations` iterations from `root`, in waves of up to `settings.parallel`.

    A wave stops growing where it would expand a leaf a second time. An iteration that ends where
    nothing can be expanded (an answer, the depth limit) only counts a visit.
    """
    done = 0
    while done < settings.iterations:
        wave: list[list[TreeNode]] = []
        growing: list[TreeNode] = []
        while len(wave) < min(settings.parallel, settings.iterations - done):
            path = descend(tree, root, settings)
            leaf = path[-1]
            if not (leaf.terminal or leaf.expanded or leaf.depth - root.depth >= settings.depth):
                if leaf.pending:
                    break
                growing.append(leaf)
            for node in path:
                node.pending += 1
            wave.append(path)
        found = await asyncio.gather(
            *(expand(tree, leaf, settings.width_at(leaf)) for leaf in growing)
        )
        exponent = settings.length_exponent
        fresh = [
            n
            for leaf, steps in zip(growing, found, strict=True)
            for n in tree.attach(leaf, steps, length_exponent=exponent)
        ]
        estimates = await asyncio.gather(*(evaluate(tree, node) for node in fresh))
        for node, estimate in zip(fresh, estimates, strict=True):
            settle(tree, node, estimate)
        for path in wave:
            backup(tree, path, settings.gamma)
            for node in path:
                node.pending -= 1
        done += len(wave)


def choose(tree: Tree, node: TreeNode) -> TreeNode | None:
    """The step to go on with: most visits, then Q, then prior, then age. None where no child could
    be evaluated.

    The authors' code multiplies visits with 1 + the spread of the grandchildren's visits; the paper
    has nothing of the kind.
    """
    return max(
        known_children(tree, node), key=lambda n: (n.visits, n.q, n.prior, -n.id), default=None
    )


async def grow(settings: SearchSettings, expand: Expand, evaluate: Evaluate) -> Tree:
    """Search for an answer, and mark the path that was settled for.

    The path ends at an answer, at the token limit, or where nothing is known further down: a tree
    that reaches no answer is a tree like any other.
    """
    tree = Tree()
    node, searches = tree.root, 0
    limit = settings.max_steps if settings.reroot == "step" else 1
    while not node.terminal:
        if searches < limit:
            await search(tree, node, settings, expand, evaluate)
            searches += 1
        best = choose(tree, node)
        if best is None:
            break
        best.chosen, node = True, best
    return tree
