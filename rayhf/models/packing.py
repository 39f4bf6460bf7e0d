"""Batches of rows under a token budget; without torch.

In: examples, whose rows stay together. Out: batches of their indices. What a batch costs depends on
how its rows are fed:
  padded rows   rows x longest row: examples of similar length share a batch
  packed rows   the tokens that are fed, or the response tokens where these are more, since each of
                them costs logits; prefixes that rows of one prompt share count once, and so
                examples of one prompt share a batch as far as the budget goes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace

from rayhf.config.schema import Packing
from rayhf.models.prefix_tree import DistinctTokens, sort_key
from rayhf.types import Row

Rows = Sequence[Row]


@dataclass(slots=True)
class RowBatch:
    """Examples whose rows go through the model together."""

    examples: list[int]
    """Their indices."""
    cost: int
    """In tokens; of packed rows at most that."""


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into batches of at most `budget` padded tokens; a longer row gets its own batch."""
    return [batch.examples for batch in _pack_padded([(length,) for length in lengths], budget)]


def pack_examples(
    examples: Sequence[Rows], *, packing: Packing, budget: int, multiple: int = 1
) -> list[RowBatch]:
    """Return batches of at most `budget` tokens, or of one example that has more.

    Packed rows: about a multiple of `multiple` batches, of similar cost. Deterministic.
    """
    if packing == "off":
        return _pack_padded([[len(row) for row in rows] for rows in examples], budget)
    return _fill(list(_units(examples, packing, budget)), budget, multiple)


def batch_cost(examples: Sequence[Rows], batch: Sequence[int], packing: Packing) -> int:
    """Return what a batch costs, in tokens."""
    rows = [row for index in batch for row in examples[index]]
    if packing == "off":
        return len(rows) * max(map(len, rows), default=0)
    responses = sum(len(row.response_ids) for row in rows)
    fed = sum(len(row) - 1 for row in rows) if packing == "rows" else distinct_tokens(rows)
    return max(fed, responses)


def distinct_tokens(rows: Rows) -> int:
    """Return the tokens that rows feed where prefixes of one prompt's rows count once."""
    counts: dict[str, DistinctTokens] = {}
    for row in rows:
        counts.setdefault(row.prompt_id, DistinctTokens()).add([row])
    return sum(tokens.count for tokens in counts.values())


def _pack_padded(row_lengths: Sequence[Sequence[int]], budget: int) -> list[RowBatch]:
    """Sort by length, which keeps the padding small, and cut."""
    order = sorted(range(len(row_lengths)), key=lambda e: (-max(row_lengths[e]), e))
    batches: list[RowBatch] = []
    longest = 0
    for example in order:
        lengths = row_lengths[example]
        if not batches or batches[-1].cost + len(lengths) * longest > budget:
            batches.append(RowBatch([], 0))
            longest = max(lengths)
        batches[-1].examples.append(example)
        batches[-1].cost += len(lengths) * longest
    return batches


def _units(examples: Sequence[Rows], packing: Packing, budget: int) -> Iterator[RowBatch]:
    """Yield the examples of each prompt, cut where they exceed the budget."""
    if packing == "rows":
        for index in range(len(examples)):
            yield RowBatch([index], batch_cost(examples, [index], packing))
        return
    by_prompt: dict[str, list[int]] = {}
    for index, rows in enumerate(examples):
        by_prompt.setdefault(rows[0].prompt_id, []).append(index)
    for members in by_prompt.values():
        # Examples with long shared prefixes are neighbors, and stay so where the prompt is cut.
        members.sort(key=lambda index: sort_key(examples[index][0].fed_ids))
        yield from _cut(examples, members, budget)


def _cut(examples: Sequence[Rows], members: Sequence[int], budget: int) -> Iterator[RowBatch]:
    unit = RowBatch([], 0)
    tokens = DistinctTokens()
    responses = 0
    for index in members:
        rows = examples[index]
        tokens.add(rows)
        responses += sum(len(row.response_ids) for row in rows)
        if unit.examples and max(tokens.count, responses) > budget:
            yield unit
            unit = RowBatch([], 0)
            tokens = DistinctTokens()
            tokens.add(rows)
            responses = sum(len(row.response_ids) for row in rows)
        unit.examples.append(index)
        unit.cost = max(tokens.count, responses)
    yield unit


def _fill(units: list[RowBatch], budget: int, multiple: int) -> list[RowBatch]:
    """Give each unit, the costliest first, to the batch that costs least so far."""
    units.sort(key=lambda unit: (-unit.cost, unit.examples))
    count = -(-sum(unit.cost for unit in units) // budget)
    count += -count % multiple
    batches = [RowBatch([], 0) for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for unit in units:
        cost, number = heap[0]
        if cost and cost + unit.cost > budget:
            number = len(batches)
            batches.append(RowBatch([], 0))
            heappush(heap, (unit.cost, number))
        else:
            heapreplace(heap, (cost + unit.cost, number))
        batches[number].examples += unit.examples
        batches[number].cost += unit.cost
    return [batch for batch in batches if batch.examples]
