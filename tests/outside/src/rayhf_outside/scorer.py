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
        if not completion.token_ids:
            return rayhf.Invalid(reason="an empty completion")
        odd = self.config.parity == "odd"
        share = sum(token % 2 == odd for token in completion.token_ids)
        return rayhf.Scored(value=share / len(completion.token_ids))
