"""RolloutEngine: one vLLM engine that generates with a known version of the policy's weights.

In: GenerateRequests with the version they need, and WeightSnapshots. Out: Completions. An actor
wraps it; any thread may call, one thread owns vLLM (loop.py).

New weights, whole or as LoRA adapters of the directory's, are accepted only when they are verified
to be the learner's: bucket checksums, names and shapes before the engine is touched, the probe's
log-probs after. If an update fails in between, the engine's weights are undefined and it refuses to
generate: build a new one. An engine that was put to sleep does not generate until `wake`, or an
update, which allocates memory in stages: for weights, the weights, for keys and values.

Synchronization: `update` waits until running waves are done, and requests submitted after it wait
for it, so a completion never mixes two versions. With in_flight_updates it waits for the running
step only: a completion continues with the new weights, and says which version wrote each token.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import numpy as np

from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.errors import ActorLostError, ConfigError, DeadlineError, WeightSyncError
from rayhf.rollout.env import Device, check_env
from rayhf.rollout.loop import EngineLoop, Wave
from rayhf.rollout.partials import Growth, Partial, Slot
from rayhf.types import Completion, GenerateRequest, Probe, WeightSnapshot
from rayhf.weights.buckets import Payload, check_complete, snapshot_checksum, verify_buckets
from rayhf.weights.lora import check_adapters, is_factor

if TYPE_CHECKING:
    from rayhf.rollout.vllm_driver import VllmDriver
    from rayhf.rollout.vllm_internals import BucketBytes
    from rayhf.weights.broadcast import Rendezvous

FLOAT32_GAP = 1e-3
"""Limit on a probe's mean gap for float32 engines, in nats: 30 times the difference between two
correct implementations."""
MIN_TEMPERATURE = 0.01
"""vLLM silently samples at this temperature when a request has a lower one above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeGap:
    """|log-prob here - log-prob at the learner| over a probe's tokens, in nats."""

    mean: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """An engine's confirmation of new weights."""

    version: int
    checksum: str
    gap: ProbeGap
    seconds: float
    """Time without generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine started."""

    version: int
    """The last version that was loaded completely."""
    tokens: int
    """Generated, in finished waves."""
    steps: int
    busy_s: float
    """Seconds inside engine steps."""
    progress: int
    """Grows while the engine works: the heartbeat that a watchdog reads."""
    in_flight: int
    """Running and queued waves."""
    peak_rss_bytes: int
    """Of this process."""


