"""One prompt of one iteration with everything that the run recorded about it, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayhf.run_dir.tables import transcript
from rayhf.view.run import Run, scorer_names
from rayhf.view.samples import read_columns, reference_answer, row_columns

EXAMPLE_COLUMNS = (
    "iteration",
    "prompt_id",
    "objective",
    "iterations_back",
    "samples",
    "response_ids",
    "scores",
    "margin",
    "scalars",
)
_CREDIT = {
    "ref_logp": "reference",
    "old_logp": "learner",
    "advantage": "advantage",
    "value": "value",
}
"""Columns of the credit table -> names in pages."""
_MAX_CYCLES = 50


@dataclass(frozen=True, slots=True)
class SampleText:
    """What a list of pairs shows of a sample."""

    text: str
    token_ids: list[int]
    replies: list[dict[str, Any]]
    """What judges wrote: part, against, left_out and text of each."""


class SampleTexts:
    """Texts of samples by prompt and index, one file at a time in memory."""

    def __init__(self, run: Run) -> None:
        self._files = run.tables("samples")
        self._iteration: int | None = None
        self._texts: dict[tuple[str, int], SampleText] = {}
        self._questions: dict[str, str] = {}

    def get(self, iteration: int, prompt_id: str, sample: int) -> SampleText | None:
        """Return a sample's texts; None where there is no such sample."""
        self._load(iteration)
        return self._texts.get((prompt_id, sample))

    def question(self, iteration: int, prompt_id: str) -> str:
        """Return a prompt's last message; empty where the iteration does not have it."""
        self._load(iteration)
        return self._questions.get(prompt_id, "")

    def _load(self, iteration: int) -> None:
        if iteration == self._iteration:
            return
        self._iteration = iteration
        self._texts = {}
        self._questions = {}
        columns = ["prompt_id", "sample", "text", "token_ids", "messages", "replies"]
        try:
            table = read_columns(self._files[iteration], columns)
        except (KeyError, OSError):
            return
        for row in table.to_pylist():
            self._texts[row["prompt_id"], row["sample"]] = SampleText(
                row["text"], row["token_ids"], row["replies"] or []
            )
            if row["prompt_id"] not in self._questions and row["messages"]:
                self._questions[row["prompt_id"]] = row["messages"][-1]["content"]


