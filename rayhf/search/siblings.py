"""Preference pairs among siblings of a search tree. Xie et al. 2024 (2405.00451), section 2.2.

In: a Tree as `grow` returned it. Out: pairs of siblings with soft labels, and the rows that train
on them. Pure functions: no model, and randomness only from a generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from rayhf.config.base import Section
from rayhf.search.mcts import Tree, TreeNode, known_children
from rayhf.types import Completion, Prompt, Row, float_array, token_array

_ROUNDING = 1e-9
"""Values of Q that differ by less are equal but for rounding."""


class StepPairSettings(Section):
    """Which siblings become preference pairs.

    Sources of the defaults as in `rayhf.search.mcts.MCTSSettings`.
    """

    levels: Literal["path", "all"] = "path"
    """path: pairs among the children of the nodes on the chosen path (code). all: of every expanded
    node."""
    pairs: Literal["worst", "random", "all"] = "worst"
    """Best Q against the lowest (paper); against a random sibling that it beats (code, by accident:
    a flag that cannot be switched off overrides the scripts' choice of the worst); against every
    sibling that it beats (ours)."""
    min_margin: NonNegativeFloat = 0.0
    """Steps whose Q differs by this or less are ties: dropped and counted."""
    min_visits: NonNegativeInt = 1
    """Steps visited less often make no pairs (ours; 0 is the code). Two unvisited ones never make a
    pair with soft labels."""
    max_pairs: PositiveInt = 8
    """Maximum number of pairs per prompt, from the root down (code)."""
    merge_chains: bool = False
    """Train on a step that has only one continuation together with it (code)."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: label smoothing 1 / (N_better / N_worse + 1), at most 1/2 (paper; code clips). Needs
    loss sigmoid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPair:
    """Two children of one node."""

    better: TreeNode
    worse: TreeNode
    margin: float
    """Q of the better minus Q of the worse; above min_margin."""
    label_smoothing: float
    """Probability that the label is wrong, 0 to 1/2: 0 for hard labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPairs:
    """Pairs of one tree, from the root down."""

    pairs: tuple[StepPair, ...]
    ties: int
    """Candidate pairs dropped because the margin was at most min_margin."""
    unvisited: int
    """Pairs dropped because neither step was ever visited: soft labels have no confidence in
    them."""


def soft_label(better_visits: int, worse_visits: int) -> float | None:
    """Return alpha = 1 / (N_better / N_worse + 1), at most 1/2.

    That is 1 - conf with conf = 1 / (1 + N_worse / max(1, N_better)). None without any visit, where
    the authors' code has full confidence: conf = 1.
    """
    if better_visits == worse_visits == 0:
        return None
    return min(1.0 - 1.0 / (1.0 + worse_visits / max(1, better_visits)), 0.5)


def step_pairs(tree: Tree, rng: np.random.Generator, settings: StepPairSettings) -> StepPairs:
    """Pair the best sibling (by Q, then visits, prior, age) with others that it beats.

    A best sibling that beats none is one tie for the rules worst and random; for all, every sibling
    that is not beaten is one.
    """
    pairs: list[StepPair] = []
    ties = 0
    unvisited = 0
    for parent in _parents(tree, settings):
        siblings = [
            child
            for child in known_children(tree, parent)
            if child.visits >= settings.min_visits and child.token_ids.size
        ]
        if len(siblings) < 2:
            continue
        best, *others = sorted(
            siblings, key=lambda node: (-node.q, -node.visits, -node.prior, node.id)
        )
        threshold = max(settings.min_margin, _ROUNDING)
        beaten = [other for other in others if best.q - other.q > threshold]
        if settings.pairs == "all":
            ties += len(others) - len(beaten)
        elif not beaten:
            ties += 1
        elif settings.pairs == "worst":
            beaten = [beaten[-1]]
        else:
            beaten = [beaten[int(rng.integers(len(beaten)))]]
        for worse in beaten:
            smoothing = 0.0 if settings.labels == "hard" else soft_label(best.visits, worse.visits)
            if smoothing is None:
                unvisited += 1
                continue
            pair = StepPair(
                better=best, worse=worse, margin=best.q - worse.q, label_smoothing=smoothing
            )
            pairs.append(pair)
    return StepPairs(pairs=tuple(pairs[: settings.max_pairs]), ties=ties, unvisited=unvisited)


def _parents(tree: Tree, settings: StepPairSettings) -> list[TreeNode]:
    """Return the nodes whose children are paired, from the root down."""
    parents = [
        node
        for node in tree.nodes
        if settings.levels == "all" or node.parent is None or node.chosen
    ]
    return sorted(parents, key=lambda node: (node.depth, node.id))


def pair_rows(prompt: Prompt, tree: Tree, pair: StepPair, *, merge_chains: bool) -> tuple[Row, Row]:
    """Return the rows (better, worse) of a pair.

    The context is what both continue and all tokens that they share; the response is the rest. At
    least one token of each is left as response, also where one step is the beginning of the other.
    Row.sample is node - 1, the node's place among its group's samples.
    """
    spans = [_span(tree, node, merge_chains) for node in (pair.better, pair.worse)]
    first, second = (span.token_ids for span in spans)
    limit = min(len(first), len(second)) - 1
    differ = np.flatnonzero(first[:limit] != second[:limit])
    shared = int(differ[0]) if differ.size else limit
    before = tree.context_ids(pair.better, prompt.token_ids)
    context = token_array(np.concatenate((before, first[:shared])))
    better, worse = (
        Row(
            prompt_id=prompt.prompt_id,
            sample=node.id - 1,
            prompt_ids=context,
            response_ids=span.token_ids[shared:],
            tokens={"behavior_logp": span.logprobs[shared:]},
            scalars={"score": node.q, "truncated": float(span.finish_reason == "length")},
        )
        for node, span in zip((pair.better, pair.worse), spans, strict=True)
    )
    return better, worse


def _span(tree: Tree, node: TreeNode, merge_chains: bool) -> Completion:
    """Return a step's completion.

    With `merge_chains` it continues to the next node where the tree branches or ends.
    """
    chain = [node]
    while merge_chains and len(chain[-1].children) == 1:
        chain += tree.children(chain[-1])
    parts = [each.step.completion for each in chain if each.step is not None]
    return join(parts, parts[-1].finish_reason)


def join(parts: Sequence[Completion], finish_reason: Literal["stop", "length"]) -> Completion:
    """Return consecutive completions as one.

    Its text is that of the parts, which were decoded one by one: not always that of all tokens,
    because some decoders strip a leading space, and a character may be split between two parts.
    """
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=token_array(np.concatenate([part.token_ids for part in parts])),
        logprobs=float_array(np.concatenate([part.logprobs for part in parts])),
        finish_reason=finish_reason,
    )
