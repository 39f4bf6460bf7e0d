"""Scores and comparisons of given completions, by scorers in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from rayhf.config.scorers import ScorerEntryConfig
from rayhf.errors import ConfigError, ScorerError
from rayhf.evaluation.duels import Contest, both_orders, merge_orders
from rayhf.evaluation.statistics import Array
from rayhf.scorer.build import build_parts, build_scorer
from rayhf.scorer.parts import Parts
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Completion, Outcome, Prompt, Scored, ScoreRequest

Samples = Sequence[Sequence[Completion]]
"""By prompt, its completions."""


def scorer_setup(device: str) -> ScorerSetup:
    """Return where scorers of this command run."""
    return ScorerSetup(base=Path.cwd(), device="cuda" if device == "gpu" else "cpu")


def score_each(
    entries: Sequence[ScorerEntryConfig],
    prompts: Sequence[Prompt],
    completions: Samples,
    *,
    device: str,
    max_failed: float,
) -> Mapping[str, Array]:
    """Return each scorer's scores by its name, (P, N); NaN where there is none.

    Raises ScorerError where more than `max_failed` of a scorer's completions have no score.
    """
    with closing(Parts(build_parts(entries, scorer_setup(device)))) as parts:
        rows = parts.score(_requests(prompts, completions))
    return {
        entry.resolved_name: _matrix(
            [outcome for (outcome,) in own], len(prompts), entry, max_failed
        )
        for entry, own in zip(entries, rows, strict=True)
    }


def score_combined(
    entries: Sequence[ScorerEntryConfig],
    prompts: Sequence[Prompt],
    completions: Samples,
    *,
    device: str,
) -> Array:
    """Return the scorers' weighted sum, (P, N). Raises ScorerError where one is missing."""
    with closing(build_scorer(entries, scorer_setup(device))) as scorer:
        outcomes = [outcome for (outcome,) in scorer.score(_requests(prompts, completions))]
    return _matrix(outcomes, len(prompts), None, 0.0)


def compare_all(
    entries: Sequence[ScorerEntryConfig], contests: Sequence[Contest], *, device: str
) -> list[Array | None]:
    """Return the win probabilities of each contest; None where there is no verdict.

    Raises ScorerError where there is none at all.
    """
    with closing(build_scorer(entries, scorer_setup(device))) as scorer:
        wins, reason = merge_orders(scorer.compare(both_orders(contests)))
    if all(win is None for win in wins):
        raise ScorerError(f"judge: no answers could be compared; the first: {reason}")
    return wins


def _requests(prompts: Sequence[Prompt], completions: Samples) -> list[ScoreRequest]:
    """Return one request per completion: a scorer may compare those of one request."""
    return [
        ScoreRequest(prompt=prompt, completions=(replace(completion, index=0),))
        for prompt, each in zip(prompts, completions, strict=True)
        for completion in each
    ]


def _matrix(
    outcomes: Sequence[Outcome],
    prompts: int,
    entry: ScorerEntryConfig | None,
    max_failed: float,
) -> Array:
    missing = [outcome for outcome in outcomes if not isinstance(outcome, Scored)]
    if len(missing) > max_failed * len(outcomes):
        name = "the scorers" if entry is None else entry.resolved_name
        raise ScorerError(
            f"{len(missing)} of {len(outcomes)} completions have no score of {name} (max_failed "
            f"allows {max_failed:g}); the first: {missing[0].reason}"
        )
    values = [
        (outcome.value if entry is None else entry.transformed(outcome.value))
        if isinstance(outcome, Scored)
        else np.nan
        for outcome in outcomes
    ]
    return np.asarray(values, dtype=np.float64).reshape(prompts, -1)


def check_judge(entries: Sequence[ScorerEntryConfig] | None, key: str) -> None:
    """Check scorers without loading weights. Raises ConfigError that begins with `key`."""
    from rayhf.scorer.build import check_entries

    if entries is None:
        return
    for index, entry in enumerate(entries):
        if entry.is_normalized:
            raise ConfigError(
                f"{key}[{index}]: {entry.resolved_name} has normalize, which is for a campaign's "
                "scores; leave it out"
            )
        if entry.curriculum is not None:
            raise ConfigError(
                f"{key}[{index}]: {entry.resolved_name} has a curriculum, which is for a "
                "campaign's scores; leave it out"
            )
    check_entries(entries, Path.cwd(), where=key)
