"""How much a text repeats others: clusters of similar texts, and each cluster's share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

_WORD = re.compile(r"\w+|[^\w\s]")


def repetition_clusters(texts: Sequence[str], similarity: float) -> list[int]:
    """Return the number of each text's cluster: (N,).

    A text joins the first cluster whose first text is at least `similarity` like it, in the order
    of `texts`. Likeness is the Jaccard index of the sets of neighboring words and signs, from 0 to
    1; case does not matter. R-Zero (Huang et al. 2025) clusters by BLEU instead.
    """
    pairs_of = {text: _pairs(text) for text in dict.fromkeys(texts)}
    leaders: list[frozenset[tuple[str, str]]] = []
    cluster_of: dict[str, int] = {}
    for text, pairs in pairs_of.items():
        cluster = next(
            (i for i, leader in enumerate(leaders) if _jaccard(pairs, leader) >= similarity), None
        )
        if cluster is None:
            cluster = len(leaders)
            leaders.append(pairs)
        cluster_of[text] = cluster
    return [cluster_of[text] for text in texts]


def cluster_shares(clusters: Sequence[int]) -> list[float]:
    """Return the share of all texts that are in each text's cluster: (N,)."""
    sizes = Counter(clusters)
    return [sizes[cluster] / len(clusters) for cluster in clusters]


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    words = ["", *_WORD.findall(text.casefold()), ""]
    return frozenset(pairwise(words))


def _jaccard(first: frozenset[tuple[str, str]], second: frozenset[tuple[str, str]]) -> float:
    return len(first & second) / len(first | second)
