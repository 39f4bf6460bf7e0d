"""The reference role: frozen log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from actors.remote import wait
from actors.supervise import ProcessInfo, SupervisedActor, process_info
from rayhf.config.schema import ReferenceConfig
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Row, WeightSnapshot


class ReferenceActor:
    """A shell around one ReferenceEngine."""

    def process_info(self) -> ProcessInfo:
        return process_info()

    def build(
        self,
        model: Path,
        config: ReferenceConfig,
        *,
        dtype: str,
        device: str,
        epoch_guard: EpochGuard,
    ) -> None:
        from rayhf.reference.engine import ReferenceEngine

        self.epoch_guard = epoch_guard
        self.engine = ReferenceEngine(model, config, dtype=dtype, device=device)

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
    """Reference over one actor."""

    def __init__(self, member: SupervisedActor, *, timeout_s: float) -> None:
        self._actor, self._name, self._timeout_s = member.actor, member.name, timeout_s

    async def _call(self, phase: str, call: ray.ObjectRef) -> Any:
        return await wait(call, who=self._name, phase=phase, timeout_s=self._timeout_s)

    async def logprobs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        answer: list[FloatArray] = await self._call(
            "reference", self._actor.logprobs.remote(list(rows), temperature)
        )
        return answer

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        payloads = [bucket.payload for bucket in snapshot.buckets]
        light = replace(
            snapshot, buckets=tuple(replace(bucket, payload=None) for bucket in snapshot.buckets)
        )
        await self._call("reference update", self._actor.update.remote(light, mix, *payloads))

    async def save(self, directory: Path) -> None:
        await self._call("checkpoint", self._actor.save.remote(directory))

    async def load(self, directory: Path) -> None:
        await self._call("restore", self._actor.load.remote(directory))


RemoteReferenceActor = ray.remote(ReferenceActor)
