"""What people are asked about: pairs of completions, and single ones, least certain first.

In: the committed samples and examples of a run directory. Out: pairs and completions with their
texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import pyarrow.parquet as pq

from rayhf.algorithms.routing import MAX_EXPIRE
from rayhf.run_dir.names import iteration_name
from rayhf.run_dir.state import CampaignState, read_state
from rayhf.run_dir.tables import transcript
from rayhf.types import PEOPLE, Message

_RECENT = 5
"""Committed iterations that are asked about: older completions no longer represent the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainPair:
    """Two completions of one prompt that the scorers hardly distinguish."""

    pair_id: str
    """iteration/prompt/first/second; the last two are indices into the prompt's samples."""
    messages: tuple[Message, ...]
    """The prompt."""
    first: str
    second: str
    certainty: float
    """|P(first is better) - 1/2| of a pairwise scorer; otherwise the distance of the scores, in
    standard deviations of the iteration's scores."""

    @property
    def label_id(self) -> str:
        """What a verdict on it names."""
        return self.pair_id


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainCompletion:
    """A completion that the scorers find neither good nor bad."""

    completion_id: str
    """iteration/prompt/sample; the last is its index among the prompt's samples."""
    messages: tuple[Message, ...]
    """The prompt."""
    completion: str
    certainty: float
    """Distance of its score from the mean of the iteration's, in standard deviations of these."""

    @property
    def label_id(self) -> str:
        """What a verdict on it names."""
        return self.completion_id


_Question = TypeVar("_Question", UncertainPair, UncertainCompletion)


