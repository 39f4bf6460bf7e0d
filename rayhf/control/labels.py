"""Human preferences: which pairs of completions people should label, and what labels become.

In: the committed samples of a run directory, and labels of its inbox. Out: pairs, least certain
first; training examples.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.parquet as pq

from rayhf.algorithms.routing import MAX_EXPIRE
from rayhf.episodes import inserted_tokens
from rayhf.errors import ConfigError
from rayhf.run_dir.files import storage_errors
from rayhf.run_dir.inbox import check_submission
from rayhf.run_dir.names import iteration_name
from rayhf.run_dir.state import CampaignState, read_state
from rayhf.run_dir.tables import transcript
from rayhf.types import PEOPLE, Example, JsonObject, Message, given_row

_RECENT = 5
"""Committed iterations that pairs come from: older completions no longer represent the policy."""


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


class _ScoredRow(TypedDict):
    """A scored row of the samples table."""

    messages: list[Message]
    sample: int
    text: str
    turns: list[dict[str, object]] | None
    score: float
    wins: list[float] | None


class _TokenRow(TypedDict):
    """What a training row needs of the samples table."""

    prompt_id: str
    sample: int
    context_ids: list[int]
    token_ids: list[int]
    inserted_ids: list[int] | None
    inserted_before: list[int] | None


def uncertain_pairs(run: Path, count: int, *, labeled: Collection[str] = ()) -> list[UncertainPair]:
    """Return pairs that are not `labeled`: those that wait for people, then the least certain ones.

    Of each kind the newest iteration first. Of the second kind at most one per prompt and
    iteration; pairs that wait are not among them.
    """
    committed = _committed(run)
    pairs = [pair for pair in _waiting_pairs(run, committed) if pair.pair_id not in labeled]
    shown = {*labeled, *(pair.pair_id for pair in pairs)}
    for iteration in range(committed, max(0, committed - _RECENT), -1):
        file = _samples_file(run, iteration)
        if len(pairs) >= count or not file.exists():
            break
        candidates = (pair for pair in _pairs(file, iteration) if pair.pair_id not in shown)
        pairs += sorted(candidates, key=lambda pair: pair.certainty)
    return pairs[:count]


def _waiting_pairs(run: Path, committed: int) -> Iterator[UncertainPair]:
    """Yield the pairs that committed iterations left to people and that have not expired."""
    for iteration in range(committed, max(0, committed - MAX_EXPIRE), -1):
        file = run / "examples" / f"{iteration_name(iteration)}.parquet"
        samples = _samples_file(run, iteration)
        if not (file.exists() and samples.exists()):
            return
        columns = ["prompt_id", "samples", "scalars"]
        waiting = [
            (row["prompt_id"], *sorted(row["samples"]))
            for row in pq.read_table(
                file, columns=columns, filters=[("objective", "=", PEOPLE)]
            ).to_pylist()
            if dict(row["scalars"])["expires"] > committed
        ]
        if not waiting:
            continue
        groups, spread = _scored_groups(samples)
        for prompt, first, second in waiting:
            rows = {row["sample"]: row for row in groups[prompt]}
            yield _pair(iteration, prompt, rows[first], rows[second], spread)


def unanswered_pairs(
    iteration: int, pairs: Sequence[Example], labels: Sequence[JsonObject]
) -> tuple[Example, ...]:
    """Return the pairs of an iteration that no label judges, in either order."""
    judged = {str(label["pair_id"]) for label in labels}

    def is_judged(pair: Example) -> bool:
        first, second = (row.sample for row in pair.rows)
        prompt = pair.rows[0].prompt_id
        return not judged.isdisjoint(
            {f"{iteration}/{prompt}/{first}/{second}", f"{iteration}/{prompt}/{second}/{first}"}
        )

    return tuple(pair for pair in pairs if not is_judged(pair))


def _committed(run: Path) -> int:
    return (read_state(run) or CampaignState()).iteration


def _pairs(file: Path, iteration: int) -> Iterator[UncertainPair]:
    """Yield each prompt's least certain pair of different texts."""
    groups, spread = _scored_groups(file)
    for prompt, rows in groups.items():
        pairs = (
            _pair(iteration, prompt, first, second, spread)
            for first, second in combinations(rows, 2)
            if first["text"] != second["text"]
        )
        best = min(pairs, key=lambda pair: pair.certainty, default=None)
        if best is not None:
            yield best


