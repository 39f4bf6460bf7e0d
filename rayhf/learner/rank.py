"""One rank of a model under DeepSpeed, trained or not: outputs of rows without gradient.

Synchronization: under ZeRO-3 every forward pass is a collective, since each rank has a part of
every parameter. All ranks run as many passes, also those with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from rayhf.config.schema import Packing
from rayhf.models.forward import EMPTY, Inputs, build_inputs
from rayhf.models.outputs import Result, split_rows
from rayhf.models.packing import pack_examples
from rayhf.types import FloatArray, Row
from rayhf.weights.deepspeed_internals import DeepSpeedEngine


class RankEngine:
    """Base of engines that hold one rank of a model; a subclass sets the attributes."""

    engine: DeepSpeedEngine
    packing: Packing
    token_budget: int
    """Tokens of a forward pass."""
    device: torch.device
    stage: int
    """ZeRO stage."""
    world: int
    """Number of ranks."""

    def outputs(self, rows: Sequence[Row], temperature: float) -> list[FloatArray]:
        """Return the head's outputs for each of this rank's rows, without gradient.

        float32 arrays: log-probs in nats or values of shape (len(response_ids),), or scores of
        shape (1, d). Under ZeRO-3 all ranks call it together; their numbers of rows may differ, and
        may be 0.
        """
        return self._over_batches(
            rows,
            lambda inputs, lengths: split_rows(self._evaluate(inputs, temperature), lengths),
        )

    @torch.no_grad()
    def _over_batches(
        self, rows: Sequence[Row], compute: Callable[[Inputs, Sequence[int]], list[Result]]
    ) -> list[Result]:
        """Return what `compute` makes of each row, given inputs and response lengths."""
        packed = pack_examples(
            [(row,) for row in rows], packing=self.packing, budget=self.token_budget
        )
        batches = [batch.examples for batch in packed]
        lengths = [sum(len(rows[i].response_ids) for i in batch) for batch in batches]
        # Counted before the first forward pass, so that collectives run in the same order.
        most = self._most(lengths)
        results: dict[int, Result] = {}
        for batch, most_tokens in zip(batches, most, strict=False):
            inputs = self._inputs([rows[i] for i in batch], most_tokens)
            parts = compute(inputs, [len(rows[i].response_ids) for i in batch])
            results.update(zip(batch, parts, strict=True))
        for most_tokens in most[len(batches) :]:
            compute(self._inputs([], most_tokens), [len(EMPTY.response_ids)])
        return [results[i] for i in range(len(rows))]

    def _most(self, tokens: Sequence[int]) -> list[int]:
        """Return the largest number of response tokens of any rank, for each forward pass.

        Under ZeRO-3 every call of a module is a collective: all ranks run as many forward passes,
        and in each of them call the head equally often.
        """
        if self.stage < 3 or self.world == 1:
            return list(tokens)
        by_rank: list[list[int]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(by_rank, list(tokens))
        return [max(passes) for passes in zip_longest(*by_rank, fillvalue=0)]

    def _evaluate(self, inputs: Inputs, temperature: float) -> Tensor:
        self.engine.eval()
        return self.engine(inputs, temperature)[0]

    def _inputs(self, rows: Sequence[Row], most: int = 0) -> Inputs:
        return build_inputs(rows, self.device, packing=self.packing, most=most)