class RolloutEngine:
    """One vLLM engine; the checkpoint's weights are version 0.

    Args:
        model: Hugging Face model directory.
        config: settings of the section `rollout`.
        dtype: of weights and computation.
        max_length: prompt plus response, in tokens.
        seed: of vLLM; requests have their own.
        device: "cpu" or "gpu".
        sleep_mode: make `sleep` free GPU memory, for which vLLM allocates it differently.
        stop_token_ids: tokens that end a completion, besides those of the directory.
        scaled_logprobs: return log-probs at the request's temperature instead of 1. top_p and top_k
            then renormalize them: leave these off.
        isolates_waves: discard cached prefixes before a wave enters an idle engine, so that its
            results do not depend on earlier ones.

    Raises ConfigError where vLLM refuses the model or the settings, GpuMemoryError where its GPU
    has too little free memory.
    """

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_length: int,
        seed: int,
        device: Device,
        sleep_mode: bool = False,
        stop_token_ids: Sequence[int] = (),
        scaled_logprobs: bool = False,
        isolates_waves: bool = False,
    ) -> None:
        check_env(device)
        from rayhf.rollout.vllm_driver import VllmDriver

        self._max_length = max_length
        self._limit = FLOAT32_GAP if dtype == "float32" else config.mismatch_limit
        self._checksum = "checkpoint"
        self._exclusive = not config.in_flight_updates
        """Whether updates and probes wait for running waves."""

        def build() -> VllmDriver:
            self._driver = VllmDriver(
                model,
                config,
                dtype=dtype,
                max_length=max_length,
                seed=seed,
                device=device,
                sleep_mode=sleep_mode,
                stop_ids=stop_token_ids,
                scaled_logprobs=scaled_logprobs,
                isolates_waves=isolates_waves,
            )
            return self._driver

        self._loop: EngineLoop[VllmDriver] = EngineLoop(build)

    @property
    def weight_version(self) -> int:
        """0 until the first update. Raises WeightSyncError after a failed one, and asleep."""
        return self._driver.usable_version()

    # --------------------------------------------------------------------------------- generation

    def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        """Submit the requests and wait for the completions."""
        return self.submit(requests, version=version).result()

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        *,
        version: int,
        call: int | None = None,
        partials: Mapping[Slot, Partial] = MappingProxyType({}),
    ) -> Future[list[tuple[Completion, ...]]]:
        """Complete every request, in order, one completion per seed.

        All requests enter the engine before its next step. Raises ConfigError here for a request
        that cannot fit. The future raises StaleWeightsError where the engine does not hold
        `version` when the requests are due (with in_flight_updates: where it holds older weights),
        WeightSyncError after a failed update, RayhfError when the engine broke, was closed or
        aborted, NumericalError for a non-finite log-prob.

        Args:
            requests: what to complete.
            version: of the weights.
            call: number under which `report` tells what was generated.
            partials: beginnings of completions, which are continued.
        """
        for request in requests:
            self._check_request(request)
        return self._loop.submit(Wave(requests, version, call, partials))

    def report(self) -> list[Growth]:
        """Return what running calls generated since the last report."""
        return self._loop.call(lambda driver: driver.report(), exclusive=False).result()

    def abort(self, reason: str) -> int:
        """Fail all running and queued waves; returns how many there were."""
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

    def reset_prefix_cache(self) -> None:
        """Discard cached prefixes, so that results do not depend on what was generated before.

        Waits for running waves.
        """
        self._loop.call(lambda driver: driver.reset_prefix_cache()).result()

    # ------------------------------------------------------------------------------------ weights

    def join_broadcast(self, rendezvous: Rendezvous, first_rank: int) -> None:
        """Prepare for weights by broadcast; the workers take the ranks from `first_rank` on.

        Waits as `update` does, and with gloo for all other members. Raises ActorLostError or
        DeadlineError where a member does not join.
        """
        self._loop.call(
            lambda driver: driver.join_broadcast(rendezvous, first_rank), exclusive=self._exclusive
        ).result()

    def update(
        self, snapshot: WeightSnapshot, payloads: Sequence[BucketBytes] = ()
    ) -> UpdateReport:
        """Load new weights. Waits for running waves, with in_flight_updates for the running step.

        `payloads` are the buckets' bytes or handles to them, in order, none for a broadcast. Raises
        WeightSyncError, whose message says whether the old weights are still in place; for a broken
        broadcast ActorLostError or DeadlineError, and the engine then holds no usable weights.
        """
        return self._loop.call(
            lambda driver: self._update(driver, snapshot, list(payloads)), exclusive=self._exclusive
        ).result()

    def check(self, probe: Probe) -> ProbeGap:
        """Compare this engine's log-probs with the learner's. Waits as `update` does."""
        return self._loop.call(
            lambda driver: _gap(driver, probe), exclusive=self._exclusive
        ).result()

    def verify(self, probe: Probe) -> None:
        """Check that the weights compute the learner's log-probs. Waits as `update` does.

        Raises WeightSyncError where they do not, as `update` does.
        """
        if difference := self._difference(self.check(probe)):
            raise WeightSyncError(
                f"weights {self.weight_version} do not compute what the learner computes: "
                + difference
            )

    def _difference(self, gap: ProbeGap) -> str | None:
        """Describe a gap beyond the limit; None where it is within."""
        if gap.mean <= self._limit:  # NaN fails, too
            return None
        return (
            f"the probe's log-probs differ by {gap.mean:.3g} nats on average "
            f"(limit {self._limit:g}), {gap.max:.3g} at most"
        )

    def fingerprint(self) -> tuple[int, str]:
        """Return version and checksum of the weights in use.

        The checksum of the directory's own weights is "checkpoint".
        """
        return self.weight_version, self._checksum

    # -------------------------------------------------------------------------------------- sleep

    def sleep(self, *, keep_weights: bool) -> None:
        """Free the GPU's memory. Waits for running waves.

        Without `keep_weights` only an update can wake the engine.
        """

        def sleep(driver: VllmDriver) -> None:
            if driver.sleep_state == "awake":
                driver.check_usable()
                driver.sleep(keep_weights=keep_weights)

        self._loop.call(sleep).result()

    def wake(self) -> None:
        """Make the engine generate again with the weights it kept; does nothing where it is awake.

        Raises WeightSyncError where the weights were discarded, or memory is missing.
        """

        def wake(driver: VllmDriver) -> None:
            driver.check_usable()
            if driver.sleep_state == "weights_discarded":
                raise WeightSyncError(
                    "this rollout engine discarded its weights when it was put to sleep; "
                    "send it an update"
                )
            try:
                driver.wake("weights")
                driver.wake("kv_cache")
            except Exception as error:  # whatever vLLM raises: part of its memory is missing
                driver.damage = f"waking it failed: {type(error).__name__}: {error}"
                raise WeightSyncError(driver.damage) from error

        self._loop.call(wake).result()

    # ------------------------------------------------------------------------------------- checks

    def _update(
        self, driver: VllmDriver, snapshot: WeightSnapshot, payloads: list[BucketBytes]
    ) -> UpdateReport:
        started = time.perf_counter()
        driver.check_usable()
        previous = driver.version
        try:
            self._verify(driver, snapshot, payloads)
        except WeightSyncError as error:
            raise WeightSyncError(
                f"weights {snapshot.version} refused, weights {previous} stay in place: {error}"
            ) from error
        driver.damage = f"the update from weights {previous} to {snapshot.version} did not finish"
        try:
            driver.wake("weights")
            checksum = driver.load(snapshot, payloads)
            driver.wake("kv_cache")
            gap = _gap(driver, snapshot.probe)
        except (ActorLostError, DeadlineError):
            raise  # these weights are not at fault: the learner or another engine is gone
        except Exception as error:  # whatever vLLM raises here leaves layers half loaded
            driver.damage = (
                f"the update to weights {snapshot.version} failed: {type(error).__name__}: {error}"
            )
            raise WeightSyncError(driver.damage) from error
        if difference := self._difference(gap):
            driver.damage = (
                f"weights {snapshot.version} do not compute what the learner computes: {difference}"
            )
            raise WeightSyncError(driver.damage)
        driver.confirm(snapshot.version)
        self._checksum = checksum
        seconds = time.perf_counter() - started
        return UpdateReport(version=snapshot.version, checksum=checksum, gap=gap, seconds=seconds)

    def _verify(
        self, driver: VllmDriver, snapshot: WeightSnapshot, payloads: list[BucketBytes]
    ) -> None:
        """Check everything that can be checked before the engine is touched.

        Bytes that are not in this process yet are checked as they arrive.
        """
        expected = 0 if snapshot.transport == "broadcast" else len(snapshot.buckets)
        if len(payloads) != expected:
            raise WeightSyncError(
                f"{len(payloads)} payloads arrived, expected {expected} by {snapshot.transport}"
            )
        checksum = snapshot_checksum(snapshot.buckets)
        if expected and checksum != snapshot.checksum:
            raise WeightSyncError(
                f"the buckets have checksum {checksum}, the snapshot says {snapshot.checksum}"
            )
        adapted = any(
            is_factor(spec.name) for bucket in snapshot.buckets for spec in bucket.tensors
        )
        if adapted:
            check_adapters(driver.shapes, snapshot.buckets)
        else:
            check_complete(driver.shapes, snapshot.buckets)
        length = len(snapshot.probe.token_ids)
        if not 2 <= length < self._max_length or len(snapshot.probe.logprobs) != length - 1:
            raise WeightSyncError(
                f"the probe has {length} tokens and {len(snapshot.probe.logprobs)} log-probs, "
                f"expected 2 to {self._max_length - 1} tokens and one log-prob fewer"
            )
        if snapshot.transport == "object_store":
            verify_buckets(snapshot.buckets, cast("list[Payload]", payloads))

    def _check_request(self, request: GenerateRequest) -> None:
        length = len(request.token_ids)
        sampling = request.sampling
        where = f"prompt {request.prompt_id}, request {request.number}"
        if not length or not request.seeds:
            raise ConfigError(
                f"{where}: {length} tokens and {len(request.seeds)} seeds, expected at least one "
                "of each"
            )
        if sampling.max_tokens < 1 or length + sampling.max_tokens > self._max_length:
            raise ConfigError(
                f"{where}: {length} tokens and max_tokens {sampling.max_tokens} do not fit "
                f"policy.max_length {self._max_length}; at most "
                f"{self._max_length - sampling.max_tokens} prompt tokens fit"
            )
        low = min(request.token_ids)
        high = max(request.token_ids)
        if low < 0 or high >= self._driver.vocab_size:
            raise ConfigError(
                f"{where}: token {low if low < 0 else high} is not in "
                f"0..{self._driver.vocab_size - 1}"
            )
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"{where}: temperature {sampling.temperature:g} is lower than vLLM supports; use "
                f"{MIN_TEMPERATURE} or 0"
            )


def _gap(driver: VllmDriver, probe: Probe) -> ProbeGap:
    distance = np.abs(driver.probe_logprobs(probe) - np.asarray(probe.logprobs, dtype=np.float64))
    return ProbeGap(mean=float(distance.mean()), max=float(distance.max()))
