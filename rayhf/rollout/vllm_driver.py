"""vLLM behind the loop: waves become vLLM requests, one per seed; finished requests become
completions.

In: waves, snapshots and probes, on the loop's thread only. Out: completions with the log-probs of
the distribution that was sampled from. This is the file that imports vLLM and translates its
errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rayhf.config.schema import RolloutConfig
from rayhf.errors import ConfigError, NumericalError, RayhfError, StaleWeightsError, WeightSyncError
from rayhf.rollout.env import Device
from rayhf.rollout.loop import Result, Wave
from rayhf.rollout.vllm_worker import BACKEND
from rayhf.types import Completion, GenerateRequest, Probe, Sampling, WeightSnapshot
from rayhf.weights.broadcast import Rendezvous
from rayhf.weights.buckets import checkpoint_shapes, snapshot_checksum

CPU_KV_CACHE_GIB = 0.25
CPU_BATCHED_TOKENS = 16384
_UNCHECKED = 0.01
"""Of a GPU's memory."""


@dataclass(eq=False)
class _Running:
    """A wave whose requests are in the engine."""

    wave: Wave
    outputs: list[list[RequestOutput | None]]
    """One slot per request and seed."""
    missing: int
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
        sleeps: bool,
    ) -> None:
        self.llm = _build(
            model,
            config,
            dtype=dtype,
            max_length=max_length,
            seed=seed,
            device=device,
            sleeps=sleeps,
        )
        self._engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.stop_token_ids = stop_token_ids(model, self.tokenizer.eos_token_id)
        hf_config = self._engine.model_config.hf_text_config
        self.shapes = checkpoint_shapes(
            model, tied=bool(getattr(hf_config, "tie_word_embeddings", False))
        )
        self.tokens = 0
        self.version = 0
        self.damage: str | None = None
        """Why the weights are undefined; None while they are fine."""
        self.asleep: Literal["no", "keeping", "empty"] = "no"
        """keeping: the weights wait in host memory; empty: it has none until the next load."""
        self._requests: dict[str, tuple[_Running, int, int]] = {}
        self._count = 0
        init = {"names": frozenset(self.shapes), "directory": model}
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init})

    def held_version(self) -> int:
        """Raises WeightSyncError where the weights are undefined or asleep."""
        self.check_sound()
        if self.asleep != "no":
            raise WeightSyncError("this rollout engine is asleep; wake it first")
        return self.version

    def check_sound(self) -> None:
        """Raises WeightSyncError where the weights are undefined."""
        if self.damage is not None:
            raise WeightSyncError(
                f"this rollout engine holds no usable weights: {self.damage}; start a new one"
            )

    def admit(self, wave: Wave) -> None:
        """Add every request of the wave, in order; lengths and token ids were checked before it was
        queued."""
        if wave.version != self.held_version():
            raise StaleWeightsError(
                f"asked to write with weights {wave.version}, this engine holds weights {self.version}"
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
        self._engine.abort_request(list(self._requests))
        self._requests.clear()

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values. Raises WeightSyncError where vLLM declines (it returns
        False)."""
        if not self.llm.reset_prefix_cache():
            raise WeightSyncError("vLLM did not reset its prefix cache: requests are running")

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU's memory back: keys and values are forgotten, weights go to host memory or
        are forgotten too.

        vLLM calls that level 1 and 2. Nothing may be running.
        """
        self.llm.sleep(level=1 if keep_weights else 2)
        self.asleep = "keeping" if keep_weights else "empty"

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory again for one part; the engine is awake once it has both. Nothing where it is
        awake."""
        if self.asleep != "no" and self.llm.wake_up(tags=[part]):
            self.asleep = "no"

    def join_broadcast(self, meeting: Rendezvous, first: int) -> None:
        """All workers join the learner's group, from place `first` on."""
        self.llm.collective_rpc("join_broadcast", args=(meeting, first))

    def load(self, snapshot: WeightSnapshot, payloads: list[Any]) -> str:
        """One update session; the checksum of what was loaded. The weights are undefined if this
        raises."""
        rpc, checksum = self.llm.collective_rpc, snapshot.checksum
        rpc("start_weight_update")
        if snapshot.transport == "broadcast":
            received = rpc("receive_broadcast", args=(snapshot.version, snapshot.buckets))
            checksum = snapshot_checksum(received[0])
            if any(snapshot_checksum(buckets) != checksum for buckets in received):
                raise WeightSyncError(
                    f"this engine's workers received different weights {snapshot.version}"
                )
        else:
            for bucket, payload in zip(snapshot.buckets, payloads, strict=True):
                rpc(
                    "update_weights", kwargs={"update_info": {"bucket": bucket, "payload": payload}}
                )
        rpc("finish_weight_update")
        self.reset_prefix_cache()
        return checksum

    def probe_logprobs(self, probe: Probe) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probs of the probe's tokens under the engine, temperature 1, shape (len(token_ids) -
        1,)."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request("probe", {"prompt_token_ids": list(probe.token_ids)}, params)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        # The first position has no log-prob, every other one has one value: its own token's.
        return np.asarray(outputs[0].prompt_logprobs.logprobs, dtype=np.float64)

    def _params(self, sampling: Sampling, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            stop_token_ids=self.stop_token_ids,
            # vLLM decodes token by token, which only stop strings need; _completions decodes once.
            detokenize=bool(sampling.stop),
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
            for index, output in enumerate(outputs):
                assert output is not None
                completion = _completion(request, index, output, next(texts), self.version)
                if not all(map(math.isfinite, completion.logprobs)):
                    return NumericalError(
                        f"weights of version {self.version} give a non-finite log-prob for prompt {request.prompt_id}"
                    )
                completions.append(completion)
            result.append(tuple(completions))
        return result


def _completion(
    request: GenerateRequest, index: int, output: RequestOutput, text: str, version: int
) -> Completion:
    row = output.outputs[0]
    reason: Any = row.finish_reason
    logprobs: Any = row.logprobs
    if reason not in ("stop", "length"):
        raise RayhfError(
            f"vLLM ended prompt {request.prompt_id} with {reason!r}, expected 'stop' or 'length'"
        )
    return Completion(
        prompt_id=request.prompt_id,
        index=index,
        seed=request.seeds[index],
        text=text,
        token_ids=tuple(row.token_ids),
        logprobs=tuple(logprobs.logprobs),
        finish_reason=reason,
        policy_version=version,
    )


def stop_token_ids(model: Path, eos_token_id: int | None) -> list[int]:
    """End-of-turn tokens: the tokenizer's and those of generation_config.json (a chat model often
    has several)."""
    ids = set() if eos_token_id is None else {eos_token_id}
    file = model / "generation_config.json"
    if file.exists():
        listed = json.loads(file.read_text()).get("eos_token_id")
        ids.update([listed] if isinstance(listed, int) else listed or [])
    if not ids:
        raise ConfigError(
            f"policy.model: neither the tokenizer nor generation_config.json of {model} names an EOS token"
        )
    return sorted(ids)


def _build(
    model: Path,
    config: RolloutConfig,
    *,
    dtype: str,
    max_length: int,
    seed: int,
    device: Device,
    sleeps: bool,
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
        # Temperature, top-k and top-p applied: the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        # Sampling comes from the request alone, not from defaults that ship with a checkpoint.
        "generation_config": "vllm",
        "enable_prefix_caching": config.prefix_caching is not False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if device == "cpu":
        # A prompt that is prefilled in parts makes vLLM 0.32 rewind the generators of seeded
        # requests, which CPU generators cannot: the engine would die. So prompts go in whole, and
        # the step must have room for the longest. What is cached comes in whole blocks: the
        # smallest that the CPU kernels take, at the same speed as vLLM's 128.
        settings |= {
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_length, CPU_BATCHED_TOKENS),
        }
    else:
        settings |= {
            # With a cache of a given size this decides nothing, but vLLM would still want so much
            # to be free at the start.
            "gpu_memory_utilization": config.memory_fraction
            if kv_cache_gib is None
            else _UNCHECKED,
            "tensor_parallel_size": config.tensor_parallel,
            "enable_sleep_mode": sleeps,
        }
        if config.tensor_parallel > 1:
            # Left alone, vLLM would see Ray's placement group and ask it for workers in a bundle
            # that this actor fills.
            settings["distributed_executor_backend"] = "mp"
    try:
        return LLM(str(model), **settings)
    except ValueError as error:
        raise ConfigError(
            f"vLLM refuses {model} with the settings of section rollout: {error}"
        ) from error
