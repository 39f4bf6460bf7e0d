"""Batches of similar lengths under a budget of padded tokens; without torch.

In: row lengths in tokens. Out: indices, the longest rows first. A batch is padded to its longest
row, so it costs rows x longest row ("padded tokens"); sorting by length keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into batches of at most `budget` padded tokens; a longer row gets its own batch."""
    return pack_examples([(length,) for length in lengths], budget)


def pack_examples(row_lengths: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Cut examples into batches of at most `budget` padded tokens, or of one example.

    `row_lengths[e]` are the lengths of example e's rows, which stay together.
    """
    order = sorted(range(len(row_lengths)), key=lambda e: (-max(row_lengths[e]), e))
    batches: list[list[int]] = []
    rows = 0
    longest = 0
    for example in order:
        lengths = row_lengths[example]
        if not batches or (rows + len(lengths)) * longest > budget:
            batches.append([])
            rows = 0
            longest = max(lengths)
        batches[-1].append(example)
        rows += len(lengths)
    return batches
