"""vLLM behind the loop: waves become vLLM requests, one per seed; finished requests, completions.

In: waves, snapshots and probes, on the loop's thread only. Out: completions with the log-probs of
the distribution that was sampled from, and the version of the weights behind every token. vLLM's
errors are translated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rayhf.config.schema import RolloutConfig
from rayhf.data.stop_tokens import special_token_ids, stop_token_ids
from rayhf.data.thinking import ThinkingParser
from rayhf.errors import NumericalError, RayhfError, StaleWeightsError, WeightSyncError
from rayhf.rollout import vllm_internals
from rayhf.rollout.env import Device
from rayhf.rollout.loop import Result, Wave
from rayhf.rollout.partials import Growth, Partial, Slot
from rayhf.rollout.vllm_build import build_engine
from rayhf.rollout.vllm_internals import BucketBytes
from rayhf.types import (
    Completion,
    GenerateRequest,
    Probe,
    Sampling,
    WeightSnapshot,
    derive_seed,
    float_array,
    split_versions,
    token_array,
)
from rayhf.weights.broadcast import Rendezvous
from rayhf.weights.buckets import checkpoint_shapes, snapshot_checksum

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


@dataclass(eq=False)
class _Completing:
    """One completion of a wave."""

    known: Partial | None
    """What another engine had generated."""
    name: str | None = None
    """Id of its vLLM request; None where it needs none."""
    finished: Partial | None = None
    """All of it, once it is finished."""
    reported: int = 0
    """Number of tokens that were reported, or known from the start."""


@dataclass(eq=False)
class _Running:
    """A wave whose requests are in the engine."""

    wave: Wave
    slots: dict[Slot, _Completing] = field(default_factory=dict)
    missing: int = 0
    """Completions that are not finished."""


class VllmDriver:
    """One in-process vLLM engine."""

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: str,
        max_length: int,
        seed: int,
        device: Device,
        sleep_mode: bool,
        stop_ids: Sequence[int] = (),
        scaled_logprobs: bool = False,
        isolates_waves: bool = False,
    ) -> None:
        self.llm = build_engine(
            model,
            config,
            dtype=dtype,
            max_length=max_length,
            seed=seed,
            device=device,
            sleep_mode=sleep_mode,
            scaled_logprobs=scaled_logprobs,
        )
        self._engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.vocab_size = vllm_internals.vocabulary_size(self.llm)
        self.stop_token_ids = stop_token_ids(model, self.tokenizer, known=stop_ids)
        self._special_ids = special_token_ids(self.tokenizer)
        self._thinking = (
            None if config.thinking is None else ThinkingParser(config.thinking, self.tokenizer)
        )
        self.shapes = checkpoint_shapes(model, tied=vllm_internals.has_tied_embeddings(self.llm))
        self.tokens = 0
        """Generated tokens."""
        self.version = 0
        self.damage: str | None = None
        """Why the weights are undefined; None while they are usable."""
        self.sleep_state: Literal["awake", "weights_kept", "weights_discarded"] = "awake"
        """Whether the weights of a sleeping engine are in host memory or nowhere."""
        self._isolates_waves = isolates_waves
        self._in_flight = config.in_flight_updates
        self._keeps_kv = config.in_flight_updates and config.in_flight_kv == "keep"
        self._waves: dict[Wave, _Running] = {}
        self._ended: list[_Running] = []
        """Waves that are finished and were not returned yet."""
        self._requests: dict[str, tuple[_Running, Slot]] = {}
        """By request id: its wave, and its place there."""
        self._count = 0
        vllm_internals.label_weights(self.llm, self.version)
        vllm_internals.init_weight_transfer(self.llm, frozenset(self.shapes), model)

    def usable_version(self) -> int:
        """Return the weights' version. Raises WeightSyncError if they are undefined or asleep."""
        self.check_usable()
        if self.sleep_state != "awake":
            raise WeightSyncError("this rollout engine is asleep; wake it first")
        return self.version

    def check_usable(self) -> None:
        """Raise WeightSyncError where the weights are undefined."""
        if self.damage is not None:
            raise WeightSyncError(
                f"this rollout engine holds no usable weights: {self.damage}; start a new one"
            )

    # --------------------------------------------------------------------------------- generation

    def admit(self, wave: Wave) -> None:
        """Add every request of the wave, in order.

        Lengths and token ids were checked before the wave was queued.
        """
        held = self.usable_version()
        if wave.version > held or (wave.version < held and not self._in_flight):
            raise StaleWeightsError(
                f"requests need weights {wave.version}, this engine holds weights {held}"
            )
        if self._isolates_waves and not self._requests:
            self.reset_prefix_cache()
        running = _Running(wave)
        for row, request in enumerate(wave.requests):
            for index in range(len(request.seeds)):
                self._start(running, (row, index))
        self._waves[wave] = running
        if not running.missing:
            self._ended.append(running)

    def _start(self, running: _Running, slot: Slot) -> None:
        """Add the vLLM request of one completion, which may have begun elsewhere."""
        row, index = slot
        request = running.wave.requests[row]
        known = running.wave.partials.get(slot)
        completing = _Completing(known)
        running.slots[slot] = completing
        if known is not None:
            completing.reported = len(known)
            if known.finish_reason is not None:
                completing.finished = known
                return
        self._count += 1
        name = str(self._count)
        sampling = request.sampling
        seed = request.seeds[index]
        token_ids = list(request.token_ids)
        if known is not None:
            token_ids += known.token_ids.tolist()
            sampling = replace(sampling, max_tokens=sampling.max_tokens - len(known))
            # From the same seed the first tokens would be drawn with the same random numbers.
            seed = derive_seed(seed, "continued", len(known))
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if self._keeps_kv:
            # Keys and values of running requests stay cached over an update, but those of other
            # weights must not be found by a new prompt.
            prompt["cache_salt"] = f"weights {self.version}"
        self._engine.add_request(name, prompt, self._params(sampling, seed))
        completing.name = name
        self._requests[name] = (running, slot)
        running.missing += 1

    def step(self) -> list[tuple[Wave, Result | RayhfError]]:
        """Take one engine step and return the waves that are finished."""
        if self.damage is not None:  # an update failed while they were running
            return self._fail_running()
        if self._requests:
            self._collect(self._engine.step())
        ended = self._ended
        self._ended = []
        for running in ended:
            del self._waves[running.wave]
        return [(running.wave, self._completions(running)) for running in ended]

    def _collect(self, outputs: Iterable[RequestOutput]) -> None:
        """Take finished requests out of vLLM."""
        for output in outputs:
            running, slot = self._requests.pop(output.request_id)
            completing = running.slots[slot]
            partial = _partial(running.wave.requests[slot[0]], output)
            self.tokens += len(partial)
            completing.finished = (
                partial if completing.known is None else completing.known.followed_by(partial)
            )
            running.missing -= 1
            if not running.missing:
                self._ended.append(running)

    def _fail_running(self) -> list[tuple[Wave, Result | RayhfError]]:
        waves = list(self._waves)
        self.cancel()
        error = WeightSyncError(f"this rollout engine holds no usable weights: {self.damage}")
        return [(wave, error) for wave in waves]

    def cancel(self) -> None:
        """Drop every running request."""
        self._engine.abort_request(list(self._requests))
        self._requests.clear()
        self._waves.clear()
        self._ended.clear()

    def report(self) -> list[Growth]:
        """Return what the completions of unfinished calls gained since the last report.

        Not for requests with stop strings: one could begin in what is reported and end in what
        follows, and would not be noticed. They are repeated from their first token.
        """
        grown = []
        for running in self._waves.values():
            if running.wave.call is None:
                continue
            for slot, completing in running.slots.items():
                stop = running.wave.requests[slot[0]].sampling.stop
                if completing.finished is None and self._stop_texts(stop):
                    continue
                start = completing.reported
                added = self._since(completing)
                if len(added):
                    completing.reported += len(added)
                    grown.append(
                        Growth(call=running.wave.call, slot=slot, start=start, added=added)
                    )
        return grown

    def _since(self, completing: _Completing) -> Partial:
        """Return the tokens of a completion that were not reported."""
        if completing.finished is not None:
            return completing.finished.after(completing.reported)
        assert completing.name is not None
        known = 0 if completing.known is None else len(completing.known)
        return vllm_internals.generated(self.llm, completing.name, completing.reported - known)

    def close(self) -> None:
        """Stop the engine."""
        vllm_internals.shut_down(self.llm)

    def probe_logprobs(self, probe: Probe) -> npt.NDArray[np.float64]:
        """Return the engine's log-probs of the probe's tokens at temperature 1.

        Shape (len(token_ids) - 1,). Running requests wait.
        """
        self._collect(vllm_internals.outputs_in_flight(self.llm))
        if not vllm_internals.has_room(self.llm, len(probe.token_ids)):
            self.reset_prefix_cache()
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # A salt of its own: nothing is read from the cache, whatever is kept there.
        self._count += 1
        prompt = {"prompt_token_ids": list(probe.token_ids), "cache_salt": f"probe {self._count}"}
        outputs: list[RequestOutput] = []
        with vllm_internals.requests_held(self.llm):
            self._engine.add_request("probe", prompt, params)
            while not outputs:
                outputs += self._engine.step()
        logprobs = cast("FlatLogprobs", outputs[0].prompt_logprobs)
        # The first position has no log-prob, every other one has one value: its own token's.
        return np.asarray(logprobs.logprobs, dtype=np.float64)

    def _params(self, sampling: Sampling, seed: int) -> SamplingParams:
        # Special tokens are not in the text: they are stopped at by their ids.
        texts = self._stop_texts(sampling.stop)
        special = [self._special_ids[text] for text in sampling.stop if text in self._special_ids]
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop=texts or None,
            include_stop_str_in_output=True,
            stop_token_ids=[*self.stop_token_ids, *special],
            # vLLM decodes token by token, which only stop strings need; _completions decodes once.
            detokenize=bool(texts),
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _stop_texts(self, stop: Sequence[str]) -> list[str]:
        """Return the stop strings that are not special tokens."""
        return [text for text in stop if text not in self._special_ids]

    def _completions(self, running: _Running) -> Result | RayhfError:
        """Return the completions of a finished wave."""
        partials = [completing.finished for completing in running.slots.values()]
        token_ids = [partial.token_ids.tolist() for partial in partials if partial is not None]
        texts = iter(self.tokenizer.batch_decode(token_ids, skip_special_tokens=True))
        remaining = iter(partials)
        result: Result = []
        for request in running.wave.requests:
            completions = []
            thinks = self._thinking is not None and self._thinking.opened_by(request.token_ids)
            for index in range(len(request.seeds)):
                partial = next(remaining)
                assert partial is not None
                completion = _completion(request, index, partial, next(texts))
                if self._thinking is not None:
                    completion = self._thinking.split(completion, opened=thinks)
                if not np.isfinite(completion.logprobs).all():
                    return NumericalError(
                        f"weights of version {int(partial.versions.max())} give a non-finite "
                        f"log-prob for prompt {request.prompt_id}"
                    )
                completions.append(completion)
            result.append(tuple(completions))
        return result

    # ------------------------------------------------------------------------------------- memory

    def reset_prefix_cache(self) -> None:
        """Discard cached keys and values; those of running requests are computed again.

        Raises WeightSyncError where vLLM declines (it returns False).
        """
        if not self.llm.reset_prefix_cache(reset_running_requests=bool(self._requests)):
            raise WeightSyncError("vLLM did not reset its prefix cache: requests are running")

    def sleep(self, *, keep_weights: bool) -> None:
        """Free the GPU's memory: discard keys and values, move weights to host memory.

        Without `keep_weights` the weights are discarded as well. vLLM calls that level 1 and 2.
        Nothing may be running.
        """
        self.llm.sleep(level=1 if keep_weights else 2)
        self.sleep_state = "weights_kept" if keep_weights else "weights_discarded"

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate memory for one part; the engine is awake once it has both.

        Does nothing where it is awake.
        """
        if self.sleep_state != "awake" and self.llm.wake_up(tags=[part]):
            self.sleep_state = "awake"

    # ------------------------------------------------------------------------------------ weights

    def join_broadcast(self, rendezvous: Rendezvous, first_rank: int) -> None:
        """Make all workers join the learner's group, with ranks from `first_rank` on."""
        self.llm.collective_rpc("join_broadcast", args=(rendezvous, first_rank))

    def load(self, snapshot: WeightSnapshot, payloads: Sequence[BucketBytes]) -> str:
        """Run one weight update and return the checksum of what was loaded.

        Running requests go on with the new weights, and with the keys and values of the old ones
        where those are kept. The weights are undefined if this raises.
        """
        checksum = snapshot.checksum
        self._collect(vllm_internals.outputs_in_flight(self.llm))
        vllm_internals.start_update(self.llm)
        if snapshot.transport == "broadcast":
            received = self.llm.collective_rpc(
                "receive_broadcast", args=(snapshot.version, snapshot.buckets)
            )
            checksum = snapshot_checksum(received[0])
            if any(snapshot_checksum(buckets) != checksum for buckets in received):
                raise WeightSyncError(
                    f"this engine's workers received different weights {snapshot.version}"
                )
        else:
            for bucket, payload in zip(snapshot.buckets, payloads, strict=True):
                vllm_internals.load_bucket(self.llm, bucket, payload)
        vllm_internals.finish_update(self.llm)
        if not (self._keeps_kv and self._requests):
            self.reset_prefix_cache()
        return checksum

    def confirm(self, version: int) -> None:
        """Take what was loaded as the weights of `version`, which tokens get from now on."""
        self.version = version
        self.damage = None
        vllm_internals.label_weights(self.llm, version)


def _partial(request: GenerateRequest, output: RequestOutput) -> Partial:
    row = output.outputs[0]
    reason = row.finish_reason
    if reason not in ("stop", "length"):
        raise RayhfError(
            f"vLLM ended prompt {request.prompt_id} with {reason!r}, expected 'stop' or 'length'"
        )
    return Partial(
        token_ids=token_array(row.token_ids),
        logprobs=float_array(cast("FlatLogprobs", row.logprobs).logprobs),
        versions=vllm_internals.token_versions(output),
        finish_reason=reason,
    )


def _completion(request: GenerateRequest, index: int, partial: Partial, text: str) -> Completion:
    assert partial.finish_reason is not None
    oldest, versions = split_versions(partial.versions)
    return Completion(
        prompt_id=request.prompt_id,
        index=index,
        seed=request.seeds[index],
        text=text,
        token_ids=partial.token_ids,
        logprobs=partial.logprobs,
        finish_reason=partial.finish_reason,
        policy_version=oldest,
        token_versions=versions,
    )
