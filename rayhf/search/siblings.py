"""Preference pairs among the children of a tree's nodes. Xie et al. 2024 (2405.00451), section 2.2.

In: a Tree as `grow` left it. Out: pairs of siblings with soft labels, and the rows that train them.
Pure functions: no model, and randomness only from a generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rayhf.search.mcts import Tree, TreeNode, known_children
from rayhf.types import Completion, Prompt, Row

ROUNDING = 1e-9
"""Q closer than this are equal but for rounding."""


def join(parts: Sequence[Completion], finish_reason: Literal["stop", "length"]) -> Completion:
    """Consecutive completions as one. Texts were decoded one by one: a character that a cut step
    splits is lost."""
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(logp for part in parts for logp in part.logprobs),
        finish_reason=finish_reason,
    )


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
    """Of one tree, from the root down."""

    pairs: tuple[StepPair, ...]
    ties: int
    """Pairs that were considered and dropped: the margin was at most min_margin."""
    unvisited: int
    """Pairs dropped because neither step was ever visited: soft labels have no confidence in
    them."""


def soft_label(better_visits: int, worse_visits: int) -> float | None:
    """alpha = 1 / (N_better / N_worse + 1), at most 1/2: 1 - conf with conf = 1 / (1 + N_worse /
    max(1, N_better)).

    None without any visit, where the authors' code has full confidence: conf = 1.
    """
    if better_visits == worse_visits == 0:
        return None
    return min(1.0 - 1.0 / (1.0 + worse_visits / max(1, better_visits)), 0.5)


def step_pairs(
    tree: Tree,
    rng: np.random.Generator,
    *,
    levels: Literal["path", "all"] = "path",
    rule: Literal["worst", "random", "all"] = "worst",
    labels: Literal["soft", "hard"] = "soft",
    min_margin: float = 0.0,
    min_visits: int = 1,
    max_pairs: int = 8,
) -> StepPairs:
    """The best sibling (by Q, then visits, prior, age) over the worst, a random or every other one
    that it beats.

    levels: at the nodes on the chosen path (the root included), or at all. A best that beats nobody
    is one tie for the rules worst and random; for all, every sibling that is not beaten is one.
    """
    found: list[StepPair] = []
    ties = unvisited = 0
    places = [node for node in tree.nodes if levels == "all" or node.parent is None or node.chosen]
    for place in sorted(places, key=lambda node: (node.depth, node.id)):
        usable = [
            child
            for child in known_children(tree, place)
            if child.visits >= min_visits and child.token_ids
        ]
        if len(usable) < 2:
            continue
        best, *others = sorted(
            usable, key=lambda node: (-node.q, -node.visits, -node.prior, node.id)
        )
        beaten = [other for other in others if best.q - other.q > max(min_margin, ROUNDING)]
        if rule == "all":
            ties += len(others) - len(beaten)
        elif not beaten:
            ties += 1
        else:
            beaten = [beaten[-1] if rule == "worst" else beaten[int(rng.integers(len(beaten)))]]
        for worse in beaten:
            smoothing = soft_label(best.visits, worse.visits) if labels == "soft" else 0.0
            if smoothing is None:
                unvisited += 1
            else:
                found.append(
                    StepPair(
                        better=best, worse=worse, margin=best.q - worse.q, label_smoothing=smoothing
                    )
                )
    return StepPairs(pairs=tuple(found[:max_pairs]), ties=ties, unvisited=unvisited)


def pair_rows(prompt: Prompt, tree: Tree, pair: StepPair, *, merge_chains: bool) -> tuple[Row, Row]:
    """(better, worse): the prompt and the steps they share as context, and the tokens from where
    the two differ.

    At least one token of each is left as response, also where one step is the beginning of the
    other. Row.sample is node - 1, the node's place among its group's samples.
    """
    spans = [_span(tree, node, merge_chains) for node in (pair.better, pair.worse)]
    first, second = (span.token_ids for span in spans)
    limit = min(len(first), len(second)) - 1
    shared = next((i for i in range(limit) if first[i] != second[i]), limit)
    assert pair.better.parent is not None
    context = (*prompt.token_ids, *tree.token_ids(tree.nodes[pair.better.parent]), *first[:shared])
    better, worse = (
        Row(
            prompt_id=prompt.prompt_id,
            sample=node.id - 1,
            prompt_ids=context,
            response_ids=span.token_ids[shared:],
            tokens={"behavior_logp": np.asarray(span.logprobs[shared:], dtype=np.float32)},
            scalars={"score": node.q, "truncated": float(span.finish_reason == "length")},
        )
        for node, span in zip((pair.better, pair.worse), spans, strict=True)
    )
    return better, worse


def _span(tree: Tree, node: TreeNode, merge_chains: bool) -> Completion:
    """A step's completion; with `merge_chains` up to the next place where the tree branches or
    ends."""
    chain = [node]
    while merge_chains and len(chain[-1].children) == 1:
        chain += tree.children(chain[-1])
    parts = [each.step.completion for each in chain if each.step is not None]
    return join(parts, parts[-1].finish_reason)
