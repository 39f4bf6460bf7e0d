"""RolloutEngine: one vLLM engine that writes with a known version of the policy's weights. An actor
wraps it.

In: GenerateRequests with the version they want, and WeightSnapshots. Out: Completions. Any thread
may call; one thread owns vLLM (loop.py). `update` waits until running waves are done, and what is
submitted after it waits for it, so a completion never mixes two versions. New weights, whole or as
LoRA adapters to the directory's, count only when they were shown to be the learner's: bucket
checksums, names and shapes are checked before the engine is touched, the probe's log-probs after.
If an update fails in between, the engine's weights are undefined and it refuses to write: build a
new one.

An engine that is put to sleep writes nothing until `wake`, or an update, which takes memory back in
stages: room for weights, the weights, room for keys and values.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.errors import ActorLostError, ConfigError, DeadlineError, WeightSyncError
from rayhf.rollout.env import Device, check_env
from rayhf.rollout.loop import EngineLoop, Wave
from rayhf.types import Completion, GenerateRequest, Probe, WeightSnapshot
from rayhf.weights.buckets import check_complete, snapshot_checksum, verify_bucket
from rayhf.weights.lora import check_adapters, is_factor

if TYPE_CHECKING:
    from rayhf.rollout.vllm_driver import VllmDriver
    from rayhf.weights.broadcast import Rendezvous

FLOAT32_GAP = 1e-3
"""Limit on a probe's mean gap for float32 engines, in nats: 30 times what two correct
implementations differ by."""
MIN_TEMPERATURE = 0.01
"""vLLM silently samples at this temperature when asked for a lower one that is not 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeGap:
    """|log-prob here - log-prob at the learner| over a probe's tokens, in nats."""

    mean: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an engine confirms after it took new weights."""

    version: int
    checksum: str
    gap: ProbeGap
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Since the engine started."""

    version: int
    """The last one that was whole."""
    tokens: int
    """Generated, of finished waves."""
    steps: int
    busy_s: float
    """Inside engine steps."""
    progress: int
    """Grows while the engine lives; a watchdog looks at it."""
    in_flight: int
    """Waves that run or wait."""
    peak_rss_bytes: int
    """Of this process."""


