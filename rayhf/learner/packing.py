"""The plan of an optimizer step: which examples go through the model together, on which rank.

In: lengths. Out: indices; nothing here touches a tensor. A micro-batch costs rows x longest row
("padded tokens"), so examples of similar length share one, up to a token budget.

Synchronization: ZeRO's collectives run once per micro-batch on every rank. Every rank therefore
gets the same number of micro-batches, and the j-th of all ranks cost about the same. A rank with
too little work gets empty micro-batches, which the engine runs with zero weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayhf.errors import ConfigError
from rayhf.models.packing import pack_examples

MicroBatchIndices = list[int]
"""Indices of the examples that go through the model at once."""


def plan_micro_batches(
    row_lengths: Sequence[Sequence[int]], *, ranks: int, budget: int
) -> list[list[MicroBatchIndices]]:
    """Distribute examples over ranks and micro-batches; every example appears exactly once.

    `row_lengths[e]` are the lengths of example e's rows in tokens (prompt plus response); an
    example's rows stay together. Returns, for each rank, the same number of micro-batches of at
    most `budget` padded tokens each; surplus ones are empty. Deterministic. Raises ConfigError
    where one example alone exceeds the budget, or has no row.
    """
    for index, lengths in enumerate(row_lengths):
        if not lengths:
            raise ConfigError(f"example {index} has no rows; expected at least one")
        if len(lengths) * max(lengths) > budget:
            raise ConfigError(
                f"token_budget is {budget}, but example {index} alone has {len(lengths)} rows of "
                f"up to {max(lengths)} tokens; it needs at least {len(lengths) * max(lengths)}"
            )
    micros = pack_examples(row_lengths, budget)
    _split_until_divisible(micros, row_lengths, ranks)
    micros.sort(key=lambda micro: (-padded_tokens(micro, row_lengths), micro))
    micros += [[] for _ in range(-len(micros) % ranks)]
    return _assign(micros, row_lengths, ranks)


def padded_tokens(micro: Sequence[int], row_lengths: Sequence[Sequence[int]]) -> int:
    """Return a micro-batch's cost: rows x longest row, in tokens."""
    return sum(len(row_lengths[e]) for e in micro) * max(
        (max(row_lengths[e]) for e in micro), default=0
    )


def padding_fraction(
    shares: Sequence[Sequence[MicroBatchIndices]], row_lengths: Sequence[Sequence[int]]
) -> float:
    """Return the share of padding among the tokens of all ranks' micro-batches."""
    padded = sum(padded_tokens(micro, row_lengths) for micros in shares for micro in micros)
    return 1.0 - sum(map(sum, row_lengths)) / padded


def _split_until_divisible(
    micros: list[MicroBatchIndices], row_lengths: Sequence[Sequence[int]], ranks: int
) -> None:
    """Halve the costliest micro-batches until their number is a multiple of `ranks`.

    Stops earlier where every micro-batch is down to one example.
    """
    while len(micros) % ranks:
        divisible = [micro for micro in micros if len(micro) > 1]
        if not divisible:
            return
        costliest = max(divisible, key=lambda micro: (padded_tokens(micro, row_lengths), micro))
        micros.remove(costliest)
        middle = len(costliest) // 2
        micros += [costliest[:middle], costliest[middle:]]


def _assign(
    micros: Sequence[MicroBatchIndices], row_lengths: Sequence[Sequence[int]], ranks: int
) -> list[list[MicroBatchIndices]]:
    """Give each rank one of every `ranks` micro-batches of similar cost.

    The costliest of them goes to the rank with the least work so far.
    """
    assigned: list[list[MicroBatchIndices]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for start in range(0, len(micros), ranks):
        by_work = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, micro in zip(by_work, micros[start : start + ranks], strict=True):
            assigned[rank].append(micro)
            work[rank] += padded_tokens(micro, row_lengths)
    return assigned
