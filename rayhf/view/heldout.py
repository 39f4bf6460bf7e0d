"""Held-out completions over the iterations."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from rayhf.view.run import Run
from rayhf.view.samples import first_of, question, read_columns, reference_answer

_COLUMNS = ["iteration", "kind", "text", "score", "outcome", "reason", "finish_reason", "replies"]


def heldout_prompts(run: Run) -> list[dict[str, Any]]:
    """Return the held-out prompts of the newest evaluation."""
    files = run.tables("heldout")
    if not files:
        return []
    table = read_columns(files[max(files)], ["prompt_id", "messages", "row"])
    first = first_of(table["prompt_id"].to_pylist())
    return [
        {
            "prompt_id": row["prompt_id"],
            "prompt": question(row["messages"]),
            "reference_answer": reference_answer(row["row"]),
        }
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
