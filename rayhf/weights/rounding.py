"""Stochastic rounding of weights to an engine's dtype.

Rounding to nearest hides an update until it reaches half a step of the smaller dtype. Stochastic
rounding takes one of the two neighbors at random, the nearer one more often, so that the expected
value is the weight itself (Croci et al. 2022, section 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Weights rounded at a time: it bounds the temporary memory to about 64 MiB."""


def round_stochastic(tensor: Tensor, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Return a float32 tensor's values rounded at random to bfloat16 or float16, in that dtype.

    The same seed, shape and kind of device give the same bits.
    """
    generator = torch.Generator(tensor.device).manual_seed(seed)
    flat = tensor.detach().float().reshape(-1)
    rounded = torch.empty_like(flat, dtype=dtype)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        noise = torch.rand(part.shape, generator=generator, device=part.device)
        step = _spacing(part, dtype)
        # Dividing by a power of two is exact, and so is the product: it lies on the dtype's grid.
        rounded[start : start + _CHUNK] = torch.floor(part / step + noise) * step
    return rounded.reshape(tensor.shape)


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbors of `dtype` around each float32 value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    spacing = torch.ldexp(torch.full_like(values, info.eps), exponent)
    return spacing.clamp_min(info.smallest_normal * info.eps)
