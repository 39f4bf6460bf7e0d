"""The config of `rayhf serve-scorer`. Imports no torch; a docstring under a field is its help."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from rayhf.config.base import Section
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, PointwiseEntry, ScorerEntry
from rayhf.config.service import ServiceConfig


class ServedScorers(Section):
    """What is served, as one scorer. What a campaign learns on the way (`normalize`) is the
    campaign's own."""

    train: tuple[ScorerEntry, ...] = Field(min_length=1)
    """As a campaign's scorer.train: combined, they are the score."""
    combine: CombineConfig = WEIGHTED_SUM
    threads: PositiveInt | None = None
    """CPU threads of its models. Default: all cores."""

    @field_validator("train")
    @classmethod
    def _refuse_state(cls, train: tuple[ScorerEntry, ...]) -> tuple[ScorerEntry, ...]:
        for index, entry in enumerate(train):
            if isinstance(entry, PointwiseEntry) and entry.normalize:
                raise ValueError(
                    f"entry {index} has normalize, and a server keeps no campaign's statistics; set normalize on the campaign's "
                    "entry of type remote"
                )
        return train


class ServeScorerConfig(Section):
    """A scorer that campaigns reach over gRPC."""

    scorer: ServedScorers
    service: ServiceConfig = ServiceConfig()
    device: Literal["cpu", "gpu"] = "cpu"
