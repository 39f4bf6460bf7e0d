"""Groups as they come back from the samples' table."""

import pyarrow as pa

from rayhf.run_dir.tables import sample_table
from rayhf.types import Completion, Group, Invalid, Sample, Scored, float_array, token_array

OUTCOMES = {
    "Scored": lambda row: Scored(value=row["score"]),
    "Invalid": lambda row: Invalid(reason=row["reason"]),
}


def stored(group):
    """Return a group with what the table keeps, but no episodes."""
    table = pa.Table.from_batches(sample_table(1, [group]).to_batches())
    return Group(prompt=group.prompt, samples=tuple(map(_sample, table.to_pylist())))


def _sample(row):
    return Sample(
        completion=Completion(
            prompt_id=row["prompt_id"],
            index=0,
            seed=row["seed"],
            text=row["text"],
            token_ids=token_array(row["token_ids"]),
            logprobs=float_array(row["logprobs"]),
            finish_reason=row["finish_reason"],
            policy_version=row["policy_version"],
        ),
        outcome=None if row["outcome"] is None else OUTCOMES[row["outcome"]](row),
        kind=row["kind"],
        context_ids=token_array(row["context_ids"]),
        parent=row["parent"],
        stats=dict(row["stats"]),
    )
