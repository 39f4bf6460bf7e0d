"""A head's outputs for the rows of a forward pass, as arrays of each row.

T response tokens of all rows, laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rayhf.models.forward import HeadOutput
from rayhf.types import FloatArray, TopLogprobs, float_array, token_array

Result = TypeVar("Result", FloatArray, TopLogprobs)


def split_rows(output_T: Tensor, lengths: Sequence[int]) -> list[FloatArray]:
    """Return each row's outputs: (T, ...) -> float32 arrays of its length."""
    return [part.numpy().copy() for part in torch.split(output_T.cpu(), list(lengths))]


def split_top(output: HeadOutput, lengths: Sequence[int]) -> list[TopLogprobs]:
    """Return each row's log-probs and likeliest tokens, of a PolicyHead that was given `top_k`."""
    logp_TK, ids_TK = output
    assert ids_TK is not None
    ids = torch.split(ids_TK.int().cpu(), list(lengths))
    logps = torch.split(logp_TK.cpu(), list(lengths))
    return [
        TopLogprobs(
            sampled=float_array(logp[:, 0].numpy().copy()),
            top_ids=token_array(each.numpy().copy()),
            top=float_array(logp[:, 1:].numpy().copy()),
        )
        for logp, each in zip(logps, ids, strict=True)
    ]