def _scored_groups(file: Path) -> tuple[dict[str, list[_ScoredRow]], float]:
    """Return the scored answers by prompt, and the standard deviation of all their scores."""
    columns = ["prompt_id", "kind", "parent", *_ScoredRow.__annotations__]
    groups: dict[str, list[_ScoredRow]] = defaultdict(list)
    for row in pq.read_table(file, columns=columns).to_pylist():
        if row["kind"] == "answer" and row["parent"] is None and row["score"] is not None:
            groups[row["prompt_id"]].append(row)
    scores = [row["score"] for rows in groups.values() for row in rows]
    return groups, float(np.std(scores)) if scores else 0.0


def _pair(
    iteration: int, prompt: str, first: _ScoredRow, second: _ScoredRow, spread: float
) -> UncertainPair:
    return UncertainPair(
        pair_id=f"{iteration}/{prompt}/{first['sample']}/{second['sample']}",
        messages=tuple(first["messages"]),
        first=transcript(first["turns"]) or first["text"],
        second=transcript(second["turns"]) or second["text"],
        certainty=_certainty(first, second, spread),
    )


def _certainty(first: _ScoredRow, second: _ScoredRow, spread: float) -> float:
    wins = first["wins"]
    if wins is not None and np.isfinite(wins[second["sample"]]):
        return abs(wins[second["sample"]] - 0.5)
    return abs(first["score"] - second["score"]) / spread if spread else 0.0


def check_labels(run: Path, labels: Sequence[Mapping[str, object]]) -> list[JsonObject]:
    """Return labels as they are stored, with a digest of the completions that were judged.

    Raises ConfigError for an unknown verdict, and for a pair of no committed iteration.
    """
    rows = [
        check_submission(
            {key: label.get(key) for key in ("pair_id", "verdict")},
            "labels",
            f"labels: row {number}",
        )
        for number, label in enumerate(labels, start=1)
    ]
    committed = _committed(run)
    pairs = _Pairs(run, [str(row["pair_id"]) for row in rows])
    return [
        {**row, "completions": _digest(pairs.find(str(row["pair_id"]), committed=committed))}
        for row in rows
    ]


def label_is_due(label: JsonObject, iteration: int) -> bool:
    """Return whether the label's pair is of an iteration before this one.

    A label waits where its pair's iteration is to be repeated.
    """
    number = str(label["pair_id"]).partition("/")[0]
    return not _is_index(number) or int(number) < iteration


def labeled_examples(
    run: Path, labels: Sequence[JsonObject], *, warn: Callable[[str], object]
) -> tuple[Example, ...]:
    """Return a (preferred, other) example for every label that is not a tie.

    The last verdict of an annotator on a pair counts; those of several annotators all do. Their
    rows count as given, not sampled: their lineage is the inbox, and their completions may be older
    than importance weights can correct. `warn` gets a line about each label that cannot be used,
    and one about pairs on which annotators contradict each other.
    """
    last = {(str(row["pair_id"]), str(row["source"])): row for row in labels}
    pairs = _Pairs(run, [pair_id for pair_id, _ in last])
    used: list[JsonObject] = []
    examples = []
    for (pair_id, _), label in last.items():
        try:
            first, second = pairs.find(pair_id)
            if label.get("completions", "") not in ("", _digest((first, second))):
                raise ConfigError(
                    f"pair {pair_id!r:.80}: its completions are not the ones that were judged: the "
                    "iteration was repeated"
                )
        except ConfigError as error:
            warn(f"skipped a label: {label['place']}, submitted by {label['source']}: {error}")
            continue
        used.append(label)
        if label["verdict"] == "tie":
            continue
        chosen, rejected = (first, second) if label["verdict"] == "first" else (second, first)
        rows = tuple(
            given_row(
                row["prompt_id"],
                row["context_ids"],
                row["token_ids"],
                inserted=inserted_tokens(row["inserted_ids"], row["inserted_before"]),
            )
            for row in (chosen, rejected)
        )
        examples.append(Example(rows=rows))
    if line := contradictions((str(row["pair_id"]), str(row["verdict"])) for row in used):
        warn(line)
    return tuple(examples)