class RolloutEngine:
    """See the module's docstring. Raises ConfigError where vLLM refuses the model or the
    settings."""

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_length: int,
        seed: int,
        device: Device,
        sleeps: bool = False,
    ) -> None:
        """`max_length`: prompt plus response, in tokens. `sleeps`: it will be put to sleep, for
        which vLLM allocates otherwise. The checkpoint's weights are version 0."""
        check_env(device)
        from rayhf.rollout.vllm_driver import VllmDriver

        self._max_length = max_length
        self._limit = FLOAT32_GAP if dtype == "float32" else config.mismatch_limit
        self._checksum = "checkpoint"

        def build() -> VllmDriver:
            self._driver = VllmDriver(
                model,
                config,
                dtype=dtype,
                max_length=max_length,
                seed=seed,
                device=device,
                sleeps=sleeps,
            )
            return self._driver

        self._loop: EngineLoop[VllmDriver] = EngineLoop(build)

    @property
    def weight_version(self) -> int:
        """0 until the first update. Raises WeightSyncError after a failed one."""
        return self._driver.held_version()

    def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        """`submit`, and wait for it."""
        return self.submit(requests, version=version).result()

    def submit(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> Future[list[tuple[Completion, ...]]]:
        """Complete every request, in order, one completion per seed. All enter the engine before
        its next step.

        Raises ConfigError here for a request that cannot fit. The future raises StaleWeightsError
        where the engine does not hold `version` when the requests' turn comes, WeightSyncError
        after a failed update, RayhfError when the engine broke, was closed or aborted,
        NumericalError for a non-finite log-prob.
        """
        for request in requests:
            self._check(request)
        return self._loop.submit(Wave(requests, version))

    def join_broadcast(self, meeting: Rendezvous, first: int) -> None:
        """Become able to take weights by broadcast, with the places from `first` on. Waits for
        running waves and for all other members; raises ActorLostError or DeadlineError where one
        does not come."""
        self._loop.call(lambda driver: driver.join_broadcast(meeting, first)).result()

    def update(self, snapshot: WeightSnapshot, payloads: Sequence[Any] = ()) -> UpdateReport:
        """Take new weights; `payloads` are the buckets' bytes or handles to them, in order, none
        for a broadcast. Waits for running waves.

        Raises WeightSyncError; the message says whether the old weights are still in place. For a
        broadcast that broke off ActorLostError or DeadlineError, and the engine holds no usable
        weights.
        """
        report: UpdateReport = self._loop.call(
            lambda driver: self._update(driver, snapshot, list(payloads))
        ).result()
        return report

    def check(self, probe: Probe) -> ProbeGap:
        """Compare this engine's log-probs with the learner's. Waits for running waves."""
        gap: ProbeGap = self._loop.call(lambda driver: _gap(driver, probe)).result()
        return gap

    def fingerprint(self) -> tuple[int, str]:
        """Version and checksum of the snapshot in use ("checkpoint" for the directory's own
        weights)."""
        return self.weight_version, self._checksum

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, so that what follows does not depend on what was generated
        before. Waits for running waves."""
        self._loop.call(lambda driver: driver.reset_prefix_cache()).result()

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU's memory back; without `keep_weights` only an update can wake it. Waits for
        running waves."""

        def sleep(driver: VllmDriver) -> None:
            if driver.asleep == "no":
                driver.check_sound()
                driver.sleep(keep_weights=keep_weights)

        self._loop.call(sleep).result()

    def wake(self) -> None:
        """Be able to write again with the weights that were kept; nothing where it is awake. Raises
        WeightSyncError."""

        def wake(driver: VllmDriver) -> None:
            driver.check_sound()
            if driver.asleep == "empty":
                raise WeightSyncError(
                    "this rollout engine gave its weights up when it went to sleep; send it an update"
                )
            try:
                driver.wake("weights")
                driver.wake("kv_cache")
            except Exception as error:  # whatever vLLM raises: part of its memory is missing
                driver.damage = f"waking it failed: {type(error).__name__}: {error}"
                raise WeightSyncError(driver.damage) from error

        self._loop.call(wake).result()

    def abort(self, reason: str) -> int:
        """Fail all waves that run or wait; returns how many."""
        return self._loop.abort(reason)

    def close(self) -> None:
        """Fail all waves and stop. Safe to call twice."""
        self._loop.close()

    def stats(self) -> EngineStats:
        return EngineStats(
            version=self._driver.version,
            tokens=self._driver.tokens,
            steps=self._loop.steps,
            busy_s=self._loop.busy_s,
            progress=self._loop.progress,
            in_flight=self._loop.in_flight,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _update(
        self, driver: VllmDriver, snapshot: WeightSnapshot, payloads: list[Any]
    ) -> UpdateReport:
        started = time.perf_counter()
        driver.check_sound()
        held = driver.version
        try:
            self._verify(driver, snapshot, payloads)
        except WeightSyncError as error:
            raise WeightSyncError(
                f"weights {snapshot.version} refused, weights {held} stay in place: {error}"
            ) from error
        driver.damage = f"the update from weights {held} to {snapshot.version} did not finish"
        try:
            driver.wake("weights")
            checksum = driver.load(snapshot, payloads)
            driver.wake("kv_cache")
            gap = _gap(driver, snapshot.probe)
        except (
            ActorLostError,
            DeadlineError,
        ):  # nothing is wrong with these weights: the learner or another engine is gone
            raise
        except Exception as error:  # whatever vLLM raises here leaves layers half loaded
            driver.damage = (
                f"the update to weights {snapshot.version} failed: {type(error).__name__}: {error}"
            )
            raise WeightSyncError(driver.damage) from error
        if not gap.mean <= self._limit:  # NaN fails, too
            driver.damage = (
                f"weights {snapshot.version} do not compute what the learner computes: the probe's log-probs differ by "
                f"{gap.mean:.3g} nats on average (limit {self._limit:g}), {gap.max:.3g} at most"
            )
            raise WeightSyncError(driver.damage)
        driver.version, driver.damage, self._checksum = snapshot.version, None, checksum
        seconds = time.perf_counter() - started
        return UpdateReport(version=snapshot.version, checksum=checksum, gap=gap, seconds=seconds)

    def _verify(self, driver: VllmDriver, snapshot: WeightSnapshot, payloads: list[Any]) -> None:
        """Everything that can be known before the engine is touched. Bytes that are not here yet
        are checked as they come."""
        expected = 0 if snapshot.transport == "broadcast" else len(snapshot.buckets)
        if len(payloads) != expected:
            raise WeightSyncError(
                f"{len(payloads)} payloads arrived, expected {expected} by {snapshot.transport}"
            )
        found = snapshot_checksum(snapshot.buckets)
        if expected and found != snapshot.checksum:
            raise WeightSyncError(
                f"the buckets have checksum {found}, the snapshot says {snapshot.checksum}"
            )
        adapted = any(
            is_factor(spec.name) for bucket in snapshot.buckets for spec in bucket.tensors
        )
        (check_adapters if adapted else check_complete)(driver.shapes, snapshot.buckets)
        length = len(snapshot.probe.token_ids)
        if not 2 <= length < self._max_length or len(snapshot.probe.logprobs) != length - 1:
            raise WeightSyncError(
                f"the probe has {length} tokens and {len(snapshot.probe.logprobs)} log-probs, expected 2 to "
                f"{self._max_length - 1} tokens and one log-prob fewer"
            )
        if snapshot.transport == "object_store":
            for bucket, payload in zip(snapshot.buckets, payloads, strict=True):
                verify_bucket(bucket, payload)

    def _check(self, request: GenerateRequest) -> None:
        length, sampling = len(request.token_ids), request.sampling
        where = f"prompt {request.prompt_id}, request {request.number}"
        if not length or not request.seeds:
            raise ConfigError(
                f"{where}: {length} tokens and {len(request.seeds)} seeds, expected at least one of each"
            )
        if sampling.max_tokens < 1 or length + sampling.max_tokens > self._max_length:
            raise ConfigError(
                f"{where}: {length} tokens and max_tokens {sampling.max_tokens} do not fit policy.max_length "
                f"{self._max_length}; at most {self._max_length - sampling.max_tokens} prompt tokens fit"
            )
        low, high = min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= self._driver.vocab_size:
            raise ConfigError(
                f"{where}: token {low if low < 0 else high} is not in 0..{self._driver.vocab_size - 1}"
            )
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"{where}: temperature {sampling.temperature:g} is less than vLLM can; use {MIN_TEMPERATURE} or 0"
            )


def _gap(driver: VllmDriver, probe: Probe) -> ProbeGap:
    distance = np.abs(driver.probe_logprobs(probe) - np.asarray(probe.logprobs, dtype=np.float64))
    return ProbeGap(mean=float(distance.mean()), max=float(distance.max()))
