"""Several scorers combined into one: transform, normalize, combine.

In: ScoreRequests, given to each scorer in turn. Out: Scored with the combined value and the raw
parts, or, where any part has no score, Failed or Invalid with the name of that scorer: a missing
part never counts as 0.

score:   r_i -> log sigmoid(r_i - reference) -> (. - mean) / std -> weighted sum, mean, worst, or
         mean minus variance.
compare: without a pairwise part, sigmoids of differences of that score. With one, the weighted mean
         of the parts' win matrices (weights normalized to 1), where a pointwise part's matrix is
         that of its own transformed and normalized scores.

A call (score or compare) first updates the running statistics with all its finite scores, in the
order of requests and completions, and then normalizes with them: all completions of a call are on
one scale, and the first call already has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.errors import CheckpointError
from rayhf.scorer.comparisons import (
    Problem,
    check_comparisons,
    check_outcomes,
    compare_scores,
    has_verdict,
)
from rayhf.scorer.normalize import RunningNormalizer
from rayhf.scorer.protocol import BaseScorer, ScorerEngine
from rayhf.types import Compared, Comparison, Failed, Invalid, Outcome, Scored, ScoreRequest


@dataclass(frozen=True, slots=True)
class Part:
    """One of the combined scorers."""

    config: ScorerEntryConfig
    engine: ScorerEngine

    @property
    def name(self) -> str:
        """Name in metrics and samples."""
        return self.config.resolved_name


class Combined:
    """The combination of all parts, see the module's docstring."""

    def __init__(self, parts: Sequence[Part], combine: CombineConfig = WEIGHTED_SUM) -> None:
        self._parts = tuple(parts)
        self._combine = combine
        self._normalizers = {
            part.name: RunningNormalizer() for part in parts if part.config.is_normalized
        }

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return the combined outcome of each completion."""
        by_part = [check_outcomes(part.engine.score(requests), requests) for part in self._parts]
        self._update_statistics(self._parts, by_part)
        return [
            tuple(self._outcome(outcomes) for outcomes in zip(*by_request, strict=True))
            for by_request in zip(*by_part, strict=True)
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the combined win probabilities of each request."""
        if not any(part.config.is_pairwise for part in self._parts):
            return [compare_scores(outcomes) for outcomes in self.score(requests)]
        by_part = [self._compare(part, requests) for part in self._parts]
        return [self._mix(comparisons) for comparisons in zip(*by_part, strict=True)]

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the running statistics by part name, as plain JSON values."""
        return {
            "normalizers": {
                name: normalizer.state_dict() for name, normalizer in self._normalizers.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Restore the running statistics.

        Raises CheckpointError unless the state is that of the same normalized parts.
        """
        saved = state.get("normalizers", {})
        if set(saved) != set(self._normalizers):
            raise CheckpointError(
                f"the checkpoint has statistics of the scorers {sorted(saved) or 'none'}, "
                f"the config normalizes {sorted(self._normalizers) or 'none'}"
            )
        for name, normalizer in self._normalizers.items():
            normalizer.load_state_dict(saved[name])

    def take_counts(self) -> dict[str, float]:
        """Return what the parts counted since the last call, as "<part>/<count>"."""
        return {
            f"{part.name}/{name}": count
            for part in self._parts
            if isinstance(part.engine, BaseScorer)
            for name, count in part.engine.take_counts().items()
        }

    def close(self) -> None:
        """Close every part, even where one raises."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.engine.close)

    def _update_statistics(
        self, parts: Sequence[Part], by_part: Sequence[Sequence[tuple[Outcome, ...]]]
    ) -> None:
        """Add all scores that are final.

        A completion that will be requested again (some part was unreachable) does not count yet: it
        would count twice.
        """
        flat = [[outcome for outcomes in rows for outcome in outcomes] for rows in by_part]
        final = [
            not any(isinstance(outcome, Failed) and outcome.transient for outcome in outcomes)
            for outcomes in zip(*flat, strict=True)
        ]
        for part, outcomes in zip(parts, flat, strict=True):
            if part.config.is_normalized:
                scores = (
                    part.config.transformed(outcome.value)
                    for outcome, counts in zip(outcomes, final, strict=True)
                    if counts and isinstance(outcome, Scored)
                )
                self._normalizers[part.name].update(filter(math.isfinite, scores))

    def _utility(self, part: Part, score: float) -> float:
        value = part.config.transformed(score)
        return self._normalizers[part.name](value) if part.config.is_normalized else value

    def _outcome(self, outcomes: tuple[Outcome, ...]) -> Outcome:
        problem = _problem(self._parts, outcomes)
        if problem is not None:
            return problem
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
            parts[part.name] = outcome.value
            parts |= {f"{part.name}/{key}": value for key, value in outcome.parts.items()}
        return Scored(value=total, parts=parts)

    def _total(self, values: Sequence[float]) -> float:
        weights = [part.config.weight for part in self._parts]
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
        if part.config.is_pairwise:
            return check_comparisons(part.engine.compare(requests), requests)
        rows = check_outcomes(part.engine.score(requests), requests)
        self._update_statistics([part], [rows])
        return [compare_scores([self._scaled(part, o) for o in outcomes]) for outcomes in rows]

    def _scaled(self, part: Part, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Scored):
            return outcome
        value = self._utility(part, outcome.value)
        if not math.isfinite(value):
            return Invalid(reason=f"the transformed score is {value}")
        return Scored(value=value)

    def _mix(self, comparisons: tuple[Comparison, ...]) -> Comparison:
        problem = _problem(self._parts, comparisons)
        if problem is not None:
            return problem
        known = [
            (part.config.weight, comparison.win)
            for part, comparison in zip(self._parts, comparisons, strict=True)
            if isinstance(comparison, Compared)
        ]
        mixed_KK = sum(weight * win_KK for weight, win_KK in known) / sum(
            weight for weight, _ in known
        )
        # Mirrored once more: rounding of a weighted mean must not make win[i, j] + win[j, i] differ
        # from 1.
        upper_KK = np.triu(mixed_KK, 1)
        win_KK = upper_KK + np.tril(1.0 - upper_KK.T, -1) + 0.5 * np.eye(len(upper_KK))
        if not has_verdict(win_KK):
            names = ", ".join(part.name for part in self._parts)
            return Invalid(reason=f"no two completions were compared by all of {names}")
        return Compared(win=win_KK, source="pairwise")


def _problem(parts: Sequence[Part], responses: Sequence[Outcome | Comparison]) -> Problem | None:
    """Return why the combination has no value; None where it has one.

    Failed where any part failed (transient only where all failures are), Invalid where any is
    invalid; with names and reasons.
    """
    problems = [
        (part.name, response)
        for part, response in zip(parts, responses, strict=True)
        if isinstance(response, Invalid | Failed)
    ]
    if not problems:
        return None
    reason = "; ".join(f"{name}: {problem.reason}" for name, problem in problems)
    failures = [problem for _, problem in problems if isinstance(problem, Failed)]
    if not failures:
        return Invalid(reason=reason)
    return Failed(reason=reason, transient=all(failure.transient for failure in failures))