class _ScoredRow(TypedDict):
    """A scored row of the samples table."""

    messages: list[Message]
    sample: int
    text: str
    turns: list[dict[str, object]] | None
    score: float
    wins: list[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """The scored answers of an iteration."""

    iteration: int
    groups: Mapping[str, Sequence[_ScoredRow]]
    """By prompt."""
    mean: float
    """Of all scores."""
    spread: float
    """Their standard deviation."""

    def pair(self, prompt: str, first: _ScoredRow, second: _ScoredRow) -> UncertainPair:
        wins = first["wins"]
        if wins is not None and np.isfinite(wins[second["sample"]]):
            certainty = abs(wins[second["sample"]] - 0.5)
        else:
            certainty = self._deviations(first["score"] - second["score"])
        return UncertainPair(
            pair_id=f"{self.iteration}/{prompt}/{first['sample']}/{second['sample']}",
            messages=tuple(first["messages"]),
            first=_text(first),
            second=_text(second),
            certainty=certainty,
        )

    def completion(self, prompt: str, row: _ScoredRow) -> UncertainCompletion:
        return UncertainCompletion(
            completion_id=f"{self.iteration}/{prompt}/{row['sample']}",
            messages=tuple(row["messages"]),
            completion=_text(row),
            certainty=self._deviations(row["score"] - self.mean),
        )

    def _deviations(self, difference: float) -> float:
        return abs(difference) / self.spread if self.spread else 0.0


def uncertain_pairs(run: Path, count: int, *, labeled: Collection[str] = ()) -> list[UncertainPair]:
    """Return pairs that are not `labeled`: those that wait for people, then the least certain ones.

    Of each kind the newest iteration first. Of the second kind at most one per prompt and
    iteration; pairs that wait are not among them.
    """

    def waiting(scored: _Scored, prompt: str, rows: Sequence[_ScoredRow]) -> UncertainPair | None:
        return scored.pair(prompt, *rows) if len(rows) == 2 else None

    def of_prompt(scored: _Scored, prompt: str) -> Iterator[UncertainPair]:
        for first, second in combinations(scored.groups[prompt], 2):
            if first["text"] != second["text"]:
                yield scored.pair(prompt, first, second)

    return _questions(run, count, labeled, waiting, of_prompt)


def uncertain_completions(
    run: Path, count: int, *, labeled: Collection[str] = ()
) -> list[UncertainCompletion]:
    """Return completions like pairs: those that wait for people, then the least certain ones."""

    def waiting(
        scored: _Scored, prompt: str, rows: Sequence[_ScoredRow]
    ) -> UncertainCompletion | None:
        return scored.completion(prompt, *rows) if len(rows) == 1 else None

    def of_prompt(scored: _Scored, prompt: str) -> Iterator[UncertainCompletion]:
        for row in scored.groups[prompt]:
            yield scored.completion(prompt, row)

    return _questions(run, count, labeled, waiting, of_prompt)


def _questions(
    run: Path,
    count: int,
    labeled: Collection[str],
    waiting: Callable[[_Scored, str, Sequence[_ScoredRow]], _Question | None],
    of_prompt: Callable[[_Scored, str], Iterator[_Question]],
) -> list[_Question]:
    """Return what waits for people, as `waiting` makes it, and each prompt's least certain."""
    committed = committed_iteration(run)
    asked = [waiting(*example) for example in _waiting(run, committed)]
    questions: list[_Question] = [
        each for each in asked if each is not None and each.label_id not in labeled
    ]
    shown = {*labeled, *(question.label_id for question in questions)}
    for iteration in range(committed, max(0, committed - _RECENT), -1):
        if len(questions) >= count or not samples_file(run, iteration).exists():
            break
        scored = _read(run, iteration)
        least = [
            min(of_prompt(scored, prompt), key=lambda each: each.certainty, default=None)
            for prompt in scored.groups
        ]
        new = [each for each in least if each is not None and each.label_id not in shown]
        questions += sorted(new, key=lambda each: each.certainty)
    return questions[:count]


def _waiting(run: Path, committed: int) -> Iterator[tuple[_Scored, str, list[_ScoredRow]]]:
    """Yield what committed iterations left to people and what has not expired.

    With its iteration, its prompt, and its one or two samples.
    """
    for iteration in range(committed, max(0, committed - MAX_EXPIRE), -1):
        file = run / "examples" / f"{iteration_name(iteration)}.parquet"
        if not (file.exists() and samples_file(run, iteration).exists()):
            return
        columns = ["prompt_id", "samples", "scalars"]
        waiting = [
            (row["prompt_id"], sorted(row["samples"]))
            for row in pq.read_table(
                file, columns=columns, filters=[("objective", "=", PEOPLE)]
            ).to_pylist()
            if dict(row["scalars"])["expires"] > committed
        ]
        if not waiting:
            continue
        scored = _read(run, iteration)
        for prompt, samples in waiting:
            rows = {row["sample"]: row for row in scored.groups[prompt]}
            yield scored, prompt, [rows[sample] for sample in samples]


def _read(run: Path, iteration: int) -> _Scored:
    """Return the scored answers of an iteration."""
    columns = ["prompt_id", "kind", "parent", *_ScoredRow.__annotations__]
    groups: dict[str, list[_ScoredRow]] = defaultdict(list)
    for row in pq.read_table(samples_file(run, iteration), columns=columns).to_pylist():
        if row["kind"] == "answer" and row["parent"] is None and row["score"] is not None:
            groups[row["prompt_id"]].append(row)
    scores = [row["score"] for rows in groups.values() for row in rows]
    return _Scored(
        iteration=iteration,
        groups=groups,
        mean=float(np.mean(scores)) if scores else 0.0,
        spread=float(np.std(scores)) if scores else 0.0,
    )


def _text(row: _ScoredRow) -> str:
    return transcript(row["turns"]) or row["text"]


def committed_iteration(run: Path) -> int:
    """Return the last committed iteration."""
    return (read_state(run) or CampaignState()).iteration


def samples_file(run: Path, iteration: int) -> Path:
    """Return the file of an iteration's samples."""
    return run / "samples" / f"{iteration_name(iteration)}.parquet"
