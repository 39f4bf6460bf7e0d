"""Several scorers as one: each part's score is transformed, normalized and combined with the
others'.

In: ScoreRequests, given to each engine in turn. Out: Scored with the combined value and the parts
as they came from their engines, or, where any part has no score, Failed or Invalid with the name of
that scorer: a missing part never counts as 0.

score:   r_i -> log sigmoid(r_i - reference) -> (. - mean) / std -> weighted sum, mean, worst, or
         mean minus variance.
compare: without a pairwise part, sigmoids of differences of that score. With one, the weighted mean
of the parts' win matrices
         (weights normalized to 1), where a pointwise part's matrix is that of its own transformed
         and normalized scores.

A call (score or compare) first updates the running statistics with all its finite scores, in the
order of requests and completions, and then normalizes with them: all answers of a call are measured
by one scale, and the first call already has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig
from rayhf.errors import CheckpointError, ConfigError
from rayhf.scorer.comparisons import check_comparisons, check_outcomes, compare_scores, knows_a_pair
from rayhf.scorer.normalize import RunningNormalizer
from rayhf.types import Compared, Comparison, Failed, Invalid, Outcome, Scored, ScoreRequest


class ScorerEngine(Protocol):
    """A scorer in this process."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion of each request, in order."""
        ...

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """The win probabilities among each request's completions."""
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One scorer among those that are combined."""

    name: str
    weight: float
    engine: ScorerEngine
    pairwise: bool = False
    """It compares answers by itself; other parts are compared by their scores."""
    reference: float | None = None
    """Of the log-sigmoid transform; None leaves scores as they are."""
    normalize: bool = False


class Combined:
    """See the module's docstring. Raises ConfigError as check_names and check_weights."""

    def __init__(self, parts: Sequence[Part], combine: CombineConfig = WEIGHTED_SUM) -> None:
        check_names([part.name for part in parts])
        weights = [part.weight for part in parts]
        check_weights(weights, combine, pairwise=any(part.pairwise for part in parts))
        self._parts, self._combine = tuple(parts), combine
        self._normalisers = {part.name: RunningNormalizer() for part in parts if part.normalize}

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        by_part = [check_outcomes(part.engine.score(requests), requests) for part in self._parts]
        self._learn(self._parts, by_part)
        return [
            tuple(self._outcome(outcomes) for outcomes in zip(*by_request, strict=True))
            for by_request in zip(*by_part, strict=True)
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        if not any(part.pairwise for part in self._parts):
            return [compare_scores(outcomes) for outcomes in self.score(requests)]
        by_part = [self._compare(part, requests) for part in self._parts]
        return [self._mix(comparisons) for comparisons in zip(*by_part, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The running statistics by part name, as plain JSON values."""
        return {
            "normalizers": {
                name: normalizer.state_dict() for name, normalizer in self._normalisers.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError unless the state is that of the same normalized parts."""
        found = state.get("normalizers", {})
        if set(found) != set(self._normalisers):
            raise CheckpointError(
                f"the checkpoint has statistics of the scorers {sorted(found) or 'none'}, "
                f"the config normalizes {sorted(self._normalisers) or 'none'}"
            )
        for name, normalizer in self._normalisers.items():
            normalizer.load_state_dict(found[name])

    def close(self) -> None:
        with ExitStack() as stack:  # closes the others even where one raises
            for part in self._parts:
                stack.callback(part.engine.close)

    def _learn(
        self, parts: Sequence[Part], by_part: Sequence[Sequence[tuple[Outcome, ...]]]
    ) -> None:
        """Update the running statistics. A completion that is to be asked again (some part could
        not be reached) does not count yet: it would count twice."""
        flat = [[outcome for outcomes in answers for outcome in outcomes] for answers in by_part]
        final = [
            not any(isinstance(o, Failed) and o.transient for o in outcomes)
            for outcomes in zip(*flat, strict=True)
        ]
        for part, outcomes in zip(parts, flat, strict=True):
            if part.normalize:
                counted = [
                    o
                    for o, counts in zip(outcomes, final, strict=True)
                    if counts and isinstance(o, Scored)
                ]
                scores = (_transform(part, o.value) for o in counted)
                self._normalisers[part.name].update(
                    score for score in scores if math.isfinite(score)
                )

    def _utility(self, part: Part, score: float) -> float:
        value = _transform(part, score)
        return self._normalisers[part.name](value) if part.normalize else value

    def _outcome(self, outcomes: tuple[Outcome, ...]) -> Outcome:
        missing = _missing(self._parts, outcomes)
        if missing is not None:
            return missing
        scored = [
            (part, outcome)
            for part, outcome in zip(self._parts, outcomes, strict=True)
            if isinstance(outcome, Scored)
        ]
        total = self._total([self._utility(part, outcome.value) for part, outcome in scored])
        if not math.isfinite(total):
            return Invalid(reason=f"the {self._combine.type.replace('_', ' ')} is {total}")
        parts: dict[str, float] = {}
        for part, outcome in scored:
            parts |= {
                part.name: outcome.value,
                **{f"{part.name}/{key}": value for key, value in outcome.parts.items()},
            }
        return Scored(value=total, parts=parts)

    def _total(self, values: Sequence[float]) -> float:
        weights = [part.weight for part in self._parts]
        total = sum(weight * value for weight, value in zip(weights, values, strict=True))
        if self._combine.type == "weighted_sum":
            return total
        if self._combine.type == "worst":
            return min(values)
        mean = total / sum(weights)
        if self._combine.type == "mean":
            return mean
        spread = sum(
            weight * (value - mean) * (value - mean)
            for weight, value in zip(weights, values, strict=True)
        )
        return mean - self._combine.coef * spread / sum(weights)

    def _compare(self, part: Part, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        if part.pairwise:
            return check_comparisons(part.engine.compare(requests), requests)
        answers = check_outcomes(part.engine.score(requests), requests)
        self._learn([part], [answers])
        return [compare_scores([self._scaled(part, o) for o in outcomes]) for outcomes in answers]

    def _scaled(self, part: Part, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Scored):
            return outcome
        value = self._utility(part, outcome.value)
        return (
            Scored(value=value)
            if math.isfinite(value)
            else Invalid(reason=f"the transformed score is {value}")
        )

    def _mix(self, comparisons: tuple[Comparison, ...]) -> Comparison:
        missing = _missing(self._parts, comparisons)
        if missing is not None:
            return missing
        known = [
            (part.weight, c.win)
            for part, c in zip(self._parts, comparisons, strict=True)
            if isinstance(c, Compared)
        ]
        mixed_KK = sum(weight * win_KK for weight, win_KK in known) / sum(
            weight for weight, _ in known
        )
        upper_KK = np.triu(mixed_KK, 1)
        # Mirrored once more: rounding of a weighted mean must not make win[i, j] + win[j, i] differ
        # from 1.
        win_KK = upper_KK + np.tril(1.0 - upper_KK.T, -1) + 0.5 * np.eye(len(upper_KK))
        if not knows_a_pair(win_KK):
            return Invalid(
                reason="no two answers were compared by all of "
                + ", ".join(part.name for part in self._parts)
            )
        return Compared(win=win_KK, source="pairwise")


def _transform(part: Part, score: float) -> float:
    """log sigmoid(score - reference), stable for any score. Wang et al. 2024 (2402.00742)."""
    if part.reference is None:
        return score
    margin = score - part.reference
    return -math.log1p(math.exp(-margin)) if margin >= 0 else margin - math.log1p(math.exp(margin))


def _missing(
    parts: Sequence[Part], answers: Sequence[Outcome | Comparison]
) -> Invalid | Failed | None:
    """Failed where any part failed (for good, where one did for good), Invalid where any is
    invalid; with names and reasons."""
    lacking = [
        (part.name, a)
        for part, a in zip(parts, answers, strict=True)
        if isinstance(a, Invalid | Failed)
    ]
    if not lacking:
        return None
    reason = "; ".join(f"{name}: {answer.reason}" for name, answer in lacking)
    failed = [answer for _, answer in lacking if isinstance(answer, Failed)]
    if not failed:
        return Invalid(reason=reason)
    return Failed(reason=reason, transient=all(answer.transient for answer in failed))


def check_weights(
    weights: Sequence[float], combine: CombineConfig, *, pairwise: bool, where: str = "scorer"
) -> None:
    """Raises ConfigError for weights that have no meaning in this combination, and for a
    combination that win matrices have not."""
    if pairwise and combine.type not in ("weighted_sum", "mean"):
        raise ConfigError(
            f"{where}: combine.type {combine.type} is for scores, and a pairwise scorer gives win probabilities; "
            "expected weighted_sum or mean"
        )
    if combine.type == "worst" and any(weight != 1 for weight in weights):
        raise ConfigError(
            f"{where}: combine.type worst takes the smallest score as it is; expected no weights, got {_list(weights)}"
        )
    if (pairwise or combine.type != "weighted_sum") and any(weight <= 0 for weight in weights):
        what = "a pairwise scorer" if pairwise else f"combine.type {combine.type}"
        raise ConfigError(
            f"{where}: weights are {_list(weights)}; with {what} they are shares, expected numbers above 0"
        )


def _list(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def check_names(names: Sequence[str], *, where: str = "scorer") -> None:
    """Raises ConfigError for an empty list or a name used twice."""
    if not names:
        raise ConfigError(f"{where}: at least one scorer is needed")
    for index, name in enumerate(names):
        first = names.index(name)
        if first != index:
            raise ConfigError(
                f"{where}: entries {first} and {index} are both named {name!r}; set `name` on one of them"
            )
