"""Hybrid routing: people judge the pairs that the scorer is least certain about.

A routed pair is not trained on with the scorer's verdict. It waits: `rayhf pairs` shows it first,
and a verdict of people makes it a human pair (rayhf/control/labels.py). One that nobody has judged
after `expire` iterations is trained on as the scorer judged it. What waits is in the run directory,
among the examples of its iteration, so that a resumed campaign routes and returns the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from rayhf.config.base import Section
from rayhf.errors import ConfigError
from rayhf.types import PEOPLE, Example, given_row

if TYPE_CHECKING:
    from rayhf.algorithms.base import SelectionContext
    from rayhf.config.schema import CampaignConfig

MAX_EXPIRE = 50
"""Largest number of iterations that a pair may wait."""


class PeopleConfig(Section):
    """Which pairs people judge in place of the scorer."""

    margin: NonNegativeFloat
    """Difference of scores up to which a pair is for people. Of win rates between two completions
    it is 2 * |p - 1/2|."""
    budget: PositiveInt = 16
    """Largest number of pairs per iteration, least certain first (ours)."""
    expire: Annotated[int, Field(ge=2, le=MAX_EXPIRE)] = 40
    """Iterations after which a pair without a verdict is trained on as the scorer judged it (ours:
    two checkpoints apart by default, because people see pairs of committed iterations only)."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse pairs that expire before people can see them. Raises ConfigError."""
        every = campaign.run.checkpoint_every
        if not 0 < every < self.expire:
            raise ConfigError(
                f"algorithm.people.expire is {self.expire} iterations, but people see a pair when "
                f"its iteration is committed, and run.checkpoint_every is {every}; expected a "
                f"checkpoint_every from 1 to {self.expire - 1}, or expire of more, at most "
                f"{MAX_EXPIRE}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedPairs:
    """The pairs of an iteration, divided."""

    scorer: list[Example]
    """Trained on now, as the scorer judged them."""
    people: list[Example] = field(default_factory=list)
    """Not trained on: they wait for people's verdicts."""
    expired: list[Example] = field(default_factory=list)
    """Of an earlier iteration, without a verdict: trained on now, as the scorer judged them."""


def route(pairs: Sequence[Example], config: PeopleConfig, context: SelectionContext) -> RoutedPairs:
    """Divide an iteration's pairs by their scalar `margin`; add those that expire in it."""
    uncertain = [n for n, pair in enumerate(pairs) if pair.scalars["margin"] <= config.margin]
    uncertain.sort(key=lambda n: pairs[n].scalars["margin"])
    chosen = set(uncertain[: config.budget])
    expires = float(context.iteration + config.expire)
    return RoutedPairs(
        scorer=[pair for n, pair in enumerate(pairs) if n not in chosen],
        people=[
            replace(pairs[n], objective=PEOPLE, scalars={**pairs[n].scalars, "expires": expires})
            for n in sorted(chosen)
        ],
        expired=[_returned(pair) for pair in context.unanswered(context.iteration - config.expire)],
    )


def _returned(pair: Example) -> Example:
    """Return a pair that waited as one to train on.

    Its rows count as given: they may be older than importance weights can correct.
    """
    rows = tuple(
        given_row(
            row.prompt_id,
            row.prompt_ids,
            row.response_ids,
            score=row.scalars["score"],
            inserted=row.inserted,
        )
        for row in pair.rows
    )
    return Example(rows=rows, scalars={"margin": pair.scalars["margin"]})
