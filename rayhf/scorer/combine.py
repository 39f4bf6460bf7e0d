"""The weighted sum of several scorers over one list of requests.

In: ScoreRequests, given to each engine in turn. Out: Scored with the sum and its unweighted parts, or, where any part
has no score, Failed or Invalid with the name of that scorer: a missing part never counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from rayhf.errors import ConfigError
from rayhf.experience import Failed, Invalid, Outcome, Scored, ScoreRequest


class Engine(Protocol):
    """A scorer in this process."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion of each request, in order."""
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One term of the sum."""

    name: str
    weight: float
    engine: Engine


class Combined:
    """sum_i weight_i * value_i. Raises ConfigError unless there is a part and the names are unique."""

    def __init__(self, parts: Sequence[Part]) -> None:
        check_names([part.name for part in parts])
        self._parts = tuple(parts)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        by_part = [part.engine.score(requests) for part in self._parts]
        return [
            tuple(self._combine(outcomes) for outcomes in zip(*by_request, strict=True))
            for by_request in zip(*by_part, strict=True)
        ]

    def close(self) -> None:
        with ExitStack() as stack:  # closes the others even where one raises
            for part in self._parts:
                stack.callback(part.engine.close)

    def _combine(self, outcomes: tuple[Outcome, ...]) -> Outcome:
        values: dict[str, float] = {}
        reasons: list[str] = []
        failed = False
        for part, outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, Scored):
                values[part.name] = outcome.value
            else:
                reasons.append(f"{part.name}: {outcome.reason}")
                failed = failed or isinstance(outcome, Failed)
        if reasons:
            reason = "; ".join(reasons)
            return Failed(reason=reason) if failed else Invalid(reason=reason)
        total = sum(part.weight * values[part.name] for part in self._parts)
        if not math.isfinite(total):
            return Invalid(reason=f"the weighted sum is {total}")
        return Scored(value=total, parts=values)


def check_names(names: Sequence[str], *, where: str = "scorer") -> None:
    """Raises ConfigError for an empty list or a name used twice."""
    if not names:
        raise ConfigError(f"{where}: at least one scorer is needed")
    for index, name in enumerate(names):
        first = names.index(name)
        if first != index:
            raise ConfigError(f"{where}: entries {first} and {index} are both named {name!r}; set `name` on one of them")