def read_groups(run: Run, iteration: int, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the groups of `prompts`, in their order; those that the iteration lacks are left out.

    Raises OSError where the iteration's samples cannot be read.
    """
    files = run.tables("samples")
    if iteration not in files or not prompts:
        return []
    rows = _rows_of(files[iteration], prompts)
    examples = _by_prompt(run.tables("examples").get(iteration), prompts, EXAMPLE_COLUMNS)
    credit = _by_prompt(run.tables("credit").get(iteration), prompts, None)
    labels = run.labeled()
    texts = SampleTexts(run)
    groups = []
    for prompt in prompts:
        own = rows.get(prompt)
        if not own:
            continue
        credited = {
            row["sample"]: row for row in credit.get(prompt, []) if not row["iterations_back"]
        }
        samples = [_sample_json(run, row, credited.get(row["sample"])) for row in own]
        for sample in samples:
            sample["labeled"] = labels.get((iteration, prompt, sample["sample"]), "")
        groups.append(
            {
                "run": run.run_id,
                "iteration": iteration,
                "prompt_id": prompt,
                "source": own[0]["source"],
                "messages": own[0]["messages"] or [],
                "reference_answer": reference_answer(own[0].get("row")),
                "row": _row_json(own[0].get("row")),
                "samples": samples,
                "examples": [example_json(run, row, texts) for row in examples.get(prompt, [])],
                "cycles": cycles([row.get("wins") for row in own]),
            }
        )
    return groups


def cycles(wins: Sequence[Sequence[float] | None]) -> list[list[int]]:
    """Return triples a, b, c where a beats b, b beats c and c beats a: preferences without order.

    Args:
        wins: row i has the probabilities that completion i beats each other one.
    """
    found: list[list[int]] = []
    if any(row is None for row in wins):
        return found

    def beats(i: int, j: int) -> bool:
        row = wins[i]
        return row is not None and j < len(row) and row[j] is not None and row[j] > 0.5

    for a, b, c in combinations(range(len(wins)), 3):
        for one, two, three in ((a, b, c), (a, c, b)):
            if beats(one, two) and beats(two, three) and beats(three, one):
                found.append([one, two, three])
                if len(found) == _MAX_CYCLES:
                    return found
    return found


def example_json(run: Run, row: dict[str, Any], texts: SampleTexts) -> dict[str, Any]:
    """Return a training example with its texts."""
    iteration = row["iteration"] - row["iterations_back"]
    rows = []
    scores = row["scores"] or [None] * len(row["samples"])
    for sample, ids, score in zip(row["samples"], row["response_ids"], scores, strict=True):
        known = texts.get(iteration, row["prompt_id"], sample) if sample >= 0 else None
        if known is not None and known.token_ids == ids:
            text: str | None = known.text
        else:  # a text that was not sampled, or several steps in one response
            text = run.tokens.text(ids)
        if text is None:
            text = known.text if known else "(needs policy/tokenizer.json)"
        rows.append(
            {
                "sample": sample,
                "text": text,
                "score": _number(score),
                "tokens": len(ids),
                # On the sample alone, or on the pair.
                "replies": [
                    reply
                    for reply in (known.replies if known else [])
                    if reply["against"] is None or reply["against"] in row["samples"]
                ],
            }
        )
    scalars = dict(row["scalars"] or [])
    return {
        "run": run.run_id,
        "iteration": row["iteration"],
        "back": row["iterations_back"],
        "prompt_id": row["prompt_id"],
        "prompt": texts.question(iteration, row["prompt_id"]),
        "objective": row["objective"],
        "margin": _number(row["margin"]),
        "origin": _origin(run, row["samples"], row["iterations_back"]),
        "scalars": {name: _number(value) for name, value in scalars.items() if name != "margin"},
        "rows": rows,
    }


def _origin(run: Run, samples: Sequence[int], back: int) -> str:
    """Say who preferred the chosen completion."""
    if all(sample < 0 for sample in samples):
        return "a given pair, or a person's label"
    judges = {
        "spar": "votes of the refiner",
        "mcts_dpo": "values of the search",
    }.get(run.config.get("algorithm", {}).get("type", ""), ", ".join(scorer_names(run.config)))
    return f"{judges}; sampled {back} iterations ago" if back else judges


def _rows_of(file: Path, prompts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `prompts`; only the row groups that contain them are decoded."""
    wanted = pa.array(prompts, pa.string())
    found: dict[str, list[dict[str, Any]]] = {}
    with pq.ParquetFile(file) as parquet:
        for number in range(parquet.num_row_groups):
            keys = parquet.read_row_group(number, columns=["prompt_id"])["prompt_id"]
            where = np.flatnonzero(pc.is_in(keys, value_set=wanted).to_numpy())
            if len(where):
                table = parquet.read_row_group(number).take(pa.array(where))
                for row in table.to_pylist():
                    found.setdefault(row["prompt_id"], []).append(row)
    return found


def _by_prompt(
    file: Path | None, prompts: Sequence[str], columns: Sequence[str] | None
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    if file is None:
        return found
    try:
        table = pq.read_table(
            file,
            columns=None if columns is None else list(columns),
            filters=[("prompt_id", "in", list(prompts))],
        )
    except OSError:
        return found
    for row in table.to_pylist():
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def _sample_json(run: Run, row: dict[str, Any], credit: dict[str, Any] | None) -> dict[str, Any]:
    ids = row["token_ids"] or []
    return {
        "sample": row["sample"],
        "kind": row["kind"],
        "parent": row["parent"],
        "text": transcript(row.get("turns")) or row["text"] or "",
        "thinking": row.get("thinking"),
        "turns": row.get("turns"),
        "ended": row.get("ended"),
        "score": _number(row["score"]),
        "scores": {name: _number(value) for name, value in row["scores"] or []},
        "replies": row.get("replies") or [],
        "outcome": row["outcome"],
        "reason": row["reason"],
        "wins": None if row["wins"] is None else [_number(p) for p in row["wins"]],
        "stats": {name: _number(value) for name, value in row["stats"] or []},
        "version": row["policy_version"],
        "truncated": row["finish_reason"] == "length",
        "length": len(ids),
        "tokens": _tokens_json(run, ids, row["logprobs"], credit),
    }


def _tokens_json(
    run: Run, ids: Sequence[int], logprobs: Sequence[float] | None, credit: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return texts and numbers per token; None where the run has no tokenizer."""
    pieces = run.tokens.pieces(ids)
    if pieces is None:
        return None
    tokens: dict[str, Any] = {"text": pieces, "logp": _rounded(logprobs or [])}
    for column, name in _CREDIT.items():
        values = (credit or {}).get(column)
        # A response that joins several steps has other tokens than the sample it begins with.
        if values is not None and len(values) == len(ids):
            tokens[name] = _rounded(values)
    return tokens


def _row_json(text: str | None) -> dict[str, str]:
    """Return the columns of a prompt's row as texts."""
    hidden = ("prompt", "messages")
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in row_columns(text).items()
        if name not in hidden
    }


def _number(value: float | None) -> float | None:
    """Return a finite number with six significant digits, or None."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float | None]:
    rounded = np.round(np.asarray(values, dtype=np.float64), 3)
    if np.isfinite(rounded).all():
        known: list[float | None] = rounded.tolist()
        return known
    return [float(value) if np.isfinite(value) else None for value in rounded]
