"""The config of `rayhf serve-scorer`. A docstring under a field is its help."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from rayhf.config.base import Section
from rayhf.config.scorers import CombinedScorersConfig, ScorerEntryConfig
from rayhf.config.service import ServiceConfig


class ServedScorersConfig(CombinedScorersConfig):
    """The scorers that are served, as one.

    Running statistics (`normalize`) belong to a campaign, so a server keeps none.
    """

    @field_validator("train")
    @classmethod
    def _refuse_state(cls, train: tuple[ScorerEntryConfig, ...]) -> tuple[ScorerEntryConfig, ...]:
        for index, entry in enumerate(train):
            if entry.is_normalized:
                raise ValueError(
                    f"entry {index} has normalize, and a server keeps no campaign's statistics; "
                    "set normalize on the campaign's entry of type grpc"
                )
            if entry.curriculum is not None:
                raise ValueError(
                    f"entry {index} has a curriculum, and a server does not see the campaign's "
                    "iterations; expected a rubric without curriculum"
                )
        return train


class ServeScorerConfig(Section):
    """A scorer that campaigns reach over gRPC."""

    scorer: ServedScorersConfig
    service: ServiceConfig = ServiceConfig()
    device: Literal["cpu", "gpu"] = "cpu"