def contradictions(verdicts: Iterable[tuple[str, str]]) -> str:
    """Return a line about the pairs whose verdicts differ; empty where there are none."""
    by_pair: dict[str, set[str]] = defaultdict(set)
    for pair_id, verdict in verdicts:
        by_pair[pair_id].add(verdict)
    differing = {pair: sorted(words) for pair, words in by_pair.items() if len(words) > 1}
    if not differing:
        return ""
    pair, words = next(iter(differing.items()))
    return (
        f"annotators contradict each other on {len(differing)} pairs; the first is {pair!r:.80}: "
        f"{' and '.join(words)}; each verdict counts"
    )


class _Pairs:
    """Rows of pairs of completions; each iteration's file is read once."""

    def __init__(self, run: Path, pair_ids: Iterable[str]) -> None:
        self._run = run
        self._prompts: dict[int, set[str]] = defaultdict(set)
        for pair_id in pair_ids:
            parts = pair_id.split("/")
            if len(parts) == 4 and _is_index(parts[0]):
                self._prompts[int(parts[0])].add(parts[1])
        self._rows: dict[int, dict[tuple[str, int], _TokenRow]] = {}

    def find(self, pair_id: str, *, committed: int | None = None) -> tuple[_TokenRow, _TokenRow]:
        """Return the two rows of a pair.

        Raises ConfigError for a pair that does not exist, or that is newer than `committed`.
        """
        parts = pair_id.split("/")
        if len(parts) != 4 or not all(map(_is_index, (parts[0], *parts[2:]))):
            raise ConfigError(
                f"no pair {pair_id!r:.80}; expected iteration/prompt/first/second, as in "
                "`rayhf pairs`"
            )
        iteration = int(parts[0])
        first = int(parts[2])
        second = int(parts[3])
        file = _samples_file(self._run, iteration)
        if not file.exists() or (committed is not None and iteration > committed):
            raise ConfigError(f"no pair {pair_id!r:.80}: iteration {iteration} is not committed")
        if iteration not in self._rows:
            self._rows[iteration] = self._read(file, self._prompts[iteration])
        rows = [self._rows[iteration].get((parts[1], number)) for number in (first, second)]
        if first == second or rows[0] is None or rows[1] is None:
            raise ConfigError(
                f"no pair {pair_id!r:.80}: iteration {iteration} does not have these two "
                "completions"
            )
        return rows[0], rows[1]

    @staticmethod
    def _read(file: Path, prompts: set[str]) -> dict[tuple[str, int], _TokenRow]:
        columns = list(_TokenRow.__annotations__)
        with storage_errors("read", file):
            chosen = [("prompt_id", "in", sorted(prompts))]
            table = pq.read_table(file, columns=columns, filters=chosen)
        return {(row["prompt_id"], row["sample"]): row for row in table.to_pylist()}


def _digest(completions: Sequence[_TokenRow]) -> str:
    text = json.dumps([list(row["token_ids"]) for row in completions])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _samples_file(run: Path, iteration: int) -> Path:
    return run / "samples" / f"{iteration_name(iteration)}.parquet"
