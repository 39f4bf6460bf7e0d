"""Tree search over refinements of one text. Cheng et al. 2024 (SPaR, arXiv 2412.11605).

In: a failing text with its verdict, a callable that refines and one that judges, settings. Out: a
RefineTree, plain data. A node's value is the share of yes among its parsable votes. The search ends
with the first set of siblings (breadth-first: the first level) whose best value passes the gate;
otherwise, when depth or budget are used up, with the best node of the tree.

Synchronization: each call passes everything that can be requested at once and is awaited as a
whole, so the order of requests follows from the tree alone, never from the order of arrival. Equal
callables give equal trees.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rayhf.config.base import Section


class RefineSettings(Section):
    """How far a search for a refinement goes.

    Defaults are those of the paper's released code unless a line says ours.
    """

    search: Literal["bfs", "dfs", "none"] = "bfs"
    """none is the ablation: one refinement of the failing text, judged once, without retries;
    branch, beam, depth, max_nodes, judge_retries and refine_retries are not used."""
    branch: PositiveInt = 3
    """Refinements of one text."""
    beam: PositiveInt = 2
    """The best refinements that are refined further: of a level (bfs), of their parent (dfs)."""
    depth: PositiveInt = 3
    """Refinements in a row."""
    gate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A refinement is accepted where its share of yes among the parsable votes is above this."""
    max_nodes: PositiveInt = 15
    """Refinements per search. Only those of the right form count, duplicates and dropped ones
    included. Ours: what bfs needs with branch 3, beam 2, depth 3 (the code's 1000 never binds)."""
    judge_retries: NonNegativeInt = 3
    """Further votes on a refinement whose votes are even; then it is dropped. The even votes on a
    sampled completion are final."""
    refine_retries: NonNegativeInt = 3
    """Further requests for refinements that do not have the form of refined_pattern. (The code
    makes up to 3 x 3 requests.)"""

    def effective(self) -> RefineSettings:
        """Return the settings that apply: with search none, those of one refinement."""
        if self.search != "none":
            return self
        return RefineSettings(
            search="bfs",
            branch=1,
            beam=1,
            depth=1,
            gate=self.gate,
            max_nodes=1,
            refine_retries=0,
            judge_retries=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineVerdict:
    """Votes on one text, and the judgment that represents them."""

    yes: int
    no: int
    unparsable: int = 0
    critique: str = ""
    """The first judgment that agrees with the majority; empty where there is no majority."""
    source: int | None = None
    """The caller's index of the critique."""

    @property
    def settled(self) -> bool:
        """Whether there is a majority; unparsable votes do not count."""
        return self.yes != self.no

    @property
    def value(self) -> float | None:
        """Share of yes among the parsable votes; None where no vote could be parsed."""
        votes = self.yes + self.no
        return self.yes / votes if votes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One refinement as it was generated."""

    text: str | None
    """The refined text; None where the refinement does not have the right form."""
    source: int
    """The caller's index of the draft."""


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
    """The caller's index of the draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTree:
    """Result of a search."""

    nodes: tuple[RefineNode, ...]
    """The root first, in the order of their creation."""
    final: int
    """The node that passed the gate, or else the best one (of equals the first)."""
    passed: bool
    tried: int
    """Refinements of the right form."""
    malformed: int
    """Refinements of the wrong form."""
    dropped: int
    """Refinements without a majority verdict, which are not in the tree."""


Refine = Callable[[Sequence[tuple[RefineNode, int]]], Awaitable[Sequence[Sequence[Draft]]]]
"""For each (node, n) at most n drafts."""
Judge = Callable[[Sequence[Draft]], Awaitable[Sequence[RefineVerdict]]]
"""One verdict for each draft; their texts differ and are never None."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A draft of the right form, before its verdict is known."""

    parent: RefineNode
    text: str
    draft: Draft


async def refine_search(
    root: RefineNode,
    *,
    refine: Refine,
    judge: Judge,
    settings: RefineSettings,
    known: Mapping[str, RefineVerdict] | None = None,
) -> RefineTree:
    """Search for a refinement of `root` that passes the gate.

    Each text is judged once: `known` verdicts, the root's own and earlier ones of this search stay.
    """
    settings = settings.effective()
    search = _Search(root, refine, judge, settings, known or {})
    if root.value > settings.gate:
        return search.tree(root)
    if settings.search == "dfs":
        return await search.depth_first(root)
    return await search.breadth_first(root)


def root_node(text: str, verdict: RefineVerdict, source: int) -> RefineNode:
    """Return the root of a search.

    Raises ValueError for a text without a majority verdict: there would be no critique to refine
    by.
    """
    if not verdict.settled or verdict.value is None:
        raise ValueError(
            f"a search starts from a settled verdict, got {verdict.yes} yes and {verdict.no} no"
        )
    return RefineNode(
        id=0, parent=None, depth=0, text=text, verdict=verdict, value=verdict.value, source=source
    )


class _Search:
    """State of one search."""

    def __init__(
        self,
        root: RefineNode,
        refine: Refine,
        judge: Judge,
        settings: RefineSettings,
        known: Mapping[str, RefineVerdict],
    ) -> None:
        self.nodes = [root]
        self._refine = refine
        self._judge = judge
        self._settings = settings
        self._verdicts = {**known, root.text: root.verdict}
        self._tried = 0
        self._malformed = 0
        self._dropped = 0

    async def breadth_first(self, root: RefineNode) -> RefineTree:
        level = [root]
        while level and level[0].depth < self._settings.depth and self._budget:
            children = await self._expand(level)
            if children and children[0].value > self._settings.gate:
                return self.tree(children[0])
            level = self._beam(children)
        return self.tree(None)

    async def depth_first(self, root: RefineNode) -> RefineTree:
        stack = [root]
        while stack and self._budget:
            children = await self._expand([stack.pop()])
            if children and children[0].value > self._settings.gate:
                return self.tree(children[0])
            if children and children[0].depth < self._settings.depth:
                stack += reversed(self._beam(children))
        return self.tree(None)

    def tree(self, passed: RefineNode | None) -> RefineTree:
        """Return the result, given the node that passed the gate."""
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
    def _budget(self) -> int:
        """Refinements that the search may still try."""
        return self._settings.max_nodes - self._tried

    def _beam(self, ranked: Sequence[RefineNode]) -> list[RefineNode]:
        """Return the nodes to refine further, each text once: equal texts give equal prompts."""
        first: dict[str, RefineNode] = {}
        for node in ranked:
            first.setdefault(node.text, node)
        return list(first.values())[: self._settings.beam]

    async def _expand(self, parents: Sequence[RefineNode]) -> list[RefineNode]:
        """Add the children of `parents`; return them by value, of equals the older one first."""
        candidates = await self._draft(parents)
        await self._judge_new(candidates)
        children = []
        for candidate in candidates:
            verdict = self._verdicts[candidate.text]
            if not verdict.settled or verdict.value is None:
                self._dropped += 1
                continue
            node = RefineNode(
                id=len(self.nodes),
                parent=candidate.parent.id,
                depth=candidate.parent.depth + 1,
                text=candidate.text,
                verdict=verdict,
                value=verdict.value,
                source=candidate.draft.source,
            )
            self.nodes.append(node)
            children.append(node)
        return sorted(children, key=lambda node: (-node.value, node.id))

    async def _draft(self, parents: Sequence[RefineNode]) -> list[_Candidate]:
        """Return `branch` refinements of each parent, fewer where budget or retries run out.

        The budget goes to the better parent first.
        """
        counts = []
        budget = self._budget
        for _ in parents:
            counts.append(min(self._settings.branch, budget))
            budget -= counts[-1]
        candidates: list[list[_Candidate]] = [[] for _ in parents]
        for _ in range(1 + self._settings.refine_retries):
            short = [i for i, count in enumerate(counts) if len(candidates[i]) < count]
            if not short:
                break
            requests = [(parents[i], counts[i] - len(candidates[i])) for i in short]
            responses = await self._refine(requests)
            for i, drafts in zip(short, responses, strict=True):
                candidates[i] += [
                    _Candidate(parents[i], draft.text, draft)
                    for draft in drafts
                    if draft.text is not None
                ]
                self._malformed += sum(draft.text is None for draft in drafts)
        self._tried += sum(map(len, candidates))
        return [candidate for of_parent in candidates for candidate in of_parent]

    async def _judge_new(self, candidates: Sequence[_Candidate]) -> None:
        """Judge every new text, again where its votes are even, until the retries run out."""
        pending: dict[str, Draft] = {}
        for candidate in candidates:
            if candidate.text not in self._verdicts:
                pending.setdefault(candidate.text, candidate.draft)
        for _ in range(1 + self._settings.judge_retries):
            if not pending:
                break
            verdicts = await self._judge(list(pending.values()))
            self._verdicts |= dict(zip(pending, verdicts, strict=True))
            pending = {
                text: draft for text, draft in pending.items() if not self._verdicts[text].settled
            }
