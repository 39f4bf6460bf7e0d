"""The plan of an optimizer step: which examples go through the model together, on which rank.

In: examples, and how their rows are fed. Out: indices; nothing here touches a tensor. Costs are in
tokens (rayhf/models/packing.py).

Synchronization: ZeRO's collectives run once per micro-batch on every rank. Every rank therefore
gets the same number of micro-batches, and the j-th of all ranks cost about the same. A rank with
too little work gets empty micro-batches, which the engine runs with zero weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rayhf.config.schema import Packing
from rayhf.errors import ConfigError
from rayhf.models.packing import RowBatch, Rows, batch_cost, pack_examples

MicroBatchIndices = list[int]
"""Indices of the examples that go through the model at once."""


def plan_micro_batches(
    examples: Sequence[Rows], *, packing: Packing, ranks: int, budget: int
) -> list[list[MicroBatchIndices]]:
    """Distribute examples over ranks and micro-batches; every example appears exactly once.

    An example's rows stay together. Returns, for each rank, the same number of micro-batches of at
    most `budget` tokens each; surplus ones are empty. Deterministic. Raises ConfigError where one
    example alone exceeds the budget, or has no row.
    """
    for index, rows in enumerate(examples):
        if not rows:
            raise ConfigError(f"example {index} has no rows; expected at least one")
    micros = pack_examples(examples, packing=packing, budget=budget, multiple=ranks)
    for micro in micros:
        if micro.cost > budget:
            (index,) = micro.examples
            rows = examples[index]
            raise ConfigError(
                f"token_budget is {budget}, but example {index} alone has {len(rows)} rows of "
                f"up to {max(map(len, rows))} tokens; it needs at least {micro.cost}"
            )
    cost = partial(batch_cost, examples, packing=packing)
    _split_until_divisible(micros, cost, ranks)
    micros.sort(key=lambda micro: (-micro.cost, micro.examples))
    micros += [RowBatch([], 0) for _ in range(-len(micros) % ranks)]
    return _assign(micros, ranks)


def _split_until_divisible(
    micros: list[RowBatch], cost: Callable[[Sequence[int]], int], ranks: int
) -> None:
    """Halve the costliest micro-batches until their number is a multiple of `ranks`.

    Stops earlier where every micro-batch is down to one example.
    """
    while len(micros) % ranks:
        divisible = [micro for micro in micros if len(micro.examples) > 1]
        if not divisible:
            return
        costliest = max(divisible, key=lambda micro: (micro.cost, micro.examples))
        micros.remove(costliest)
        middle = len(costliest.examples) // 2
        halves = (costliest.examples[:middle], costliest.examples[middle:])
        micros += [RowBatch(half, cost(half)) for half in halves]


def _assign(micros: Sequence[RowBatch], ranks: int) -> list[list[MicroBatchIndices]]:
    """Give each rank one of every `ranks` micro-batches of similar cost.

    The costliest of them goes to the rank with the least work so far.
    """
    assigned: list[list[MicroBatchIndices]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for start in range(0, len(micros), ranks):
        by_work = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, micro in zip(by_work, micros[start : start + ranks], strict=True):
            assigned[rank].append(micro.examples)
            work[rank] += micro.cost
    return assigned
