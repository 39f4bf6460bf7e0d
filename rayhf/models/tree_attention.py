"""Attention over a prefix tree: every node attends to its ancestors and to itself.

In: queries, keys and values of all nodes in depth-first order, and the tree as the keyword argument
`tree`, which transformers' models hand through to their attention function. Out: the same as the
nodes' rows one at a time, up to rounding.

CPU: the nodes are cut into blocks of neighbors. A block needs the keys of its own nodes and of the
ancestors of its first one, since any earlier node with a descendant in the block is an ancestor of
that one too. So attention costs nodes x length of a path, not nodes squared. Each block is a call
of SDPA. GPU: one call of FlexAttention, whose block mask skips what no node sees.

N nodes, Q queries and K keys of a block, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rayhf.models.prefix_tree import Ints, PrefixTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "rayhf_tree"
"""Name of this attention function in transformers."""
FLEX_DEVICES = ("cuda",)
BLOCK = 128
"""Nodes of a block of queries on CPU. Larger ones see more keys of other branches, smaller ones are
more calls; on short completions 128 and 64 are the fastest."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighboring nodes whose attention is computed at once."""

    queries: int
    keys: Tensor | slice
    """Their nodes, in order: int64 of shape (K,), or a slice where they are neighbors."""
    mask_QK: Tensor | None
    """0 or -inf; None for a whole row, where plain causal attention is the same."""


@dataclass(slots=True)
class Tree:
    """A prefix tree on a device, with the masks that its layers share."""

    layout: PrefixTree
    depth_N: Tensor
    end_N: Tensor
    _blocks: dict[tuple[int | None, torch.dtype], list[Block]] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[Block]:
        """Return the blocks of a layer whose nodes see `window` tokens (None: all)."""
        longest = int(self.layout.depth_N.max()) + 1
        window = None if window is None or window >= longest else window
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = [
                self._block(start, stop, window, dtype)
                for start, stop in block_bounds(self.layout.end_N)
            ]
        return self._blocks[window, dtype]

    def _block(self, start: int, stop: int, window: int | None, dtype: torch.dtype) -> Block:
        end_N = self.layout.end_N
        ancestors = np.flatnonzero(end_N[:start] > start)
        whole_row = not len(ancestors) and bool((end_N[start:stop] == stop).all())
        keys = np.concatenate([ancestors, np.arange(start, stop)])
        indices: Tensor | slice = (
            slice(int(keys[0]), stop)
            if stop - keys[0] == len(keys)
            else torch.from_numpy(keys).to(self.end_N.device)
        )
        if whole_row and window is None:
            return Block(stop - start, indices, None)
        queries = np.arange(start, stop)[:, None]
        seen_QK = (keys <= queries) & (queries < end_N[keys])
        if window is not None:
            depth_N = self.layout.depth_N
            seen_QK &= depth_N[queries] - depth_N[keys] < window
        mask_QK = torch.zeros(seen_QK.shape, dtype=dtype)
        mask_QK.masked_fill_(torch.from_numpy(~seen_QK), -torch.inf)
        return Block(stop - start, indices, mask_QK.to(self.end_N.device))

    def block_mask(self, window: int | None) -> BlockMask:
        """Return FlexAttention's mask of a layer whose nodes see `window` tokens (None: all)."""
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(window)
        return self._block_masks[window]

    def _make_block_mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import create_block_mask

        end_N = self.end_N
        depth_N = self.depth_N

        def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (query < end_N[key])
            if window is not None:
                seen = seen & (depth_N[query] - depth_N[key] < window)
            return seen

        nodes = len(end_N)
        return create_block_mask(is_seen, None, None, nodes, nodes, device=str(end_N.device))


def place_tree(layout: PrefixTree, device: torch.device | str) -> Tree:
    """Return the tree with its tensors on the device."""
    return Tree(
        layout,
        depth_N=torch.from_numpy(layout.depth_N).to(device),
        end_N=torch.from_numpy(layout.end_N).to(device),
    )


def block_bounds(end_N: Ints) -> list[tuple[int, int]]:
    """Cut the nodes of a forest into blocks (start, stop).

    A tree of one long row is a block. Larger trees are cut into blocks of BLOCK nodes; smaller
    ones share a block, up to that size.
    """
    bounds: list[tuple[int, int]] = []
    start = 0  # of the small trees that still wait for others
    root = 0
    while root < len(end_N):
        end = int(end_N[root])
        if end - start > BLOCK:
            if root > start:
                bounds.append((start, root))
            start = root
        if end - root > BLOCK:
            is_row = bool((end_N[root:end] == end).all())
            cuts = [root, end] if is_row else [*range(root, end, BLOCK), end]
            bounds += pairwise(cuts)
            start = end
        root = end
    if start < len(end_N):
        bounds.append((start, len(end_N)))
    return bounds


class _TakeKeys(torch.autograd.Function):
    """Keys or values of each block: (1, heads, N, D) -> one (1, heads, K, D) per block.

    Neighboring keys are views. The gradients of all blocks are added into one tensor; autograd
    would make one for each.
    """

    @staticmethod
    def forward(ctx: Any, all_N: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.blocks = blocks
        ctx.shape = all_N.shape
        return tuple(
            all_N[:, :, block.keys]
            if isinstance(block.keys, slice)
            else all_N.index_select(2, block.keys)
            for block in blocks
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total_N = grads[0].new_zeros(ctx.shape)
        for block, grad in zip(ctx.blocks, grads, strict=True):
            if isinstance(block.keys, slice):
                total_N[:, :, block.keys] += grad
            else:
                total_N.index_add_(2, block.keys, grad)
        return total_N, None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention's output, (1, N, heads, D), as transformers' attention functions do.

    Raises RuntimeError where a model does not hand the tree through, or uses a mask, dropout,
    sinks or biases.
    """
    unknown = any(tensor is not None for tensor in (attention_mask, s_aux, position_bias))
    if tree is None or unknown or dropout:
        raise RuntimeError(
            f"{type(module).__name__} does not compute attention over packed rows; set "
            "learner.packing=off"
        )
    if query.device.type in FLEX_DEVICES:
        return _flex(module, query, key, value, tree.block_mask(sliding_window), scaling, softcap)
    blocks = tree.blocks(sliding_window, query.dtype)
    take: Any = _TakeKeys.apply
    parts = zip(
        torch.split(query, [block.queries for block in blocks], dim=2),
        take(key, blocks),
        take(value, blocks),
        blocks,
        strict=True,
    )
    outputs = [
        _attend(q, k, v, block.mask_QK, scaling=scaling, softcap=softcap)
        for q, k, v, block in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_QK: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_QK,
            is_causal=mask_QK is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * (scale / softcap)
    scores = torch.tanh(scores) * softcap
    if mask_QK is None:
        mask_QK = torch.full(scores.shape[-2:], -torch.inf, dtype=query.dtype).triu(1)
    weights = torch.softmax(scores + mask_QK, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, None]:
    from transformers.integrations.flex_attention import flex_attention_forward

    output, _ = flex_attention_forward(
        module, query, key, value, mask, scaling=scaling, softcap=softcap
    )
    return output, None


def register() -> None:
    """Make the attention function known to transformers, by NAME."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tree_attention)
