"""vLLM behind the loop: waves become vLLM requests, one per seed; finished requests, completions.

In: waves, snapshots and probes, on the loop's thread only. Out: completions with the log-probs of
the distribution that was sampled from. vLLM's errors are translated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rayhf.config.schema import RolloutConfig
from rayhf.data.stop_tokens import special_token_ids, stop_token_ids
from rayhf.data.thinking import ThinkingParser
from rayhf.errors import (
    ConfigError,
    GpuMemoryError,
    NumericalError,
    RayhfError,
    StaleWeightsError,
    WeightSyncError,
    clean_line,
)
from rayhf.rollout import vllm_internals
from rayhf.rollout.env import Device
from rayhf.rollout.loop import Result, Wave
from rayhf.rollout.vllm_internals import BucketBytes
from rayhf.rollout.vllm_worker import BACKEND
from rayhf.types import (
    Completion,
    GenerateRequest,
    Probe,
    Sampling,
    WeightSnapshot,
    float_array,
    token_array,
)
from rayhf.weights.broadcast import Rendezvous
from rayhf.weights.buckets import checkpoint_shapes, snapshot_checksum

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs

CPU_KV_CACHE_GIB = 0.25
CPU_BATCHED_TOKENS = 16384
_UNCHECKED_FRACTION = 0.01
"""A fraction of GPU memory so small that vLLM's check at the start passes."""


