"""Mixing of sources: which prompts an iteration gets, by the sources' weights.

A pure function of (seed, iteration): the loader has no state to save, and a resumed campaign
continues with the prompts that it would have had.

Shares are exact over time: prompt by prompt, every source's credit grows by its weight, and the
source with the largest credit is dealt and pays the sum of the weights (smooth weighted round
robin). Each source has its own seeded order per epoch, and its own position in it.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import TypeVar

from rayhf.types import derive_seed

Item = TypeVar("Item")


def iteration_batch(items: Sequence[Item], *, batch: int, iteration: int, seed: int) -> list[Item]:
    """Return the items of `iteration` (from 1): a slice of the epoch's seeded permutation.

    An epoch has len(items) // batch iterations; the remainder, a different one each epoch, is left
    out.
    """
    epoch, index = divmod(iteration - 1, len(items) // batch)
    return _slice(items, seed, epoch, index * batch, batch)


def _slice(items: Sequence[Item], seed: int, epoch: int, start: int, count: int) -> list[Item]:
    return [items[i] for i in _order(len(items), seed, epoch)[start : start + count]]


@lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> Sequence[int]:
    """Return the epoch's permutation; kept, because shuffling a million takes half a second."""
    order = list(range(size))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return array("q", order)


class Schedule:
    """How many prompts each source gives to each iteration, and from where in its epochs.

    Args:
        weights: by source, relative to their sum.
        sizes: number of prompts by source.
        batch: prompts per iteration.
    """

    def __init__(
        self, weights: Mapping[str, float], sizes: Mapping[str, int], *, batch: int
    ) -> None:
        # Through text: 0.1 is one tenth, not the binary fraction next to it.
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        scale = lcm(*(weight.denominator for weight in exact.values()))
        whole = {name: int(weight * scale) for name, weight in exact.items()}
        common = gcd(*whole.values())
        self._weights = {name: weight // common for name, weight in whole.items()}
        self._total = sum(self._weights.values())
        self._sizes = sizes
        self._batch = batch
        self._credit = dict.fromkeys(self._weights, 0)
        self.period = self._total // gcd(self._total, batch)
        """Number of iterations after which the sources' order repeats."""
        self._patterns: list[tuple[list[str], Counter[str]]] = []
        """The sources of an iteration's prompts and their numbers, for one period."""
        self._next = dict.fromkeys(self._weights, (0, 0))
        """Each source's epoch and position after the iterations known so far."""
        self._starts: list[dict[str, tuple[int, int]]] = []
        """Each source's epoch and first position, by iteration."""

    def of(self, iteration: int) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Return the iteration's sources, prompt by prompt, and (epoch, position) by source.

        Raises ValueError, naming the source, where one has fewer prompts than an iteration needs.
        """
        while len(self._starts) < iteration:
            self._starts.append(self._advance(len(self._starts)))
        slots, _ = self._pattern(iteration - 1)
        return slots, self._starts[iteration - 1]

    def _advance(self, index: int) -> dict[str, tuple[int, int]]:
        starts = {}
        _, counts = self._pattern(index)
        for name, count in counts.items():
            size = self._sizes[name]
            if count > size:
                raise ValueError(
                    f"{name} has {size} different prompts, and by its weight an iteration of "
                    f"{self._batch} takes {count} of them"
                )
            epoch, position = self._next[name]
            if position + count > size:  # a different remainder is left out in each epoch
                epoch, position = epoch + 1, 0
            starts[name] = (epoch, position)
            self._next[name] = (epoch, position + count)
        return starts

    def _pattern(self, index: int) -> tuple[list[str], Counter[str]]:
        while len(self._patterns) <= index % self.period:
            # A single source, as most campaigns have, needs no dealing.
            slots = (
                [self.deal() for _ in range(self._batch)]
                if len(self._weights) > 1
                else [*self._weights] * self._batch
            )
            self._patterns.append((slots, Counter(slots)))
        return self._patterns[index % self.period]

    def deal(self) -> str:
        """Return the source of the next prompt."""
        for name, weight in self._weights.items():
            self._credit[name] += weight
        chosen = max(self._credit, key=self._credit.__getitem__)  # the first of equal ones
        self._credit[chosen] -= self._total
        return chosen


def mixed_batch(
    items: Mapping[str, Sequence[Item]], schedule: Schedule, *, iteration: int, seed: int
) -> list[Item]:
    """Return the iteration's items (from 1), in the order in which the schedule deals sources."""
    slots, starts = schedule.of(iteration)
    counts = Counter(slots)
    dealt = {}
    for number, name in enumerate(items):
        if name in counts:
            own = seed if number == 0 else derive_seed(seed, "source", number)
            dealt[name] = iter(_slice(items[name], own, *starts[name], counts[name]))
    return [next(dealt[name]) for name in slots]


def shared_out(
    items: Mapping[str, Sequence[Item]], weights: Mapping[str, float], limit: int
) -> list[Item]:
    """Return at most `limit` items, by weight, the first ones of each source; grouped by source."""
    counts = dict.fromkeys(items, 0)
    schedule = Schedule(weights, dict.fromkeys(items, 1), batch=1)
    left = min(limit, sum(map(len, items.values())))
    while left:
        name = schedule.deal()
        if counts[name] < len(items[name]):
            counts[name] += 1
            left -= 1
    return [item for name, own in items.items() for item in own[: counts[name]]]
