"""Held-out completions over the iterations: texts, confidence intervals, before against after.

An interval is the mean of the scores and 1.96 standard errors over prompts: 95 % for more than a
few prompts. Every evaluation has the same prompts and seeds, so that differences are paired.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rayhf.view.run import Run
from rayhf.view.samples import first_of, question, read_columns

Interval = tuple[float, float, float]
"""(mean, low, high)."""
_COLUMNS = ["iteration", "kind", "text", "score", "outcome", "reason", "finish_reason", "replies"]


def heldout_prompts(run: Run) -> list[dict[str, Any]]:
    """Return the held-out prompts of the newest evaluation."""
    files = run.tables("heldout")
    if not files:
        return []
    table = read_columns(files[max(files)], ["prompt_id", "messages"])
    first = first_of(table["prompt_id"].to_pylist())
    return [
        {"prompt_id": row["prompt_id"], "prompt": question(row["messages"])}
        for row in table.take(first).to_pylist()
    ]


def heldout_answers(run: Run, prompt_id: str) -> list[dict[str, Any]]:
    """Return the completions of one held-out prompt, oldest evaluation first."""
    rows: list[dict[str, Any]] = []
    for file in run.tables("heldout").values():
        try:
            names = pq.read_schema(file).names
            columns = [name for name in _COLUMNS if name in names]
            table = pq.read_table(file, columns=columns, filters=[("prompt_id", "=", prompt_id)])
        except OSError:
            continue
        rows += [{"replies": None, **row} for row in table.to_pylist()]
    return rows


def heldout_intervals(run: Run) -> dict[str, list[tuple[int, float, float]]]:
    """Return (iteration, low, high) of the mean score by kind of completion."""
    intervals: dict[str, list[tuple[int, float, float]]] = {}
    for iteration, file in run.tables("heldout").items():
        for kind, scores in _scores(file).items():
            if found := interval([score for score in scores.values() if score is not None]):
                intervals.setdefault(kind, []).append((iteration, *found[1:]))
    return intervals


def heldout_change(run: Run) -> list[dict[str, Any]]:
    """Return the mean scores of the first and the last evaluation, and their paired difference."""
    files = run.tables("heldout")
    if len(files) < 2:
        return []
    first, last = min(files), max(files)
    before = _scores(files[first])
    after = _scores(files[last])
    rows = []
    for kind in before.keys() & after.keys():
        pairs = [
            (old, new)
            for prompt, old in before[kind].items()
            if old is not None and (new := after[kind].get(prompt)) is not None
        ]
        change = interval([new - old for old, new in pairs])
        if change is None:
            continue
        rows.append(
            {
                "kind": kind,
                "prompts": len(pairs),
                "iterations": (first, last),
                "before": interval([old for old, _ in pairs]),
                "after": interval([new for _, new in pairs]),
                "difference": change,
            }
        )
    return sorted(rows, key=lambda row: str(row["kind"]), reverse=True)


def interval(values: list[float]) -> Interval | None:
    """Return mean, low and high of one value per prompt; None for fewer than two."""
    if len(values) < 2:
        return None
    scores: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    mean = float(scores.mean())
    half = 1.96 * float(scores.std(ddof=1)) / float(np.sqrt(len(scores)))
    return (mean, mean - half, mean + half)


def _scores(file: Path) -> dict[str, dict[str, float | None]]:
    """Return the scores of an evaluation: kind -> prompt -> score; empty where it vanished."""
    try:
        return _read_scores(file, file.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=2000)
def _read_scores(file: Path, _changed: int) -> dict[str, dict[str, float | None]]:
    scores: dict[str, dict[str, float | None]] = {}
    table = read_columns(file, ["kind", "prompt_id", "score"])
    for kind, prompt, score in zip(*(column.to_pylist() for column in table.columns), strict=True):
        scores.setdefault(kind, {})[prompt] = score
    return scores
