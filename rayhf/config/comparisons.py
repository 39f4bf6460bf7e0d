"""Which comparisons a pairwise scorer is asked for: `comparisons` of its entry.

For k different completions of a prompt:

round_robin   every pair                       k (k - 1) / 2
swiss         `rounds` rounds of equals        rounds * floor(k / 2), by default about k log2(k) / 2
knock_out     winners against winners          k - 1
anchors       `count` given answers each       k * count

rayhf/scorer/schedules.py has the rounds, rayhf/scorer/tournament.py the scores. `gives_win_rates`
says whether a score estimates how often a completion beats the policy's others.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from rayhf.config.base import Section


class RoundRobin(Section):
    """Every pair of completions, as without this setting; the comparisons are counted."""

    gives_win_rates: ClassVar[bool] = True
    type: Literal["round_robin"] = "round_robin"

    def asked(self, completions: int) -> int:
        """Return the number of comparisons among so many different completions."""
        return completions * (completions - 1) // 2


class KnockOut(Section):
    """A drawn knock-out tournament: the loser of a comparison is not compared again.

    It finds a good completion with the fewest comparisons, and says little about the others.
    """

    gives_win_rates: ClassVar[bool] = False
    type: Literal["knock_out"] = "knock_out"

    def asked(self, completions: int) -> int:
        """Return the number of comparisons among so many different completions."""
        return completions - 1


class Swiss(Section):
    """A Swiss tournament: in each round, completions that have won equally often are compared."""

    gives_win_rates: ClassVar[bool] = True
    type: Literal["swiss"] = "swiss"
    rounds: PositiveInt | None = None
    """Comparisons of each completion. Default: the logarithm of the number of completions to base
    2, rounded up. At most half of that number, rounded up: no pair is compared twice."""

    def rounds_of(self, completions: int) -> int:
        """Return the number of rounds among so many different completions."""
        default = (completions - 1).bit_length()
        return min(self.rounds or default, ceil(completions / 2))

    def asked(self, completions: int) -> int:
        """Return the number of comparisons among so many different completions."""
        return self.rounds_of(completions) * (completions // 2)


class Anchors(Section):
    """Fixed answers of the prompt's row: a score is the win rate against them.

    Each completion has a score of its own then, also where it is the only one.
    """

    gives_win_rates: ClassVar[bool] = False
    type: Literal["anchors"] = "anchors"
    column: str = "anchors"
    """Column of the row with the answers: a text, or a list of texts."""
    count: PositiveInt = 1
    """Answers of a row to compare with, the first ones; every row has at least as many."""

    def asked(self, completions: int) -> int:
        """Return the number of comparisons of so many different completions."""
        return completions * self.count


Comparisons = Annotated[
    Annotated[RoundRobin | KnockOut | Swiss | Anchors, Field(discriminator="type")],
    BeforeValidator(
        lambda value: {"type": value} if isinstance(value, str) else value,
        json_schema_input_type=RoundRobin | KnockOut | Swiss | Anchors | str,
    ),
]
"""A string is short for {type: string}."""