@dataclass(eq=False)
class _Running:
    """A wave whose requests are in the engine."""

    wave: Wave
    outputs: list[list[RequestOutput | None]]
    """One slot per request and seed."""
    missing: int
    """Empty slots."""
    ids: list[str] = field(default_factory=list)


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
    ) -> None:
        self.llm = _build(
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
        self._requests: dict[str, tuple[_Running, int, int]] = {}
        """By request id: its wave, and its slot there."""
        self._count = 0
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
        if wave.version != self.usable_version():
            raise StaleWeightsError(
                f"requests need weights {wave.version}, this engine holds weights {self.version}"
            )
        running = _Running(wave, [[None] * len(request.seeds) for request in wave.requests], 0)
        for row, request in enumerate(wave.requests):
            for index, seed in enumerate(request.seeds):
                self._count += 1
                name = str(self._count)
                self._engine.add_request(
                    name,
                    {"prompt_token_ids": list(request.token_ids)},
                    self._params(request.sampling, seed),
                )
                self._requests[name] = (running, row, index)
                running.ids.append(name)
        running.missing = len(running.ids)

    def step(self) -> list[tuple[Wave, Result | RayhfError]]:
        """Take one engine step and return the waves it finished."""
        finished: list[tuple[Wave, Result | RayhfError]] = []
        for output in self._engine.step():
            running, row, index = self._requests.pop(output.request_id)
            assert isinstance(output, RequestOutput)
            running.outputs[row][index] = output
            running.missing -= 1
            if not running.missing:
                finished.append((running.wave, self._completions(running)))
        return finished

    def cancel(self) -> None:
        """Drop every running request."""
        self._engine.abort_request(list(self._requests))
        self._requests.clear()

    def close(self) -> None:
        """Stop the engine."""
        vllm_internals.shut_down(self.llm)

    def probe_logprobs(self, probe: Probe) -> npt.NDArray[np.float64]:
        """Return the engine's log-probs of the probe's tokens at temperature 1.

        Shape (len(token_ids) - 1,). Nothing may be running.
        """
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request("probe", {"prompt_token_ids": list(probe.token_ids)}, params)
        outputs: list[RequestOutput] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        logprobs = cast("FlatLogprobs", outputs[0].prompt_logprobs)
        # The first position has no log-prob, every other one has one value: its own token's.
        return np.asarray(logprobs.logprobs, dtype=np.float64)

    def _params(self, sampling: Sampling, seed: int) -> SamplingParams:
        # Special tokens are not in the text: they are stopped at by their ids.
        texts = [text for text in sampling.stop if text not in self._special_ids]
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

    def _completions(self, running: _Running) -> Result | RayhfError:
        rows = [
            output.outputs[0]
            for outputs in running.outputs
            for output in outputs
            if output is not None
        ]
        token_ids = [list(row.token_ids) for row in rows]
        texts = iter(self.tokenizer.batch_decode(token_ids, skip_special_tokens=True))
        self.tokens += sum(map(len, token_ids))
        result: Result = []
        for request, outputs in zip(running.wave.requests, running.outputs, strict=True):
            completions = []
            thinks = self._thinking is not None and self._thinking.opened_by(request.token_ids)
            for index, output in enumerate(outputs):
                assert output is not None
                completion = _completion(request, index, output, next(texts), self.version)
                if self._thinking is not None:
                    completion = self._thinking.split(completion, opened=thinks)
                if not np.isfinite(completion.logprobs).all():
                    return NumericalError(
                        f"weights of version {self.version} give a non-finite log-prob for prompt "
                        f"{request.prompt_id}"
                    )
                completions.append(completion)
            result.append(tuple(completions))
        return result

    # ------------------------------------------------------------------------------------- memory

    def reset_prefix_cache(self) -> None:
        """Discard cached keys and values.

        Raises WeightSyncError where vLLM declines (it returns False).
        """
        if not self.llm.reset_prefix_cache():
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

        The weights are undefined if this raises.
        """
        checksum = snapshot.checksum
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
        self.reset_prefix_cache()
        return checksum


def _completion(
    request: GenerateRequest, index: int, output: RequestOutput, text: str, version: int
) -> Completion:
    row = output.outputs[0]
    reason = row.finish_reason
    if reason not in ("stop", "length"):
        raise RayhfError(
            f"vLLM ended prompt {request.prompt_id} with {reason!r}, expected 'stop' or 'length'"
        )
    return Completion(
        prompt_id=request.prompt_id,
        index=index,
        seed=request.seeds[index],
        text=text,
        token_ids=token_array(row.token_ids),
        logprobs=float_array(cast("FlatLogprobs", row.logprobs).logprobs),
        finish_reason=reason,
        policy_version=version,
    )


# ------------------------------------------------------------------------------- settings of vLLM


def _build(
    model: Path,
    config: RolloutConfig,
    *,
    dtype: str,
    max_length: int,
    seed: int,
    device: Device,
    sleep_mode: bool,
    scaled_logprobs: bool,
) -> LLM:
    kv_cache_gib = config.kv_cache_gib or (CPU_KV_CACHE_GIB if device == "cpu" else None)
    eager = config.enforce_eager if config.enforce_eager is not None else device == "cpu"
    if device == "cpu" and not eager:
        raise ConfigError("rollout.enforce_eager: false needs a GPU; on CPU leave it out")
    settings: dict[str, Any] = {
        "dtype": dtype,
        # A model directory is data: no code of its own, no pickled weights.
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_model_len": max_length,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": eager,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "seed": seed,
        "worker_extension_cls": "rayhf.rollout.vllm_worker.WorkerExtension",
        "weight_transfer_config": {"backend": BACKEND},
        # Raw: of the whole vocabulary at temperature 1, as the learner computes them. Processed
        # ones have the temperature, but top-k and top-p renormalize them too.
        "logprobs_mode": "processed_logprobs" if scaled_logprobs else "raw_logprobs",
        # Sampling is set by the request alone, not by defaults that ship with a checkpoint.
        "generation_config": "vllm",
        "enable_prefix_caching": config.prefix_caching is not False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if device == "cpu":
        settings |= _cpu_settings(max_length)
    else:
        settings |= _gpu_settings(config, kv_cache_gib, sleep_mode=sleep_mode)
    if config.tensor_parallel > 1:
        # By default vLLM would detect Ray's placement group and request workers in a bundle that
        # this actor fills.
        settings["tensor_parallel_size"] = config.tensor_parallel
        settings["distributed_executor_backend"] = "mp"
    try:
        return LLM(str(model), **settings)
    except (ValueError, AssertionError, torch.OutOfMemoryError) as error:
        # A cache of a given size, as on CPU, is too small whenever it is tried.
        if kv_cache_gib is None and vllm_internals.is_memory_shortage(error):
            raise GpuMemoryError(f"vLLM does not start: {clean_line(str(error))}") from error
        if not isinstance(error, ValueError):
            raise
        raise ConfigError(
            f"vLLM refuses {model} with the settings of section rollout: {error}"
        ) from error


def _cpu_settings(max_length: int) -> dict[str, Any]:
    # A prompt that is prefilled in parts makes vLLM 0.32 rewind the generators of seeded requests,
    # which CPU generators cannot: the engine would crash. So prompts enter whole, and a step must
    # have room for the longest. Prefixes are cached in whole blocks: 32 tokens is the smallest size
    # that the CPU kernels support, as fast as vLLM's 128.
    return {
        "block_size": 32,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, CPU_BATCHED_TOKENS),
    }


def _gpu_settings(
    config: RolloutConfig, kv_cache_gib: float | None, *, sleep_mode: bool
) -> dict[str, Any]:
    return {
        # With a cache of a given size this decides nothing, but vLLM would still require this
        # fraction to be free at the start.
        "gpu_memory_utilization": config.memory_fraction
        if kv_cache_gib is None
        else _UNCHECKED_FRACTION,
        "enable_sleep_mode": sleep_mode,
    }
