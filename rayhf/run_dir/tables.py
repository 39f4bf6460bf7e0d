"""The samples and training examples of an iteration as Arrow tables, and examples back from them.

samples    one row per completion, also the inner ones of a search: `parent`, `kind`, `context_ids`
           and `stats` are its tree; `row` has all columns of the prompt's row as JSON;
           `token_versions` is null where one version wrote all tokens; of an episode, `turns` are
           its messages, and inserted_ids the environment's tokens, each after inserted_before of
           token_ids; a step of a tree has its own part of the episode
examples   one row per training example, with indices into its prompt's samples `iterations_back`
           iterations ago; index -1 for a text that was not sampled (an offline pair, a label)
credit     one row per row of the policy's examples: what training added to each of its tokens
heldout    an evaluation's completions of prompts.heldout, in the form of samples
evaluations    one row per prompt and figure of every evaluation
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.episodes import Episode, inserted_tokens
from rayhf.evaluation.values import PromptValues
from rayhf.types import (
    NO_TOKENS,
    Example,
    Failed,
    Group,
    Invalid,
    Row,
    Scored,
    float_array,
    token_array,
)

_REPLY = pa.struct(
    [
        ("part", pa.string()),
        ("against", pa.int32()),
        ("left_out", pa.bool_()),
        ("text", pa.string()),
    ]
)
_TURN = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("tokens", pa.int32()),
        ("reward", pa.float64()),
    ]
)
SAMPLES = pa.schema(
    [
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("row", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("sample", pa.int32()),
        ("kind", pa.string()),
        ("parent", pa.int32()),
        ("text", pa.string()),
        ("thinking", pa.string()),
        ("thinking_tokens", pa.int32()),
        ("context_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("score", pa.float64()),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("replies", pa.list_(_REPLY)),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("wins", pa.list_(pa.float64())),
        ("stats", pa.map_(pa.string(), pa.float64())),
        ("policy_version", pa.int32()),
        ("token_versions", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("environment", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("ended", pa.string()),
        ("inserted_ids", pa.list_(pa.int32())),
        ("inserted_before", pa.list_(pa.int32())),
    ]
)
EXAMPLES = pa.schema(
    [
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("objective", pa.string()),
        ("iterations_back", pa.int32()),
        ("samples", pa.list_(pa.int32())),
        ("prompt_ids", pa.list_(pa.list_(pa.int32()))),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("inserted_ids", pa.list_(pa.list_(pa.int32()))),
        ("inserted_before", pa.list_(pa.list_(pa.int32()))),
        ("behavior_logp", pa.list_(pa.list_(pa.float32()))),
        ("scores", pa.list_(pa.float64())),
        ("margin", pa.float64()),
        ("scalars", pa.map_(pa.string(), pa.float64())),
    ]
)

EVALUATIONS = pa.schema(
    [
        ("iteration", pa.int32()),
        ("metric", pa.string()),
        ("prompt_id", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
    ]
)
CREDIT_VALUES = ("ref_logp", "old_logp", "value", "advantage")
"""Names of token values that the credit table keeps, where an algorithm has them."""
CREDIT = pa.schema(
    [
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("iterations_back", pa.int32()),
        *((name, pa.list_(pa.float32())) for name in CREDIT_VALUES),
    ]
)


def sample_table(iteration: int, groups: Sequence[Group]) -> pa.Table:
    """Return one row per sample.

    Built column by column: a dictionary per row takes several times as long.
    """
    owners = [group for group in groups for _ in group.samples]
    rows = [json.dumps(dict(group.prompt.row), ensure_ascii=False) for group in groups]
    samples = [sample for group in groups for sample in group.samples]
    numbers = [number for group in groups for number in range(len(group.samples))]
    completions = [sample.completion for sample in samples]
    outcomes = [sample.outcome for sample in samples]
    columns = {
        "iteration": [iteration] * len(samples),
        "prompt_id": [group.prompt.prompt_id for group in owners],
        "source": [group.prompt.source for group in owners],
        "row": [row for group, row in zip(groups, rows, strict=True) for _ in group.samples],
        "messages": [group.prompt.messages for group in owners],
        "sample": numbers,
        "kind": [sample.kind for sample in samples],
        "parent": [sample.parent for sample in samples],
        "text": [c.text for c in completions],
        "thinking": [c.thinking for c in completions],
        "thinking_tokens": [c.thinking_tokens for c in completions],
        "context_ids": [g.context_ids(n) for g, n in zip(owners, numbers, strict=True)],
        "token_ids": _lists([c.token_ids for c in completions], np.int32),
        "logprobs": _lists([c.logprobs for c in completions], np.float32),
        "score": [outcome.value if isinstance(outcome, Scored) else None for outcome in outcomes],
        "scores": [
            list(outcome.parts.items()) if isinstance(outcome, Scored) else []
            for outcome in outcomes
        ],
        "replies": [_replies(g, n) for g, n in zip(owners, numbers, strict=True)],
        "outcome": [None if outcome is None else type(outcome).__name__ for outcome in outcomes],
        "reason": [
            outcome.reason if isinstance(outcome, Invalid | Failed) else None
            for outcome in outcomes
        ],
        "wins": [
            g.compared.win[n].tolist() if g.compared else None
            for g, n in zip(owners, numbers, strict=True)
        ],
        "stats": [list(sample.stats.items()) for sample in samples],
        "policy_version": [c.policy_version for c in completions],
        "token_versions": [c.token_versions for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
        "seed": [c.seed for c in completions],
        **_episodes([c.episode for c in completions]),
    }
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def _episodes(episodes: Sequence[Episode | None]) -> dict[str, list[object]]:
    """Return the columns of episodes; null for a completion of one turn without environment."""
    inserted = [None if episode is None else episode.inserted for episode in episodes]
    return {
        "environment": [episode and episode.environment for episode in episodes],
        "turns": [episode and [asdict(turn) for turn in episode.turns] for episode in episodes],
        "ended": [episode and episode.ended for episode in episodes],
        "inserted_ids": [None if each is None else each.token_ids for each in inserted],
        "inserted_before": [None if each is None else each.before for each in inserted],
    }


def transcript(turns: Sequence[Mapping[str, object]] | None) -> str:
    """Return the column `turns` of a sample as text; empty where there is none."""
    return "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in turns or ())


def _replies(group: Group, index: int) -> list[dict[str, object]]:
    """Return what judges wrote about a sample, or about a pair that it stood first in."""
    outcome = group.samples[index].outcome
    replies = outcome.replies if isinstance(outcome, Scored) else ()
    if group.compared is not None:
        replies += group.compared.replies_about(index)
    return [asdict(reply) for reply in replies]


def example_table(iteration: int, examples: Sequence[Example]) -> pa.Table:
    """Return one row per example."""
    rows = [row for example in examples for row in example.rows]
    ends = np.cumsum([0, *(len(example.rows) for example in examples)], dtype=np.int32)

    def by_example(lists: pa.ListArray) -> pa.ListArray:
        return pa.ListArray.from_arrays(ends, lists)

    columns = {
        "iteration": [iteration] * len(examples),
        "prompt_id": [e.rows[0].prompt_id for e in examples],
        "objective": [e.objective for e in examples],
        "iterations_back": [e.iterations_back for e in examples],
        "samples": [[row.sample for row in e.rows] for e in examples],
        "prompt_ids": by_example(_lists([row.prompt_ids for row in rows], np.int32)),
        "response_ids": by_example(_lists([row.response_ids for row in rows], np.int32)),
        "inserted_ids": by_example(
            _lists([r.inserted.token_ids if r.inserted else NO_TOKENS for r in rows], np.int32)
        ),
        "inserted_before": by_example(
            _lists([r.inserted.before if r.inserted else NO_TOKENS for r in rows], np.int32)
        ),
        "behavior_logp": by_example(
            _lists([row.tokens["behavior_logp"] for row in rows], np.float32)
        ),
        "scores": [[row.scalars.get("score") for row in e.rows] for e in examples],
        "margin": [e.scalars.get("margin") for e in examples],
        "scalars": [list(e.scalars.items()) for e in examples],
    }
    return pa.Table.from_pydict(columns, schema=EXAMPLES)


def credit_table(iteration: int, examples: Sequence[Example]) -> pa.Table:
    """Return one row per row of the examples; null for values that it does not have."""
    rows = [(example, row) for example in examples for row in example.rows]
    columns: dict[str, Sequence[object]] = {
        "iteration": [iteration] * len(rows),
        "prompt_id": [row.prompt_id for _, row in rows],
        "sample": [row.sample for _, row in rows],
        "iterations_back": [example.iterations_back for example, _ in rows],
    }
    columns |= {name: [row.tokens.get(name) for _, row in rows] for name in CREDIT_VALUES}
    return pa.Table.from_pydict(columns, schema=CREDIT)


def evaluation_table(iteration: int, figures: Sequence[PromptValues]) -> pa.Table:
    """Return one row per prompt and figure."""
    columns = {
        "iteration": [iteration] * sum(len(figure.prompt_ids) for figure in figures),
        "metric": [figure.metric for figure in figures for _ in figure.prompt_ids],
        "prompt_id": [prompt for figure in figures for prompt in figure.prompt_ids],
        "value": [value for figure in figures for value in figure.values_P],
        "weight": [weight for figure in figures for weight in figure.weights_P],
    }
    return pa.Table.from_pydict(columns, schema=EVALUATIONS)


def read_evaluations(file: Path) -> dict[str, PromptValues]:
    """Return the figures of an iteration's evaluations by prompt, by metric. Raises OSError."""
    table = pq.read_table(file)
    found = {}
    metrics = np.asarray(table["metric"].to_pylist(), dtype=object)
    for metric in dict.fromkeys(metrics):
        own = table.filter(pa.array(metrics == metric))
        found[metric] = PromptValues(
            metric=metric,
            prompt_ids=tuple(own["prompt_id"].to_pylist()),
            values_P=own["value"].to_numpy(),
            weights_P=own["weight"].to_numpy(),
        )
    return found


def _lists(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> pa.ListArray:
    """Return one list per array, without a Python object per number."""
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.concatenate([np.empty(0, dtype), *arrays]))


def read_examples(file: Path, objective: str = "policy") -> list[Example]:
    """Return the sampled examples of an objective, as they were selected."""
    examples = []
    for record in pq.read_table(file).to_pylist():
        if record["objective"] != objective or min(record["samples"]) < 0:
            continue
        columns = (
            "samples",
            "prompt_ids",
            "response_ids",
            "behavior_logp",
            "scores",
            "inserted_ids",
            "inserted_before",
        )
        rows = tuple(
            Row(
                prompt_id=record["prompt_id"],
                sample=sample,
                prompt_ids=token_array(prompt_ids),
                response_ids=token_array(response_ids),
                tokens={"behavior_logp": float_array(logp)},
                scalars={"score": score},
                inserted=inserted_tokens(ids, before),
            )
            for sample, prompt_ids, response_ids, logp, score, ids, before in zip(
                *(record[column] for column in columns), strict=True
            )
        )
        examples.append(
            Example(
                rows=rows,
                scalars=dict(record["scalars"]),
                objective=objective,
                iterations_back=record["iterations_back"],
            )
        )
    return examples
