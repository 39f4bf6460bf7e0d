"""Examples as the tensors that a loss sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rayhf.losses.base import MicroBatch, Totals
from rayhf.types import Example, FloatArray


def build_micro_batch(
    examples: Sequence[Example], totals: Totals, device: torch.device | str
) -> MicroBatch:
    """Return the tensors for the loss.

    A named value that only some rows or examples have is NaN for the others; likeliest tokens of
    the reference are there only if all rows have them.
    """
    rows = [row for example in examples for row in example.rows]
    lengths = [len(row.response_ids) for row in rows]

    def to_tensors(
        names: set[str], values: Callable[[str], Sequence[FloatArray | float]]
    ) -> dict[str, Tensor]:
        arrays = {
            name: np.concatenate([np.atleast_1d(v) for v in values(name)]) for name in sorted(names)
        }
        return {
            name: torch.from_numpy(array.astype(np.float32, copy=False)).to(device)
            for name, array in arrays.items()
        }

    def token_values(name: str) -> list[FloatArray]:
        return [
            row.tokens.get(name, np.full(len(row.response_ids), np.nan, np.float32)) for row in rows
        ]

    token_names = {name for row in rows for name in row.tokens}
    row_names = {name for row in rows for name in row.scalars}
    example_names = {name for example in examples for name in example.scalars}
    number_R = torch.arange(len(rows), device=device)
    length_R = torch.tensor(lengths, dtype=torch.int64, device=device)
    count_E = torch.tensor(
        [len(example.rows) for example in examples], dtype=torch.int64, device=device
    )
    tops = [row.reference_top.top for row in rows if row.reference_top is not None]
    return MicroBatch(
        tokens=to_tensors(token_names, token_values),
        rows=to_tensors(row_names, lambda name: [row.scalars.get(name, np.nan) for row in rows]),
        examples=to_tensors(
            example_names, lambda name: [example.scalars.get(name, np.nan) for example in examples]
        ),
        row_T=torch.repeat_interleave(number_R, length_R),
        length_R=length_R.float(),
        example_R=torch.repeat_interleave(torch.arange(len(examples), device=device), count_E),
        totals=totals,
        reference_top_TK=(
            torch.from_numpy(np.concatenate(tops)).to(device) if len(tops) == len(rows) else None
        ),
    )
