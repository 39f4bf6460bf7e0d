"""Which examples go through the model together, and on which rank. Pure planning: lengths in,
indices out.

A micro-batch is padded to its longest row, so its cost is rows x longest row ("padded tokens").
Examples of like length are put together, up to a token budget. Every rank gets the same number of
micro-batches, because ZeRO's collectives run once per micro-batch on every rank: micro-batch j of
all ranks runs at the same time, so those are made alike in cost too. A rank short of work gets an
empty micro-batch; the engine still runs it, with zero weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayhf.errors import ConfigError

Micro = list[int]
"""Indices of the examples that go through the model at once."""


def plan(row_lengths: Sequence[Sequence[int]], *, ranks: int, budget: int) -> list[list[Micro]]:
    """Spread examples over ranks and micro-batches. Deterministic; every example appears exactly
    once.

    `row_lengths[e]` are the lengths of example e's rows in tokens (prompt plus response); an
    example's rows stay together. Returns, for each rank, the same number of micro-batches of at
    most `budget` padded tokens each; surplus ones are empty. Raises ConfigError where one example
    alone is over the budget, or has no row.
    """
    for index, lengths in enumerate(row_lengths):
        if not lengths:
            raise ConfigError(f"example {index} has no rows; expected at least one")
        if len(lengths) * max(lengths) > budget:
            raise ConfigError(
                f"token_budget is {budget}, but example {index} alone has {len(lengths)} rows of up to {max(lengths)} tokens; "
                f"it needs at least {len(lengths) * max(lengths)}"
            )
    order = sorted(range(len(row_lengths)), key=lambda e: (-max(row_lengths[e]), e))
    micros = _fill(order, row_lengths, budget)
    _split_until_even(micros, row_lengths, ranks)
    micros.sort(key=lambda micro: (-padded_tokens(micro, row_lengths), micro))
    micros += [[] for _ in range(-len(micros) % ranks)]
    return _deal(micros, row_lengths, ranks)


def padded_tokens(micro: Sequence[int], row_lengths: Sequence[Sequence[int]]) -> int:
    """What a micro-batch costs: rows x longest row, in tokens."""
    return sum(len(row_lengths[e]) for e in micro) * max(
        (max(row_lengths[e]) for e in micro), default=0
    )


def _fill(order: Sequence[int], row_lengths: Sequence[Sequence[int]], budget: int) -> list[Micro]:
    """Cut the examples, longest first, into micro-batches as full as the budget allows."""
    micros: list[Micro] = []
    rows = longest = 0
    for example in order:
        lengths = row_lengths[example]
        if not micros or (rows + len(lengths)) * longest > budget:
            micros.append([])
            rows, longest = 0, max(lengths)
        micros[-1].append(example)
        rows += len(lengths)
    return micros


def _split_until_even(
    micros: list[Micro], row_lengths: Sequence[Sequence[int]], ranks: int
) -> None:
    """Halve the dearest micro-batches until their number divides by the ranks, or none can be
    halved."""
    while len(micros) % ranks:
        divisible = [micro for micro in micros if len(micro) > 1]
        if not divisible:
            return
        dearest = max(divisible, key=lambda micro: (padded_tokens(micro, row_lengths), micro))
        micros.remove(dearest)
        middle = len(dearest) // 2
        micros += [dearest[:middle], dearest[middle:]]


def _deal(
    micros: Sequence[Micro], row_lengths: Sequence[Sequence[int]], ranks: int
) -> list[list[Micro]]:
    """Deal neighbors in cost to different ranks, the dearest of each round to the rank with the
    least work so far."""
    hands: list[list[Micro]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for start in range(0, len(micros), ranks):
        by_work = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, micro in zip(by_work, micros[start : start + ranks], strict=True):
            hands[rank].append(micro)
            work[rank] += padded_tokens(micro, row_lengths)
    return hands
