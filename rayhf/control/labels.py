"""Human preferences: which pairs of completions people should label, and what labels become.

In: the committed samples of a run directory, and labels of its inbox. Out: pairs, least certain
first; training examples.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.parquet as pq

from rayhf.errors import ConfigError
from rayhf.run_dir.files import storage_errors
from rayhf.run_dir.inbox import submitted_rows
from rayhf.run_dir.names import iteration_name
from rayhf.run_dir.state import CampaignState, read_state
from rayhf.types import Example, JsonObject, Message, given_row

VERDICTS = ("first", "second", "tie")
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
    score: float
    wins: list[float] | None


class _TokenRow(TypedDict):
    """What a training row needs of the samples table."""

    prompt_id: str
    sample: int
    context_ids: list[int]
    token_ids: list[int]


def uncertain_pairs(run: Path, count: int) -> list[UncertainPair]:
    """Return the least certain pairs without a label, newest iteration first.

    At most one per prompt and iteration.
    """
    committed = _committed(run)
    labeled = {row["pair_id"] for row in submitted_rows(run, "labels")}
    pairs: list[UncertainPair] = []
    for iteration in range(committed, max(0, committed - _RECENT), -1):
        file = _samples_file(run, iteration)
        if len(pairs) >= count or not file.exists():
            break
        candidates = (pair for pair in _pairs(file, iteration) if pair.pair_id not in labeled)
        pairs += sorted(candidates, key=lambda pair: pair.certainty)
    return pairs[:count]


def _committed(run: Path) -> int:
    return (read_state(run) or CampaignState()).iteration


def _pairs(file: Path, iteration: int) -> Iterator[UncertainPair]:
    """Yield each prompt's least certain pair of different texts."""
    columns = ["prompt_id", "messages", "sample", "kind", "parent", "text", "score", "wins"]
    groups: dict[str, list[_ScoredRow]] = defaultdict(list)
    for row in pq.read_table(file, columns=columns).to_pylist():
        if row["kind"] == "answer" and row["parent"] is None and row["score"] is not None:
            groups[row["prompt_id"]].append(row)
    scores = [row["score"] for rows in groups.values() for row in rows]
    spread = float(np.std(scores)) if scores else 0.0
    for prompt, rows in groups.items():
        best = None
        for index, first in enumerate(rows):
            for second in rows[index + 1 :]:
                if first["text"] == second["text"]:
                    continue
                certainty = _certainty(first, second, spread)
                if best is None or certainty < best.certainty:
                    best = UncertainPair(
                        pair_id=f"{iteration}/{prompt}/{first['sample']}/{second['sample']}",
                        messages=tuple(first["messages"]),
                        first=first["text"],
                        second=second["text"],
                        certainty=certainty,
                    )
        if best is not None:
            yield best


def _certainty(first: _ScoredRow, second: _ScoredRow, spread: float) -> float:
    wins = first["wins"]
    if wins is not None and np.isfinite(wins[second["sample"]]):
        return abs(wins[second["sample"]] - 0.5)
    return abs(first["score"] - second["score"]) / spread if spread else 0.0


def check_label(run: Path, pair_id: str, verdict: str) -> str:
    """Return a hash of the pair's tokens: the campaign trains on these completions only.

    Raises ConfigError for an unknown verdict, or a pair of no committed iteration.
    """
    if verdict not in VERDICTS:
        raise ConfigError(f"the verdict is {verdict!r:.40}; expected {', '.join(VERDICTS)}")
    return _hash(_completions(run, pair_id, committed=_committed(run)))


def _hash(rows: Sequence[_TokenRow]) -> str:
    tokens = [(row["context_ids"], row["token_ids"]) for row in rows]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def is_ready(run: Path, iteration: int, label: JsonObject) -> bool:
    """Return whether `iteration` can use a label: its pair's iteration has been explored.

    It waits where that iteration is repeated, because its checkpoint was damaged.
    """
    number = str(label.get("pair_id")).partition("/")[0]
    if not _is_index(number):
        return True  # it never becomes a pair: `labeled_examples` leaves it out
    return int(number) < iteration and _samples_file(run, int(number)).exists()


def labeled_examples(
    run: Path, labels: Sequence[JsonObject], *, warn: Callable[[str], None]
) -> tuple[Example, ...]:
    """Return a (preferred, other) example for every label that is not a tie.

    Their rows count as given, not sampled: their lineage is the inbox, and their completions may be
    older than importance weights can correct. A label whose pair does not exist, or not with the
    completions that were labeled, is left out with a warning.
    """
    examples = []
    for label in labels:
        if label["verdict"] == "tie":
            continue
        try:
            first, second = _completions(run, str(label["pair_id"]))
        except ConfigError as error:
            warn(f"skipped a label: {error}")
            continue
        if label.get("completions") not in (None, _hash((first, second))):
            warn(
                f"skipped a label of pair {label['pair_id']!r:.80}: its iteration was repeated "
                "with other completions"
            )
            continue
        chosen, rejected = (first, second) if label["verdict"] == "first" else (second, first)
        rows = tuple(
            given_row(row["prompt_id"], row["context_ids"], row["token_ids"])
            for row in (chosen, rejected)
        )
        examples.append(Example(rows=rows))
    return tuple(examples)


def _completions(
    run: Path, pair_id: str, *, committed: int | None = None
) -> tuple[_TokenRow, _TokenRow]:
    """Return the two rows of a pair.

    Raises ConfigError for a pair that does not exist, or that is newer than `committed`.
    """
    parts = pair_id.split("/")
    if len(parts) != 4 or not all(map(_is_index, (parts[0], *parts[2:]))):
        raise ConfigError(
            f"no pair {pair_id!r:.80}; expected iteration/prompt/first/second, as in `rayhf pairs`"
        )
    iteration = int(parts[0])
    first = int(parts[2])
    second = int(parts[3])
    file = _samples_file(run, iteration)
    if not file.exists() or (committed is not None and iteration > committed):
        raise ConfigError(f"no pair {pair_id!r:.80}: iteration {iteration} is not committed")
    columns = ["prompt_id", "sample", "context_ids", "token_ids"]
    with storage_errors("read", file):
        table = pq.read_table(file, columns=columns, filters=[("prompt_id", "==", parts[1])])
    rows: dict[int, _TokenRow] = {row["sample"]: row for row in table.to_pylist()}
    if first == second or not {first, second} <= rows.keys():
        raise ConfigError(
            f"no pair {pair_id!r:.80}: iteration {iteration} does not have these two completions"
        )
    return rows[first], rows[second]


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _samples_file(run: Path, iteration: int) -> Path:
    return run / "samples" / f"{iteration_name(iteration)}.parquet"
