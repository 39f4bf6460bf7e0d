"""Several scorers combined into one: transform, normalize, combine.

In: each scorer's answers (parts.py). Out: Scored with the combined value and the raw parts, or,
where any part has no score, Failed or Invalid with the name of that scorer: a missing part never
counts as 0. A part that skipped a completion is left out of its combination; where all did, the
completion is Skipped, and Invalid where its prompt names none of the scorers.

score:   r_i -> log sigmoid(r_i - reference) -> (. - mean) / std -> weighted sum, mean, worst, or
         mean minus variance.
         r_i of a scorer with a curriculum: the mean of its score's parts (curriculum.py).
compare: without a pairwise part, sigmoids of differences of that score. With one, the weighted mean
         of the parts' win matrices (weights normalized to 1), where a pointwise part's matrix is
         that of its own transformed and normalized scores.

A call (score or compare) first updates the running statistics with all its finite scores, in the
order of requests and completions, and then normalizes with them: all completions of a call are on
one scale, and the first call already has one. The statistics are in one place, the Combination,
however many actors give scores, and normalized scorers have one call at a time
(`ScorerConfig.calls_in_flight`): they are exact, and the same in every repetition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.errors import CheckpointError
from rayhf.scorer.comparisons import Problem, compare_scores, has_verdict
from rayhf.scorer.curriculum import Curriculum
from rayhf.scorer.normalize import RunningNormalizer
from rayhf.scorer.outcomes import EXPECTED, MAX_SCORE
from rayhf.scorer.parts import Answers, Part, Parts, Rows, judges
from rayhf.scorer.replies import Replies, named
from rayhf.types import (
    Compared,
    Comparison,
    Failed,
    Invalid,
    Outcome,
    Scored,
    ScoreRequest,
    Skipped,
)


class Combination:
    """What makes one score of several scorers' scores, with its running statistics."""

    def __init__(
        self, entries: Sequence[ScorerEntryConfig], combine: CombineConfig = WEIGHTED_SUM
    ) -> None:
        self._entries = tuple(entries)
        self._combine = combine
        self._normalizers = {
            entry.resolved_name: RunningNormalizer() for entry in entries if entry.is_normalized
        }
        self._curricula = {
            entry.resolved_name: Curriculum(entry.part_weights, entry.curriculum)
            for entry in entries
            if entry.curriculum is not None
        }

    def scores(self, by_part: Sequence[Rows], requests: Sequence[ScoreRequest]) -> Rows:
        """Return the combined outcome of each completion."""
        self._update_statistics(self._entries, by_part)
        return [
            tuple(self._outcome(outcomes, request) for outcomes in zip(*rows, strict=True))
            for request, rows in zip(requests, zip(*by_part, strict=True), strict=True)
        ]

    def comparisons(
        self, by_part: Sequence[Answers], requests: Sequence[ScoreRequest]
    ) -> list[Comparison]:
        """Return the combined win probabilities of each request."""
        if not any(entry.is_pairwise for entry in self._entries):
            rows: Sequence[Rows] = by_part  # type: ignore[assignment]  # no part compares
            return [compare_scores(outcomes) for outcomes in self.scores(rows, requests)]
        compared = [
            self._comparisons_of(entry, answers)
            for entry, answers in zip(self._entries, by_part, strict=True)
        ]
        return [
            self._mix(comparisons, request)
            for request, comparisons in zip(requests, zip(*compared, strict=True), strict=True)
        ]

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Let curricula take an iteration's metrics, which have the means of all parts."""
        for name, curriculum in self._curricula.items():
            means = {part: f"scorer/{name}/{part}/reward_mean" for part in curriculum.factors}
            curriculum.observe({p: metrics[mean] for p, mean in means.items() if mean in metrics})

    def curriculum_metrics(self) -> dict[str, float]:
        """Return the factor on each part's weight, as "<scorer>/<part>/curriculum"."""
        return {
            f"{name}/{part}/curriculum": factor
            for name, curriculum in self._curricula.items()
            for part, factor in curriculum.factors.items()
        }

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the running statistics and rates by part name, as plain JSON values."""
        return {
            "normalizers": {
                name: normalizer.state_dict() for name, normalizer in self._normalizers.items()
            },
            "curricula": {
                name: curriculum.state_dict() for name, curriculum in self._curricula.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Restore the running statistics and rates.

        Raises CheckpointError unless the state is that of the same parts.
        """
        rates = state.get("curricula", {})
        if set(rates) != set(self._curricula):
            raise CheckpointError(
                f"the checkpoint has curricula of the scorers {sorted(rates) or 'none'}, the "
                f"config of {sorted(self._curricula) or 'none'}"
            )
        for name, curriculum in self._curricula.items():
            curriculum.load_state_dict(rates[name])
        saved = state.get("normalizers", {})
        if set(saved) != set(self._normalizers):
            raise CheckpointError(
                f"the checkpoint has statistics of the scorers {sorted(saved) or 'none'}, "
                f"the config normalizes {sorted(self._normalizers) or 'none'}"
            )
        for name, normalizer in self._normalizers.items():
            normalizer.load_state_dict(saved[name])

    def _update_statistics(
        self, entries: Sequence[ScorerEntryConfig], by_part: Sequence[Rows]
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
        for entry, outcomes in zip(entries, flat, strict=True):
            if entry.is_normalized:
                scores = (
                    entry.transformed(self._raw(entry, outcome))
                    for outcome, counts in zip(outcomes, final, strict=True)
                    if counts and isinstance(outcome, Scored)
                )
                self._normalizers[entry.resolved_name].update(filter(math.isfinite, scores))

    def _raw(self, entry: ScorerEntryConfig, outcome: Scored) -> float:
        """Return a scorer's score, with the current weights where it has a curriculum."""
        curriculum = self._curricula.get(entry.resolved_name)
        return outcome.value if curriculum is None else curriculum.score(outcome)

    def _utility(self, entry: ScorerEntryConfig, outcome: Scored) -> float:
        value = entry.transformed(self._raw(entry, outcome))
        return self._normalizers[entry.resolved_name](value) if entry.is_normalized else value

    def _outcome(self, outcomes: tuple[Outcome, ...], request: ScoreRequest) -> Outcome:
        problem = self._problem(outcomes, request)
        if problem is not None:
            return problem
        scored = [
            (entry, outcome)
            for entry, outcome in zip(self._entries, outcomes, strict=True)
            if isinstance(outcome, Scored)
        ]
        total = self._total(
            [entry.weight for entry, _ in scored],
            [self._utility(entry, outcome) for entry, outcome in scored],
        )
        if not abs(total) <= MAX_SCORE:  # NaN too
            what = self._combine.type.replace("_", " ")
            return Invalid(reason=f"the {what} is {total:g}; {EXPECTED}")
        parts: dict[str, float] = {}
        replies: Replies = ()
        for entry, outcome in scored:
            name = entry.resolved_name
            parts[name] = outcome.value
            parts |= {f"{name}/{key}": value for key, value in outcome.parts.items()}
            replies += named(outcome.replies, name)
        return Scored(value=total, parts=parts, replies=replies)

    def _total(self, weights: Sequence[float], values: Sequence[float]) -> float:
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

    def _comparisons_of(self, entry: ScorerEntryConfig, answers: Answers) -> list[Comparison]:
        """Return one part's comparisons: its own, or those of its scores."""
        if entry.is_pairwise:
            return answers  # type: ignore[return-value]  # a pairwise part's answers
        rows: Rows = answers  # type: ignore[assignment]
        self._update_statistics([entry], [rows])
        return [
            compare_scores([self._scaled(entry, outcome) for outcome in outcomes])
            for outcomes in rows
        ]

    def _scaled(self, entry: ScorerEntryConfig, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Scored):
            return outcome
        value = self._utility(entry, outcome)
        if not abs(value) <= MAX_SCORE:
            return Invalid(reason=f"the transformed score is {value:g}; {EXPECTED}")
        return Scored(value=value, replies=outcome.replies)

    def _mix(self, comparisons: tuple[Comparison, ...], request: ScoreRequest) -> Comparison:
        problem = self._problem(comparisons, request)
        if problem is not None:
            return problem
        known = [
            (entry, comparison)
            for entry, comparison in zip(self._entries, comparisons, strict=True)
            if isinstance(comparison, Compared)
        ]
        mixed_KK = sum(entry.weight * compared.win for entry, compared in known) / sum(
            entry.weight for entry, _ in known
        )
        # Mirrored once more: rounding of a weighted mean must not make win[i, j] + win[j, i] differ
        # from 1.
        upper_KK = np.triu(mixed_KK, 1)
        win_KK = upper_KK + np.tril(1.0 - upper_KK.T, -1) + 0.5 * np.eye(len(upper_KK))
        if not has_verdict(win_KK):
            names = ", ".join(entry.resolved_name for entry, _ in known)
            return Invalid(reason=f"no two completions were compared by all of {names}")
        replies = tuple(
            tuple(
                chain.from_iterable(
                    named(compared.replies_about(index), entry.resolved_name)
                    for entry, compared in known
                )
            )
            for index in range(len(win_KK))
        )
        return Compared(win=win_KK, source="pairwise", replies=replies if any(replies) else ())

    def _problem(
        self, responses: Sequence[Outcome | Comparison], request: ScoreRequest
    ) -> Problem | None:
        """Return why the combination has no value; None where it has one.

        Failed where any part failed (transient only where all failures are), Invalid where any is
        invalid; with names and reasons.
        """
        present = [
            (entry.resolved_name, response)
            for entry, response in zip(self._entries, responses, strict=True)
            if not isinstance(response, Skipped)
        ]
        if not present:
            return self._no_part(responses, request)
        problems = [
            (name, response) for name, response in present if isinstance(response, Invalid | Failed)
        ]
        if not problems:
            return None
        reason = "; ".join(f"{name}: {problem.reason}" for name, problem in problems)
        failures = [problem for _, problem in problems if isinstance(problem, Failed)]
        if not failures:
            return Invalid(reason=reason)
        return Failed(reason=reason, transient=all(failure.transient for failure in failures))

    def _no_part(self, responses: Sequence[Outcome | Comparison], request: ScoreRequest) -> Invalid:
        names = ", ".join(entry.resolved_name for entry in self._entries)
        if not any(judges(entry, request.prompt) for entry in self._entries):
            named = ", ".join(request.prompt.scorers or ()) or "none"
            return Invalid(reason=f"no scorer judges it: its prompt names {named}, not {names}")
        return Skipped(reason=f"skipped by all scorers that judge it ({names})")


class Combined:
    """Scorers in this process and their combination, see the module's docstring."""

    def __init__(self, parts: Sequence[Part], combine: CombineConfig = WEIGHTED_SUM) -> None:
        self.parts = Parts(parts)
        self._combination = Combination([part.config for part in parts], combine)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return the combined outcome of each completion."""
        return self._combination.scores(self.parts.score(requests), requests)

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the combined win probabilities of each request."""
        return self._combination.comparisons(self.parts.compare(requests), requests)

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the running statistics."""
        return self._combination.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Restore the running statistics."""
        self._combination.load_state_dict(state)

    def take_counts(self) -> dict[str, float]:
        """Return what the scorers counted since the last call, as "<scorer>/<count>"."""
        return self.parts.take_counts()

    def close(self) -> None:
        """Close every part, even where one raises."""
        self.parts.close()
