"""The reference role: log-probs under frozen weights, in one actor.

In: rows, and weight snapshots where the reference follows the policy. Out: log-probs in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from actors.process import ReportsProcess
from actors.remote import wait
from actors.supervise import SupervisedActor
from actors.transport import without_payloads
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.models.hub import local_directory, obtain
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Row, WeightSnapshot


class ReferenceActor(ReportsProcess):
    """Ray actor around one ReferenceEngine."""

    def build(
        self,
        model: ModelName,
        config: ReferenceConfig,
        *,
        dtype: str,
        device: str,
        learner: LearnerConfig,
        epoch_guard: EpochGuard,
    ) -> None:
        from rayhf.reference.engine import ReferenceEngine

        self.epoch_guard = epoch_guard
        obtain(model)
        self.engine = ReferenceEngine(
            local_directory(model), config, dtype=dtype, device=device, learner=learner
        )

    def logprobs(self, rows: Sequence[Row], temperature: float) -> list[FloatArray]:
        return self.engine.logprobs(rows, temperature=temperature)

    def update(
        self, snapshot: WeightSnapshot, mix: float, *payloads: npt.NDArray[np.uint8]
    ) -> None:
        self.engine.update(list(zip(snapshot.buckets, payloads, strict=True)), mix=mix)

    def save(self, directory: Path) -> None:
        self.epoch_guard.check()
        self.engine.save(directory)

    def load(self, directory: Path) -> None:
        self.engine.load(directory)


class ReferenceClient:
    """Reference over one actor, which is never replaced."""

    def __init__(self, member: SupervisedActor, *, timeout_s: float) -> None:
        self._actor = member.actor
        self._name = member.name
        self._timeout_s = timeout_s

    async def _wait(self, phase: str, call: ray.ObjectRef) -> Any:
        return await wait(call, name=self._name, phase=phase, timeout_s=self._timeout_s)

    async def logprobs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        logprobs: list[FloatArray] = await self._wait(
            "reference", self._actor.logprobs.remote(list(rows), temperature)
        )
        return logprobs

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        payloads = [bucket.payload for bucket in snapshot.buckets]
        call = self._actor.update.remote(without_payloads(snapshot), mix, *payloads)
        await self._wait("reference update", call)

    async def save(self, directory: Path) -> None:
        await self._wait("checkpoint", self._actor.save.remote(directory))

    async def load(self, directory: Path) -> None:
        await self._wait("restore", self._actor.load.remote(directory))
