"""Tree search over refinements of one text, breadth-first or depth-first. Cheng et al. 2024 (SPaR),
ALGORITHMS.md A4.4.

In: a failing text with its verdict, a callable that refines and one that judges, limits. Out: a
RefineTree, plain data. A node's value is the share of yes among its parsable votes. The search ends
with the first set of siblings (breadth-first: the first level) whose best value passes the gate;
else when depth or budget are used up, with the best node there is.

Who waits for whom: the callables get everything that can be asked for at once and are awaited as
one, so the order of requests follows from the tree alone, never from which answer came first. Equal
callables give equal trees.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineVerdict:
    """Votes on one text, and the judgement that stands for them."""

    yes: int
    no: int
    unparsable: int = 0
    critique: str = ""
    """The first judgement that agrees with the majority; empty where there is no majority."""
    source: int | None = None
    """Where the critique came from; a number of the caller's."""

    @property
    def settled(self) -> bool:
        """Whether there is a majority; unparsable votes count for nobody."""
        return self.yes != self.no

    @property
    def unanimous(self) -> bool:
        """Whether the parsable votes agree."""
        return not (self.yes and self.no)

    @property
    def value(self) -> float | None:
        """Share of yes among the parsable votes; None where no vote could be parsed."""
        votes = self.yes + self.no
        return self.yes / votes if votes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One refinement as it was written."""

    text: str | None
    """The refined answer; None where the form was wrong."""
    source: int
    """Where it came from; a number of the caller's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineNode:
    """A text with a majority verdict."""

    id: int
    """Position in the tree's nodes."""
    parent: int | None
    """None for the root."""
    depth: int
    """Refinements between the root and this text."""
    text: str
    verdict: RefineVerdict
    value: float
    source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineLimits:
    """How far a search may go."""

    branch: int = 3
    """Refinements of one text."""
    beam: int = 2
    """How many of a level (bfs) or of a text's refinements (dfs) are refined further."""
    depth: int = 3
    gate: float = 0.5
    """A text passes where its value is above this."""
    max_nodes: int = 15
    """Refinements of the right form, judged or known, that a search may have; copies and dropped
    ones count."""
    refine_retries: int = 3
    """Further requests for refinements whose form was wrong."""
    judge_retries: int = 3
    """Further rounds of votes where they are even."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTree:
    """What a search made."""

    nodes: tuple[RefineNode, ...]
    """The root first, in the order of their making."""
    final: int
    """The node that passed the gate, or the best there is (of equals the first)."""
    passed: bool
    tried: int
    """Refinements of the right form."""
    malformed: int
    """Refinements of the wrong form."""
    dropped: int
    """Refinements without a majority verdict: in no tree."""


Refine = Callable[[Sequence[tuple[RefineNode, int]]], Awaitable[Sequence[Sequence[Draft]]]]
"""For each (node, n) at most n drafts."""
Judge = Callable[[Sequence[Draft]], Awaitable[Sequence[RefineVerdict]]]
"""One verdict for each draft; their texts differ and are never None."""
Found = tuple[RefineNode, str, Draft]
"""A parent, a refined text, and the draft it stands in."""


async def refine_search(
    root: RefineNode,
    *,
    refine: Refine,
    judge: Judge,
    limits: RefineLimits,
    order: Literal["bfs", "dfs"] = "bfs",
    known: Mapping[str, RefineVerdict] | None = None,
) -> RefineTree:
    """Search for a refinement of `root` that passes the gate. A text is judged once: `known`
    verdicts, the root's own and earlier ones of this search stand.
    """
    search = _Search(root, refine, judge, limits, known or {})
    if root.value > limits.gate:
        return search.tree(root)
    return await (search.breadth_first(root) if order == "bfs" else search.depth_first(root))


def root_node(text: str, verdict: RefineVerdict, source: int) -> RefineNode:
    """Raises ValueError for a text without a majority verdict: there would be no critique to refine
    by."""
    if not verdict.settled or verdict.value is None:
        raise ValueError(
            f"a search starts from a settled verdict, got {verdict.yes} yes and {verdict.no} no"
        )
    return RefineNode(
        id=0, parent=None, depth=0, text=text, verdict=verdict, value=verdict.value, source=source
    )


class _Search:
    """One search under way."""

    def __init__(
        self,
        root: RefineNode,
        refine: Refine,
        judge: Judge,
        limits: RefineLimits,
        known: Mapping[str, RefineVerdict],
    ) -> None:
        self.nodes = [root]
        self._refine, self._judge, self._limits = refine, judge, limits
        self._verdicts = {**known, root.text: root.verdict}
        self._tried = self._malformed = self._dropped = 0

    async def breadth_first(self, root: RefineNode) -> RefineTree:
        level = [root]
        while level and level[0].depth < self._limits.depth and self._left:
            children = await self._expand(level)
            if children and children[0].value > self._limits.gate:
                return self.tree(children[0])
            level = self._best(children)
        return self.tree(None)

    async def depth_first(self, root: RefineNode) -> RefineTree:
        stack = [root]
        while stack and self._left:
            children = await self._expand([stack.pop()])
            if children and children[0].value > self._limits.gate:
                return self.tree(children[0])
            if children and children[0].depth < self._limits.depth:
                stack += reversed(self._best(children))
        return self.tree(None)

    def tree(self, passed: RefineNode | None) -> RefineTree:
        final = passed or min(self.nodes, key=lambda node: (-node.value, node.id))
        return RefineTree(
            nodes=tuple(self.nodes),
            final=final.id,
            passed=passed is not None,
            tried=self._tried,
            malformed=self._malformed,
            dropped=self._dropped,
        )

    @property
    def _left(self) -> int:
        return self._limits.max_nodes - self._tried

    def _best(self, ranked: Sequence[RefineNode]) -> list[RefineNode]:
        """The beam. Equal texts would be refined from equal prompts, so each stands in it once."""
        first: dict[str, RefineNode] = {}
        for node in ranked:
            first.setdefault(node.text, node)
        return list(first.values())[: self._limits.beam]

    async def _expand(self, parents: Sequence[RefineNode]) -> list[RefineNode]:
        """New nodes under `parents`, best value first, of equals the one made first."""
        found = await self._drafts(parents)
        await self._settle(found)
        children = []
        for parent, text, draft in found:
            verdict = self._verdicts[text]
            if not verdict.settled or verdict.value is None:
                self._dropped += 1
                continue
            node = RefineNode(
                id=len(self.nodes),
                parent=parent.id,
                depth=parent.depth + 1,
                text=text,
                verdict=verdict,
                value=verdict.value,
                source=draft.source,
            )
            self.nodes.append(node)
            children.append(node)
        return sorted(children, key=lambda node: (-node.value, node.id))

    async def _drafts(self, parents: Sequence[RefineNode]) -> list[Found]:
        """`branch` refinements of each parent, fewer where the budget or the retries end; the
        better parent comes first."""
        wanted, left = [], self._left
        for _ in parents:
            wanted.append(min(self._limits.branch, left))
            left -= wanted[-1]
        found: list[list[Found]] = [[] for _ in parents]
        for _ in range(1 + self._limits.refine_retries):
            short = [i for i, n in enumerate(wanted) if len(found[i]) < n]
            if not short:
                break
            answers = await self._refine([(parents[i], wanted[i] - len(found[i])) for i in short])
            for i, drafts in zip(short, answers, strict=True):
                found[i] += [
                    (parents[i], draft.text, draft) for draft in drafts if draft.text is not None
                ]
                self._malformed += sum(draft.text is None for draft in drafts)
        self._tried += sum(map(len, found))
        return [entry for entries in found for entry in entries]

    async def _settle(self, found: Sequence[Found]) -> None:
        """Have every new text judged, again where its votes are even, until the retries end."""
        pending: dict[str, Draft] = {}
        for _, text, draft in found:
            if text not in self._verdicts:
                pending.setdefault(text, draft)
        for _ in range(1 + self._limits.judge_retries):
            if not pending:
                break
            verdicts = await self._judge(list(pending.values()))
            self._verdicts |= dict(zip(pending, verdicts, strict=True))
            pending = {
                text: draft for text, draft in pending.items() if not self._verdicts[text].settled
            }
