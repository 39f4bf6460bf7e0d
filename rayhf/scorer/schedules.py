"""Schedules of tournaments: which players meet, round by round.

A schedule is a generator. It yields the pairs of a round and is sent one result per pair: the
probability that the first player wins (1/2 is a tie), or None where there was no verdict. Players
are numbered in the order of the draw, which decides wherever results do not; nothing else is
random, so that equal draws and results give equal rounds.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from rayhf.config.comparisons import KnockOut, Swiss
from rayhf.scorer.comparisons import Pair

Result = float | None
Schedule = Generator[list[Pair], Sequence[Result], None]


def schedule(comparisons: KnockOut | Swiss, players: int) -> Schedule:
    """Return the schedule of a tournament."""
    if isinstance(comparisons, KnockOut):
        return knock_out(players)
    return swiss(players, comparisons.rounds_of(players))


def knock_out(players: int) -> Schedule:
    """Yield the rounds of a knock-out tournament: players - 1 pairs in all.

    After a tie, and without a verdict, the player drawn first goes on.
    """
    standing = list(range(players))
    while len(standing) > 1:
        pairs = list(zip(standing[0::2], standing[1::2], strict=False))
        results = yield pairs
        winners = [
            second if result is not None and result < 0.5 else first
            for (first, second), result in zip(pairs, results, strict=True)
        ]
        # A player without an opponent stands first, so that it has one in the next round.
        standing = standing[2 * len(pairs) :] + winners


def swiss(players: int, rounds: int) -> Schedule:
    """Yield the rounds of a Swiss tournament: rounds * (players // 2) pairs in all.

    Players meet those with as many points as they have, or nearly; nobody meets the same player
    twice. `rounds` is at most half of the players, rounded up. A round without an opponent, and one
    without a verdict, is half a point.
    """
    size = players + players % 2
    bye = players  # of an odd number: whoever meets it has no opponent in that round
    points = [0.0] * players + [-1.0] * (size - players)
    met: set[frozenset[int]] = set()
    for _ in range(rounds):
        ranked = sorted(range(size), key=lambda player: -points[player])  # ties: as drawn
        pairs = _match(ranked, met)
        met.update(map(frozenset, pairs))
        games = [pair for pair in pairs if bye not in pair]
        results = yield games
        for (first, second), result in zip(games, results, strict=True):
            win = 0.5 if result is None else result
            points[first] += win
            points[second] += 1.0 - win
        for pair in pairs:
            if bye in pair:
                points[min(pair)] += 0.5


def _match(ranked: Sequence[int], met: set[frozenset[int]]) -> list[Pair]:
    """Return each player's opponent: the nearest in rank that it has not met.

    Two players who are left have met each other, and take the players of another pair. There is
    such a pair while each of n players has met fewer than n / 2 others: the two then have at least
    n new opponents together, in at most n / 2 - 1 pairs, so that one pair has three of them.
    """
    free = list(ranked)
    pairs: list[Pair] = []
    left: list[int] = []
    while free:
        first = free.pop(0)
        second = next((other for other in free if frozenset((first, other)) not in met), None)
        if second is None:
            left.append(first)
        else:
            free.remove(second)
            pairs.append((first, second))
    while left:
        last = left.pop()
        other = left.pop()
        pairs = _rearranged(pairs, last, other, met)
    return pairs


def _rearranged(pairs: list[Pair], last: int, other: int, met: set[frozenset[int]]) -> list[Pair]:
    """Return the pairs with two more players, one pair divided between them; the lowest first."""
    for place in reversed(range(len(pairs))):
        for one, two in (pairs[place], pairs[place][::-1]):
            if frozenset((last, one)) not in met and frozenset((other, two)) not in met:
                return [*pairs[:place], (one, last), (two, other), *pairs[place + 1 :]]
    raise ValueError(f"{last} and {other} have met too many others; expected fewer rounds")
