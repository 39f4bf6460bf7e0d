"""Monte Carlo tree search over steps: lines of a text, or turns. Xie et al. 2024, section 2.1.

In: `expand` (generate continuations of a node) and `evaluate` (estimate how good a node is), both
coroutines, and settings. Out: a Tree, which is plain data: it can be stored, read back and drawn.

One iteration selects a leaf by PUCT from the root, expands the leaf and evaluates all its children,
goes on to the best of them by PUCT in the same way, to the end of a completion or the depth limit,
and backs up. With expansion leaf it backs up after the first.

    select    argmax of Q + c * p * sqrt(N_parent) / (1 + N)
    reward    r = R - R_parent, where R is the estimate of the node (0 for the root): the paper's
              advantage form
    backup    N += 1;  V = sum max(1, N_c) Q_c / sum max(1, N_c) over the children;  Q = r + gamma *
              V

A child that has an estimate but was never selected weighs as one visit in V, as in the authors'
code. A child without an estimate has no R: it is neither selected nor backed up.

N and Q belong to the edge into a node, so only searches that start above that edge write them: when
the root moves down, the statistics that led to the choice stay fixed. (The authors' code continues
to count there, which makes the chosen step look ever better than its siblings.) N_parent is 1 + the
children's N: the expansion and one visit per later iteration. (The authors' code counts a root
twice.)

Synchronization: equal inputs give an equal tree, independent of arrival order. All model calls of a
wave are started in a fixed order before any is awaited, children are evaluated after all expansions
of the wave have finished, and ties go to the older node.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from rayhf.config.base import Section
from rayhf.types import NO_TOKENS, Completion, FloatArray, Outcome, TokenArray, token_array

End = Literal["answer", "limit"]
"""Why a completion ends at a node: the policy ended its turn, or no token is left."""


class MCTSSettings(Section):
    """How far a Monte Carlo tree search goes.

    Beside each default: "paper" is the text of arXiv 2405.00451 (v2), "code" is YuxiXie/MCTS-DPO at
    fb23437, "ours" is a choice of this project.
    """

    iterations: PositiveInt = 5
    """Search iterations per root (paper: K = 5; code: 64)."""
    expansion: Literal["path", "leaf"] = "path"
    """What one iteration expands. path: every node on its way down, until a completion ends or the
    depth limit is reached (code). leaf: the first one only, as in Monte Carlo tree search with
    rollouts (ours): cheaper iterations, of which more are needed."""
    depth: PositiveInt = 4
    """Levels below the current root that are expanded (paper; code: 3 or 4)."""
    width: tuple[PositiveInt, ...] = Field(default=(4, 2), min_length=1)
    """Steps sampled per node, by depth from the prompt; the last number holds for all deeper levels
    (paper: 4-5, then 2-3)."""
    exploration: NonNegativeFloat = 1.0
    """c of PUCT (code)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount (code)."""
    length_exponent: NonNegativeFloat = 1.25
    """Exponent of the length in the prior exp(sum log p / length^1.25) (code)."""
    reroot: Literal["step", "never"] = "step"
    """step: search, take the best step, search again from it, to the end of the completion (paper).
    never: one search from the prompt."""
    max_steps: PositiveInt = 16
    """Maximum number of searches per prompt with reroot step (ours: the token limit alone would
    allow hundreds)."""
    parallel: PositiveInt = 1
    """Iterations under way together in one tree. 1 is the paper's; prompts fill the batch."""

    @property
    def virtual_loss(self) -> float:
        """Result assumed for an iteration in flight, in units of Q.

        It sends the next iteration of a wave elsewhere.
        """
        return -1.0

    def width_at(self, node: TreeNode) -> int:
        """Return the number of steps to sample below `node`."""
        return self.width[min(node.depth, len(self.width) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One continuation of a node."""

    completion: Completion
    """The step's own tokens only; an injected step was not sampled, so its log-probs are NaN."""
    end: End | None
    """None: more steps may follow."""
    context_ids: TokenArray | None = None
    """The tokens that it continues; None where those are the prompt and the steps above alone."""
    gold: bool = False
    """Whether the step was injected from the reference answer: a leak."""
    rollout: Completion | None = None
    """Text that the same request generated after the step, to the end of the completion; None where
    generation stopped with the step."""


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
    """R, the result of `evaluate`; None where there is none."""
    outcome: Outcome | None = None
    """Score of a node that ends a completion, set by `evaluate`."""
    visits: int = 0
    """N, the number of iterations that passed through the edge."""
    reward: float = 0.0
    """r."""
    value: float = 0.0
    """V over the children; 0 without children."""
    q: float = 0.0
    chosen: bool = False
    """Whether the node is on the path that the search chose."""
    expanded: bool = False
    children: list[int] = field(default_factory=list)
    rollouts: list[Completion] = field(default_factory=list)
    """Step.rollout of its step and of the step's duplicates."""
    pending: int = 0
    """Iterations of the current wave that passed through here."""

    @property
    def terminal(self) -> bool:
        """Whether a completion ends here."""
        return self.step is not None and self.step.end is not None

    @property
    def token_ids(self) -> TokenArray:
        """Tokens of the step; none for the root."""
        return self.step.completion.token_ids if self.step else NO_TOKENS

    @property
    def text(self) -> str:
        """Text of the step; empty for the root."""
        return self.step.completion.text if self.step else ""


@dataclass(slots=True)
class Tree:
    """Nodes in the order of their creation, the root first."""

    nodes: list[TreeNode] = field(
        default_factory=lambda: [TreeNode(id=0, parent=None, step=None, depth=0, estimate=0.0)]
    )
    duplicates: int = 0
    """Steps left out because a sibling has the same text."""

    @property
    def root(self) -> TreeNode:
        """The first node, which stands for the prompt."""
        return self.nodes[0]

    def children(self, node: TreeNode) -> list[TreeNode]:
        """Return the children of `node` in the order of their creation."""
        return [self.nodes[child] for child in node.children]

    def path(self, node: TreeNode) -> list[TreeNode]:
        """Return the nodes from the root's child to `node`, both included; none for the root."""
        upward = []
        while node.parent is not None:
            upward.append(node)
            node = self.nodes[node.parent]
        return upward[::-1]

    def token_ids(self, node: TreeNode) -> tuple[int, ...]:
        """Return the generated tokens from the root to the end of `node`."""
        return tuple(token for each in self.path(node) for token in each.token_ids.tolist())

    def context_ids(self, node: TreeNode, prompt_ids: Sequence[int]) -> TokenArray:
        """Return the tokens that the step of `node` continues."""
        assert node.step is not None and node.parent is not None
        if node.step.context_ids is not None:
            return node.step.context_ids
        return token_array((*prompt_ids, *self.token_ids(self.nodes[node.parent])))

    def attach(
        self, parent: TreeNode, steps: Sequence[Step], *, length_exponent: float
    ) -> list[TreeNode]:
        """Give `parent` its children, each text once, and return them.

        The first of equal steps stays, and keeps the rollouts of the others that have the same
        tokens.
        """
        parent.expanded = True
        by_text = {(child.text, child.terminal): child for child in self.children(parent)}
        created = []
        for step in steps:
            key = (step.completion.text, step.end is not None)
            if twin := by_text.get(key):
                self.duplicates += 1
                if step.rollout is not None and np.array_equal(
                    step.completion.token_ids, twin.token_ids
                ):
                    twin.rollouts.append(step.rollout)
                continue
            node = TreeNode(
                id=len(self.nodes),
                parent=parent.id,
                step=step,
                depth=parent.depth + 1,
                prior=1.0 if step.gold else prior(step.completion.logprobs, length_exponent),
            )
            if step.rollout is not None:
                node.rollouts.append(step.rollout)
            by_text[key] = node
            self.nodes.append(node)
            parent.children.append(node.id)
            created.append(node)
        return created


Expand = Callable[[Tree, TreeNode, int], Awaitable[Sequence[Step]]]
"""(tree, node, width) -> about `width` continuations in a reproducible order; none where the model
has no room left."""
Evaluate = Callable[[Tree, TreeNode], Awaitable[float | None]]
"""(tree, node) -> R of the node; None where it could not be evaluated."""


def prior(logprobs: FloatArray, length_exponent: float) -> float:
    """Return p = exp(sum of log-probs / length^length_exponent), in 0..1; 1 for an empty step.

    The log-probs are those of the policy at temperature 1, as the authors'. Not normalized over
    siblings.
    """
    if not logprobs.size:
        return 1.0
    return math.exp(math.fsum(logprobs.tolist()) / logprobs.size**length_exponent)


def parent_visits(siblings: Sequence[TreeNode]) -> int:
    """Return N of the parent of `siblings`: its expansion, and every visit to one of them."""
    return 1 + sum(node.visits for node in siblings)


def puct(node: TreeNode, siblings: Sequence[TreeNode], settings: MCTSSettings) -> float:
    """Return Q + c * p * sqrt(N_parent) / (1 + N).

    Each pending iteration counts as a visit that brought back the virtual loss.
    """
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
    """Return the children that have an estimate."""
    return [child for child in tree.children(node) if child.estimate is not None]


def descend(tree: Tree, root: TreeNode, settings: MCTSSettings) -> list[TreeNode]:
    """Return the nodes from `root` to the leaf that PUCT leads to, both included."""
    path = [root]
    while siblings := known_children(tree, path[-1]):
        path.append(
            max(siblings, key=lambda node: (puct(node, siblings, settings), node.prior, -node.id))
        )
    return path


def mean_value(children: Sequence[TreeNode]) -> float:
    """Return V = sum max(1, N) Q / sum max(1, N); 0 without children.

    The sum is exact, so the order of the children does not matter.
    """
    weights = [max(1, child.visits) for child in children]
    return (
        math.fsum(w * child.q for w, child in zip(weights, children, strict=True)) / sum(weights)
        if weights
        else 0.0
    )


def record_estimate(tree: Tree, node: TreeNode, estimate: float | None) -> None:
    """Store the result of `evaluate` in a new node.

    Raises ValueError for a number that is not finite.
    """
    if estimate is None:
        return
    if not math.isfinite(estimate):
        raise ValueError(
            f"the estimate of a node is {estimate}; `evaluate` must return a finite number, "
            "or None for a node that cannot be evaluated"
        )
    assert node.parent is not None
    above = tree.nodes[node.parent].estimate
    assert above is not None  # a node without an estimate is never selected: it has no children
    node.estimate = estimate
    node.reward = node.q = estimate - above


def backup(tree: Tree, path: Sequence[TreeNode], gamma: float) -> None:
    """Update the edges of `path` from the leaf up; of the root `path[0]` only V changes."""
    root, *edges = path
    for node in reversed(edges):
        node.visits += 1
        node.value = mean_value(known_children(tree, node))
        node.q = node.reward + gamma * node.value
    root.value = mean_value(known_children(tree, root))
