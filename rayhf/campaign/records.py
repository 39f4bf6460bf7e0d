"""A round's samples and training examples as tables, and examples back from them.

samples   one row per completion, also the inner ones of a search: `parent`, `kind`, `context_ids` and `stats` are its tree
pairs     one row per training example, with indices into the round's samples of its prompt; what was given (a pair file,
          a refined text) rather than sampled has index -1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.experience import Example, Failed, Group, Invalid, Row, Sample, Scored

SAMPLES = pa.schema(
    [
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("sample", pa.int32()),
        ("kind", pa.string()),
        ("parent", pa.int32()),
        ("text", pa.string()),
        ("context_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("score", pa.float64()),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("wins", pa.list_(pa.float64())),
        ("stats", pa.map_(pa.string(), pa.float64())),
        ("policy_version", pa.int32()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
    ]
)
EXAMPLES = pa.schema(
    [
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("objective", pa.string()),
        ("samples", pa.list_(pa.int32())),
        ("prompt_ids", pa.list_(pa.list_(pa.int32()))),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("behaviour_logp", pa.list_(pa.list_(pa.float32()))),
        ("scores", pa.list_(pa.float64())),
        ("margin", pa.float64()),
        ("scalars", pa.map_(pa.string(), pa.float64())),
    ]
)


def sample_table(iteration: int, groups: Sequence[Group]) -> pa.Table:
    rows = [
        {"iteration": iteration, "prompt_id": group.prompt.prompt_id, "messages": list(group.prompt.messages), "sample": index}
        | _sample(sample)
        | {"context_ids": list(group.prompt.token_ids if sample.context_ids is None else sample.context_ids)}
        | {"wins": group.compared.win[index].tolist() if group.compared is not None else None}
        for group in groups
        for index, sample in enumerate(group.samples)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def _sample(sample: Sample) -> dict[str, Any]:
    completion, outcome = sample.completion, sample.outcome
    return {
        "kind": sample.kind,
        "parent": sample.parent,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "score": outcome.value if isinstance(outcome, Scored) else None,
        "scores": list(outcome.parts.items()) if isinstance(outcome, Scored) else [],
        "outcome": None if outcome is None else type(outcome).__name__,
        "reason": outcome.reason if isinstance(outcome, Invalid | Failed) else None,
        "stats": list(sample.stats.items()),
        "policy_version": completion.policy_version,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }


def example_table(iteration: int, examples: Sequence[Example]) -> pa.Table:
    rows = [
        {
            "iteration": iteration,
            "prompt_id": example.rows[0].prompt_id,
            "objective": example.objective,
            "samples": [row.sample for row in example.rows],
            "prompt_ids": [list(row.prompt_ids) for row in example.rows],
            "response_ids": [list(row.response_ids) for row in example.rows],
            "behaviour_logp": [row.tokens["behaviour_logp"].tolist() for row in example.rows],
            "scores": [row.scalars.get("score") for row in example.rows],
            "margin": example.scalars.get("margin"),
            "scalars": list(example.scalars.items()),
        }
        for example in examples
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def read_examples(pairs: Path) -> list[Example]:
    """The examples of the objective "policy" whose rows were all sampled, as they were selected."""
    found = []
    for record in pq.read_table(pairs).to_pylist():
        if record["objective"] != "policy" or min(record["samples"]) < 0:
            continue
        columns = ("samples", "prompt_ids", "response_ids", "behaviour_logp", "scores")
        rows = tuple(
            Row(
                prompt_id=record["prompt_id"],
                sample=sample,
                prompt_ids=tuple(prompt_ids),
                response_ids=tuple(response_ids),
                tokens={"behaviour_logp": np.asarray(logp, dtype=np.float32)},
                scalars={"score": score},
            )
            for sample, prompt_ids, response_ids, logp, score in zip(*(record[c] for c in columns), strict=True)
        )
        found.append(Example(rows=rows, scalars=dict(record["scalars"])))
    return found
