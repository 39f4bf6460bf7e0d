"""The reference role of a model that is too large for one device: sharded over several ranks.

In: rows, and weight snapshots where the reference follows the policy. Out: log-probs in nats.

Synchronization: all ranks are called together (actors/ranks.py). A lost rank takes its part of the
weights with it: as with a lost rank of a learner, all actors are restarted from the last commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from actors.ranks import RankActor, RankGroup, collectives
from actors.transport import without_payloads
from rayhf.config.models import ModelName
from rayhf.config.schema import Packing, ReferenceConfig
from rayhf.models.hub import local_directory, obtain
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Row, TopLogprobs, WeightSnapshot

if TYPE_CHECKING:
    from rayhf.reference.sharded import ShardedReferenceEngine


class ShardedReferenceActor(RankActor):
    """Ray actor around one rank's ShardedReferenceEngine."""

    engine: ShardedReferenceEngine

    def build(
        self,
        model: ModelName,
        config: ReferenceConfig,
        *,
        epoch_guard: EpochGuard,
        **settings: Any,
    ) -> Packing:
        """Build the engine and return how it feeds rows."""
        from rayhf.reference.sharded import ShardedReferenceEngine

        self.epoch_guard = epoch_guard
        obtain(model)
        self.engine = ShardedReferenceEngine(local_directory(model), config, **settings)
        return self.engine.packing

    def top_logprobs(self, rows: list[Row], temperature: float, top_k: int) -> list[TopLogprobs]:
        with collectives():
            return self.engine.top_logprobs(rows, temperature, top_k)

    def update(self, snapshot: WeightSnapshot, mix: float, *payloads: Any) -> None:
        """Take new weights; only rank 0 gets payloads."""
        buckets = snapshot.buckets
        with collectives():
            self.engine.update(
                list(zip(buckets, payloads or [None] * len(buckets), strict=True)), mix=mix
            )


class ShardedReference(RankGroup):
    """Reference over the ranks of one model."""

    async def logprobs(
        self, rows: Sequence[Row], *, temperature: float, model: Path | None = None
    ) -> list[FloatArray]:
        assert model is None  # check_reference refuses it
        return await self.outputs(rows, temperature=temperature)

    async def top_logprobs(
        self, rows: Sequence[Row], *, temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        def call(actor: ActorHandle, rows: list[Row]) -> ray.ObjectRef:
            return actor.top_logprobs.remote(rows, temperature, top_k)

        return await self._over_chunks(rows, call)

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        payloads = [bucket.payload for bucket in snapshot.buckets]
        described = without_payloads(snapshot)
        first, *others = self._actors
        calls = [
            first.update.remote(described, mix, *payloads),
            *(actor.update.remote(described, mix) for actor in others),
        ]
        await self._all("reference update", calls)
