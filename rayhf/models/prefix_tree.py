"""Rows as a tree of tokens: a prefix that rows share is one path of nodes; without torch.

In: rows. Out: the nodes in depth-first order (a node comes before its descendants, and these follow
it without gap), so that the whole tree is two integers per node: its depth, which is its position
id, and the end of its subtree. Node j is an ancestor of node i, or i itself, exactly where
j <= i < end[j]: that is the attention mask.

Several trees in one sequence are a forest: their subtrees do not overlap, so no node sees another
tree. The last token of a row predicts no trained token, so it is no node.

N nodes, T response tokens of all rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayhf.types import Row, TokenArray

Ints = npt.NDArray[np.int64]

MIN_SHARED = 32
"""Shortest prefix in tokens that rows of different prompts share, such as a system prompt.

Shorter ones (the beginning of a chat template) would join unrelated rows into one tree.
"""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A forest of token nodes, and the nodes that predict the rows' response tokens."""

    ids_N: Ints
    depth_N: Ints
    end_N: Ints
    """First node after each node's subtree."""
    predict_T: Ints
    """In the order of the rows; rows that share a node repeat it."""


def sort_key(tokens: TokenArray) -> bytes:
    """Return a sort key: in its order, sequences that share a prefix are neighbors."""
    return tokens.tobytes()


def shared_prefix(first: TokenArray, second: TokenArray) -> int:
    """Return the number of leading tokens that two sequences share."""
    limit = min(len(first), len(second))
    different = first[:limit] != second[:limit]
    return int(different.argmax()) if different.any() else limit


def build_tree(rows: Sequence[Row], *, share: bool) -> PrefixTree:
    """Return the forest of at least one row; without `share` every row is a tree of its own.

    In order, rows that share a prefix are neighbors: each row adds the nodes that the one before it
    lacks.
    """
    tokens = [row.fed_ids for row in rows]
    order = _in_order(rows, tokens) if share else range(len(rows))
    ids: list[Ints] = []
    depth: list[Ints] = []
    ends: list[tuple[Ints, int]] = []
    predict: dict[int, Ints] = {}
    path = np.empty(0, dtype=np.int64)
    previous: int | None = None
    count = 0
    for index in order:
        shared = _shared(rows, tokens, previous, index) if share and previous is not None else 0
        new = len(tokens[index]) - shared
        ids.append(tokens[index][shared:].astype(np.int64))
        depth.append(np.arange(shared, shared + new))
        ends.append((path[shared:], count))  # the branch that this row leaves
        path = np.concatenate([path[:shared], np.arange(count, count + new)])
        predict[index] = path[rows[index].predicted_at]
        previous = index
        count += new
    ends.append((path, count))
    end_N = np.empty(count, dtype=np.int64)
    for nodes, end in ends:
        end_N[nodes] = end
    return PrefixTree(
        ids_N=np.concatenate(ids),
        depth_N=np.concatenate(depth),
        end_N=end_N,
        predict_T=np.concatenate([predict[index] for index in range(len(rows))]),
    )


def _in_order(rows: Sequence[Row], tokens: Sequence[TokenArray]) -> list[int]:
    """Sort rows by tokens, with those of a prompt together."""
    keys = [sort_key(ids) for ids in tokens]
    first: dict[str, bytes] = {}
    for row, key in zip(rows, keys, strict=True):
        first[row.prompt_id] = min(first.get(row.prompt_id, key), key)

    def place(index: int) -> tuple[bytes, str, bytes]:
        prompt_id = rows[index].prompt_id
        return first[prompt_id], prompt_id, keys[index]

    return sorted(range(len(rows)), key=place)


def _shared(rows: Sequence[Row], tokens: Sequence[TokenArray], previous: int, index: int) -> int:
    shared = shared_prefix(tokens[previous], tokens[index])
    same_prompt = rows[previous].prompt_id == rows[index].prompt_id
    return shared if same_prompt or shared >= MIN_SHARED else 0


class DistinctTokens:
    """Count of the nodes of a growing set of rows of one prompt."""

    def __init__(self) -> None:
        self._sorted: list[TokenArray] = []
        self.count = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows; the longest prefix that one shares is with a neighbor in sorted order."""
        for row in rows:
            tokens = row.fed_ids
            place = bisect_left(self._sorted, sort_key(tokens), key=sort_key)
            neighbors = self._sorted[max(0, place - 1) : place + 1]
            shared = max((shared_prefix(tokens, other) for other in neighbors), default=0)
            self.count += len(tokens) - shared
            self._sorted.insert(place, tokens)
