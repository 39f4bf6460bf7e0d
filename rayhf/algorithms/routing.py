"""Hybrid routing: people judge the examples that the scorer is least certain about.

An example is a pair, or a single completion with a thumb. A routed one is not trained on with the
scorer's verdict. It waits: `rayhf pairs` (`rayhf completions`) shows it first, and a verdict of
people makes it a human one (rayhf/control/labels.py). One that nobody has judged after `expire`
iterations is trained on as the scorer judged it. What waits is in the run directory, among the
examples of its iteration, so that a resumed campaign routes and returns the same ones.
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
"""Largest number of iterations that an example may wait."""


class PeopleConfig(Section):
    """Which pairs, or single completions, people judge in place of the scorer."""

    margin: NonNegativeFloat
    """Difference of scores up to which a pair is for people; of win rates between two completions
    it is 2 * |p - 1/2|. Of a single completion, distance of its score from the threshold."""
    budget: PositiveInt = 16
    """Largest number per iteration, least certain first (ours)."""
    expire: Annotated[int, Field(ge=2, le=MAX_EXPIRE)] = 40
    """Iterations after which one without a verdict is trained on as the scorer judged it (ours: two
    checkpoints apart by default, because people see completions of committed iterations only)."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse examples that expire before people can see them. Raises ConfigError."""
        every = campaign.run.checkpoint_every
        if not 0 < every < self.expire:
            raise ConfigError(
                f"algorithm.people.expire is {self.expire} iterations, but people see completions "
                f"when their iteration is committed, and run.checkpoint_every is {every}; expected "
                f"a checkpoint_every from 1 to {self.expire - 1}, or expire of more, at most "
                f"{MAX_EXPIRE}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The examples of an iteration, divided."""

    scorer: list[Example]
    """Trained on now, as the scorer judged them."""
    people: list[Example] = field(default_factory=list)
    """Not trained on: they wait for people's verdicts."""
    expired: list[Example] = field(default_factory=list)
    """Of an earlier iteration, without a verdict: trained on now, as the scorer judged them."""


def route(examples: Sequence[Example], config: PeopleConfig, context: SelectionContext) -> Routed:
    """Divide an iteration's examples by their scalar `margin`; add those that expire in it."""
    margins = [example.scalars["margin"] for example in examples]
    uncertain = [n for n, margin in enumerate(margins) if margin <= config.margin]
    chosen = set(sorted(uncertain, key=margins.__getitem__)[: config.budget])
    expires = float(context.iteration + config.expire)
    return Routed(
        scorer=[example for n, example in enumerate(examples) if n not in chosen],
        people=[
            replace(
                examples[n], objective=PEOPLE, scalars={**examples[n].scalars, "expires": expires}
            )
            for n in sorted(chosen)
        ],
        expired=[_returned(each) for each in context.unanswered(context.iteration - config.expire)],
    )


def _returned(example: Example) -> Example:
    """Return an example that waited as one to train on.

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
        for row in example.rows
    )
    scalars = {name: value for name, value in example.scalars.items() if name != "expires"}
    return Example(rows=rows, scalars=scalars)
