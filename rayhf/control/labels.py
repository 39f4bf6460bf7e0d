"""Human verdicts on pairs and on single completions: their checks, and what they become.

In: the committed samples of a run directory, and labels of its inbox. Out: training examples.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow.parquet as pq

from rayhf.control.questions import committed_iteration, samples_file
from rayhf.episodes import inserted_tokens
from rayhf.errors import ConfigError
from rayhf.run_dir.files import storage_errors
from rayhf.run_dir.inbox import LABEL_KEYS, check_submission, label_id
from rayhf.types import Example, JsonObject, given_row


class _TokenRow(TypedDict):
    """What a training row needs of the samples table."""

    prompt_id: str
    sample: int
    context_ids: list[int]
    token_ids: list[int]
    inserted_ids: list[int] | None
    inserted_before: list[int] | None


def unanswered(
    iteration: int, examples: Sequence[Example], labels: Sequence[JsonObject]
) -> tuple[Example, ...]:
    """Return the examples of an iteration that no label judges; pairs in either order."""
    judged = {label_id(label) for label in labels}

    def is_judged(example: Example) -> bool:
        prompt = example.rows[0].prompt_id
        samples = [str(row.sample) for row in example.rows]
        orders = (samples, samples[::-1])
        return any("/".join([str(iteration), prompt, *order]) in judged for order in orders)

    return tuple(example for example in examples if not is_judged(example))


def check_labels(run: Path, labels: Sequence[Mapping[str, object]]) -> list[JsonObject]:
    """Return labels as they are stored, with a digest of the completions that were judged.

    Raises ConfigError for an unknown verdict, and for completions of no committed iteration.
    """
    rows = [
        check_submission(
            {key: label[key] for key in LABEL_KEYS if label.get(key) is not None},
            "labels",
            f"labels: row {number}",
        )
        for number, label in enumerate(labels, start=1)
    ]
    committed = committed_iteration(run)
    completions = _Completions(run, map(label_id, rows))
    return [
        {**row, "completions": _digest(completions.find(row, committed=committed))} for row in rows
    ]


def label_is_due(label: JsonObject, iteration: int) -> bool:
    """Return whether what the label judges is of an iteration before this one.

    A label waits where that iteration is to be repeated.
    """
    number = label_id(label).partition("/")[0]
    return not _is_index(number) or int(number) < iteration


def labeled_examples(
    run: Path, labels: Sequence[JsonObject], *, warn: Callable[[str], object]
) -> tuple[Example, ...]:
    """Return a (preferred, other) example for every label of a pair that is not a tie.

    A label of one completion becomes an example of one row with the scalar `desirable`, 1 or 0.

    The last verdict of an annotator counts; those of several annotators all do. Their rows count as
    given, not sampled: their lineage is the inbox, and their completions may be older than
    importance weights can correct. `warn` gets a line about each label that cannot be used, and one
    about those in which annotators contradict each other.
    """
    last = {(label_id(row), str(row["source"])): row for row in labels}
    completions = _Completions(run, [judged for judged, _ in last])
    used: list[JsonObject] = []
    examples = []
    for label in last.values():
        try:
            rows = completions.find(label)
            if label.get("completions", "") not in ("", _digest(rows)):
                raise ConfigError(
                    f"{label_id(label)!r:.80}: its completions are not the ones that were judged: "
                    "the iteration was repeated"
                )
        except ConfigError as error:
            warn(f"skipped a label: {label['place']}, submitted by {label['source']}: {error}")
            continue
        used.append(label)
        if label["verdict"] != "tie":
            examples.append(_example(rows, str(label["verdict"])))
    if line := contradictions((label_id(row), str(row["verdict"])) for row in used):
        warn(line)
    return tuple(examples)


def _example(rows: Sequence[_TokenRow], verdict: str) -> Example:
    given = tuple(
        given_row(
            row["prompt_id"],
            row["context_ids"],
            row["token_ids"],
            inserted=inserted_tokens(row["inserted_ids"], row["inserted_before"]),
        )
        for row in rows
    )
    if len(given) == 1:
        return Example(rows=given, scalars={"desirable": float(verdict == "up")})
    return Example(rows=given if verdict == "first" else given[::-1])


def contradictions(verdicts: Iterable[tuple[str, str]]) -> str:
    """Return a line about what has differing verdicts; empty where there is nothing."""
    by_id: dict[str, set[str]] = defaultdict(set)
    for judged, verdict in verdicts:
        by_id[judged].add(verdict)
    differing = {judged: sorted(words) for judged, words in by_id.items() if len(words) > 1}
    if not differing:
        return ""
    judged, words = next(iter(differing.items()))
    noun = "pairs" if judged.count("/") == 3 else "completions"
    return (
        f"annotators contradict each other on {len(differing)} {noun}; the first is "
        f"{judged!r:.80}: {' and '.join(words)}; each verdict counts"
    )


class _Completions:
    """Rows of the completions that labels judge; each iteration's file is read once."""

    def __init__(self, run: Path, label_ids: Iterable[str]) -> None:
        self._run = run
        self._prompts: dict[int, set[str]] = defaultdict(set)
        for judged in label_ids:
            parts = judged.split("/")
            if len(parts) > 1 and _is_index(parts[0]):
                self._prompts[int(parts[0])].add(parts[1])
        self._rows: dict[int, dict[tuple[str, int], _TokenRow]] = {}

    def find(self, label: JsonObject, *, committed: int | None = None) -> tuple[_TokenRow, ...]:
        """Return the two rows of a pair, or the row of a completion.

        Raises ConfigError where they do not exist, or are newer than `committed`.
        """
        is_pair = "pair_id" in label
        noun, form, command = (
            ("pair", "iteration/prompt/first/second", "pairs")
            if is_pair
            else ("completion", "iteration/prompt/sample", "completions")
        )
        parts = label_id(label).split("/")
        name = f"no {noun} {label_id(label)!r:.80}"
        if len(parts) != (4 if is_pair else 3) or not all(map(_is_index, (parts[0], *parts[2:]))):
            raise ConfigError(f"{name}; expected {form}, as in `rayhf {command}`")
        iteration = int(parts[0])
        numbers = [int(part) for part in parts[2:]]
        file = samples_file(self._run, iteration)
        if not file.exists() or (committed is not None and iteration > committed):
            raise ConfigError(f"{name}: iteration {iteration} is not committed")
        if iteration not in self._rows:
            self._rows[iteration] = self._read(file, self._prompts[iteration])
        known = self._rows[iteration]
        rows = [known[parts[1], number] for number in numbers if (parts[1], number) in known]
        if len(rows) < len(set(numbers)) or len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"{name}: iteration {iteration} does not have "
                + ("these two completions" if is_pair else "this completion")
            )
        return tuple(rows)

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
