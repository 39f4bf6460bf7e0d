"""A scorer: the share of a completion's tokens that are of one parity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import rayhf


class ParityConfig(rayhf.PointwiseEntryConfig):
    """Which tokens count."""

    type: str = "rayhf_outside.scorer:Parity"
    parity: Literal["even", "odd"] = "even"


class Parity(rayhf.PointwiseScorer[ParityConfig]):
    """Share of even (or odd) tokens."""

    Config = ParityConfig

    def score(self, requests: Sequence[rayhf.ScoreRequest]) -> list[tuple[rayhf.Outcome, ...]]:
        return [tuple(self._score(c) for c in request.completions) for request in requests]

    def _score(self, completion: rayhf.Completion) -> rayhf.Outcome:
        if not len(completion.token_ids):
            return rayhf.Invalid(reason="an empty completion")
        odd = self.config.parity == "odd"
        share = float((completion.token_ids % 2 == odd).mean())
        return rayhf.Scored(value=share)
