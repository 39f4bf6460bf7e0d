"""Human preferences: which pairs of answers people should look at, and what their verdicts become.

In: a run directory's committed samples, and rows of its inbox. Out: pairs, least certain first;
training examples of the verdicts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rayhf.errors import ConfigError
from rayhf.run_dir.files import storage_errors
from rayhf.run_dir.inbox import submitted_rows
from rayhf.types import Example, Message, given_row

VERDICTS = ("first", "second", "tie")
_ROUNDS_BACK = 5
"""Pairs are offered of so many of the last committed rounds: older answers are not the policy's any
more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainPair:
    """Two answers to one prompt that the scorers hardly tell apart."""

    pair_id: str
    """round/prompt/first/second: indices into the round's samples of the prompt."""
    messages: tuple[Message, ...]
    """What was asked."""
    first: str
    second: str
    certainty: float
    """|P(first is better) - 1/2| of a pairwise scorer; otherwise the distance of the scores, in
    standard deviations of the round's scores."""


def unsure_pairs(run: Path, count: int) -> list[UncertainPair]:
    """The least certain pairs nobody has judged yet, newest round first; at most one per prompt and
    round."""
    committed = int(json.loads((run / "campaign.json").read_text(encoding="utf-8"))["iteration"])
    judged = {row["pair_id"] for row in submitted_rows(run, "labels")}
    found: list[UncertainPair] = []
    for iteration in range(committed, max(0, committed - _ROUNDS_BACK), -1):
        file = _samples_file(run, iteration)
        if len(found) >= count or not file.exists():
            break
        found += sorted(
            (p for p in _pairs_of(file, iteration) if p.pair_id not in judged),
            key=lambda pair: pair.certainty,
        )
    return found[:count]


def _pairs_of(file: Path, iteration: int) -> Iterator[UncertainPair]:
    columns = ["prompt_id", "messages", "sample", "kind", "parent", "text", "score", "wins"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(file, columns=columns).to_pylist():
        if row["kind"] == "answer" and row["parent"] is None and row["score"] is not None:
            groups[row["prompt_id"]].append(row)
    scores = [row["score"] for rows in groups.values() for row in rows]
    spread = float(np.std(scores)) if scores else 0.0
    for prompt, rows in groups.items():
        best = None
        for i, first in enumerate(rows):
            for second in rows[i + 1 :]:
                certainty = _certainty(first, second, spread)
                if first["text"] != second["text"] and (best is None or certainty < best.certainty):
                    best = UncertainPair(
                        pair_id=f"{iteration}/{prompt}/{first['sample']}/{second['sample']}",
                        messages=tuple(first["messages"]),
                        first=first["text"],
                        second=second["text"],
                        certainty=certainty,
                    )
        if best is not None:
            yield best


def _certainty(first: Mapping[str, Any], second: Mapping[str, Any], spread: float) -> float:
    if first["wins"] is not None and np.isfinite(first["wins"][second["sample"]]):
        return abs(float(first["wins"][second["sample"]]) - 0.5)
    return abs(float(first["score"]) - float(second["score"])) / spread if spread else 0.0


def check_label(run: Path, pair_id: str, verdict: str) -> None:
    """Raises ConfigError unless the pair is of a committed round and the verdict is one."""
    if verdict not in VERDICTS:
        raise ConfigError(f"the verdict is {verdict!r:.40}; expected {', '.join(VERDICTS)}")
    _answers(
        run,
        pair_id,
        committed=int(json.loads((run / "campaign.json").read_text(encoding="utf-8"))["iteration"]),
    )


def labeled_examples(run: Path, labels: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """(preferred, other) for every verdict that is none of a tie, of rows that the inbox holds.

    The rows are given ones: their lineage is the inbox, and their answers may be older than an
    importance weight can mend.
    """
    examples = []
    for label in labels:
        if label["verdict"] == "tie":
            continue
        first, second = _answers(run, label["pair_id"])
        chosen, rejected = (first, second) if label["verdict"] == "first" else (second, first)
        rows = tuple(
            given_row(row["prompt_id"], row["context_ids"], row["token_ids"])
            for row in (chosen, rejected)
        )
        examples.append(Example(rows=rows))
    return tuple(examples)


def _answers(
    run: Path, pair_id: str, *, committed: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two rows of the round's samples."""
    parts = pair_id.split("/")
    if len(parts) != 4 or not all(
        parts[i].isascii() and parts[i].isdecimal() and len(parts[i]) < 10 for i in (0, 2, 3)
    ):
        raise ConfigError(
            f"no pair {pair_id!r:.80}; expected round/prompt/first/second, as it was given"
        )
    iteration, prompt, numbers = int(parts[0]), parts[1], (int(parts[2]), int(parts[3]))
    file = _samples_file(run, iteration)
    if not file.exists() or (committed is not None and iteration > committed):
        raise ConfigError(f"no pair {pair_id!r:.80}: round {iteration} is not committed")
    with storage_errors("read", file):
        rows = pq.read_table(
            file,
            columns=["prompt_id", "sample", "context_ids", "token_ids"],
            filters=[("prompt_id", "==", prompt)],
        ).to_pylist()
    found = {row["sample"]: row for row in rows}
    if numbers[0] == numbers[1] or not set(numbers) <= found.keys():
        raise ConfigError(f"no pair {pair_id!r:.80}: round {iteration} has no such two answers")
    return found[numbers[0]], found[numbers[1]]


def _samples_file(run: Path, iteration: int) -> Path:
    return run / "samples" / f"iteration-{iteration:06d}.parquet"
