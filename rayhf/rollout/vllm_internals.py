"""vLLM's internals that rayhf relies on, all in this file; read from vllm 0.32.

Out for the driver: facts of a loaded engine, and the calls of a weight update. Out for the worker:
the reload of a model's layers. tests/integration/test_rollout_internals.py fails where another
version of vLLM lacks one of these names or gives it another signature.

Five things go wrong without this file:
1. CPU kernels repack weights after loading, so `model.load_weights` alone fails: the layerwise
   reload restores the original layout and repacks at the end.
2. With tied embeddings, the CPU output head keeps a packed copy that the reload does not know
   (`repack_tied_head`).
3. The CPU kernels of mixture-of-experts layers pack weights when they are built, which happens at
   the first load only (`start_reload`).
4. A router's bias is a parameter of two layers, and the reload fills it twice, the second time with
   what was never loaded (`start_reload`).
5. The prefix cache holds keys and values of the old weights: the driver resets it afterwards.

New weights while requests run need three more: the outputs of steps that are still in flight
(`outputs_in_flight`), steps without the running requests for the probe (`requests_held`), and what
a request has generated so far (`generated`). vLLM itself labels tokens with a version of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from vllm import LLM, RequestOutput
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue

from rayhf.errors import WeightSyncError
from rayhf.rollout.partials import Partial
from rayhf.types import NO_TOKENS, TokenArray, WeightBucket, float_array, token_array
from rayhf.weights.buckets import Payload
from rayhf.weights.cuda_ipc import IpcExport

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.logprobs import FlatLogprobs

ROUTER_BIAS = "e_score_correction_bias"
MEMORY_SHORTAGES = (
    "Free memory on device",
    "Error in memory profiling",
    "No available memory for the cache blocks",
    "To serve at least one request with the model's max seq len",
)
"""What vLLM's errors say where a GPU has too little memory, or its free memory changes."""
BucketBytes = Payload | torch.Tensor | IpcExport
"""A bucket's bytes in host memory or on the engine's device, or a handle to them on that device."""


# --------------------------------------------------------------------------------- for the driver


def vocabulary_size(llm: LLM) -> int:
    return int(llm.llm_engine.model_config.get_vocab_size())


def has_tied_embeddings(llm: LLM) -> bool:
    """Return whether the output head is the input embedding."""
    hf_config = llm.llm_engine.model_config.hf_text_config
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def shut_down(llm: LLM) -> None:
    """Stop the in-process engine; LLM itself has no method for it."""
    llm.llm_engine.engine_core.shutdown()


def is_memory_shortage(error: Exception) -> bool:
    """Return whether vLLM did not start because other processes hold or release GPU memory.

    It raises ValueError and AssertionError for that, and ValueError for wrong settings too.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in MEMORY_SHORTAGES
    )


def init_weight_transfer(llm: LLM, names: frozenset[str], directory: Path) -> None:
    """Set up BucketTransfer on all workers; every update must load the parameters `names`."""
    info = {"names": names, "directory": directory}
    llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})


def start_update(llm: LLM) -> None:
    llm.collective_rpc("start_weight_update")


def load_bucket(llm: LLM, bucket: WeightBucket, payload: BucketBytes) -> None:
    info = {"bucket": bucket, "payload": payload}
    llm.collective_rpc("update_weights", kwargs={"update_info": info})


def finish_update(llm: LLM) -> None:
    llm.collective_rpc("finish_weight_update")


# ---------------------------------------------------------------- for updates while requests run


def label_weights(llm: LLM, version: int) -> None:
    """Make vLLM label the tokens of all later steps with this version."""
    llm.llm_engine.set_weight_version(str(version))


def outputs_in_flight(llm: LLM) -> list[RequestOutput]:
    """Wait for steps that vLLM has started ahead, and return the requests that they finish.

    On GPU it schedules a step before it has the last one's tokens: those are of the weights that
    the step ran with, and must be counted before others are loaded. On CPU there are none.
    """
    core = _core(llm)
    outputs: list[RequestOutput] = []
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    try:
        while core.batch_queue:
            outputs += llm.llm_engine.step()
    finally:
        core.scheduler.set_pause_state(PauseState.UNPAUSED)
    return outputs


@contextmanager
def requests_held(llm: LLM) -> Iterator[None]:
    """Leave all present requests out of the steps inside the block; they keep their KV blocks.

    None of their steps may be in flight.
    """
    scheduler = _core(llm).scheduler
    running = scheduler.running
    waiting = scheduler.waiting
    scheduler.running = []
    scheduler.waiting = create_request_queue(scheduler.policy)
    try:
        yield
    finally:
        scheduler.running = running
        scheduler.waiting = waiting


def has_room(llm: LLM, tokens: int) -> bool:
    """Return whether a request of so many tokens fits into the KV cache beside the others."""
    scheduler = _core(llm).scheduler
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    blocks = groups * (-(-tokens // scheduler.block_size) + 1)
    return bool(scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > blocks)


def generated(llm: LLM, request_id: str, start: int) -> Partial:
    """Return the tokens of an unfinished request from number `start` on, with their versions."""
    processor = llm.llm_engine.output_processor
    (internal,) = processor.external_req_ids[request_id]
    state = processor.request_states[internal]
    token_ids = state.detokenizer.output_token_ids
    flat = cast("FlatLogprobs", state.logprobs_processor.logprobs)
    return Partial(
        token_ids=token_array(token_ids[start:]),
        logprobs=float_array(flat.logprobs[start:]),
        versions=_versions(state.weight_version_starts, len(token_ids))[start:],
    )


def token_versions(output: RequestOutput) -> TokenArray:
    """Return the version of every token of a finished request."""
    row = output.outputs[0]
    starts = [(span.version, span.start) for span in row.weight_versions or ()]
    return _versions(starts, len(row.token_ids))


def _versions(starts: Sequence[tuple[str, int]], count: int) -> TokenArray:
    """Return the version of each of `count` tokens from the first index of each version."""
    if not starts:
        return NO_TOKENS
    labels = [int(label) for label, _ in starts]
    ends = [*(start for _, start in starts[1:]), count]
    return token_array(np.repeat(labels, np.diff(ends, prepend=0)))


def _core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


# --------------------------------------------------------------------------------- for the worker


def start_reload(model: torch.nn.Module) -> None:
    """Restore the layers' checkpoint layout; they take weights until `finish_reload`."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if method is None or getattr(method, "moe_kernel", None) is None:
            continue
        if current_platform.is_cpu():
            method.moe_kernel = None  # built again, which packs the new weights
        bias = layer._parameters.pop(ROUTER_BIAS, None)
        if bias is not None:  # from now on an attribute here, and a parameter of the gate alone
            get_layerwise_info(layer).restore_metadata[0].pop(ROUTER_BIAS, None)
            layer.__dict__[ROUTER_BIAS] = bias
    initialize_layerwise_reload(model)


def finish_reload(model: torch.nn.Module, model_config: ModelConfig) -> None:
    """Convert the loaded layers to the layout that the kernels use."""
    finalize_layerwise_reload(model, model_config)
    repack_tied_head(model)


def repack_tied_head(model: torch.nn.Module) -> None:
    """Give a tied output head the new embedding.

    Only CPU kernels (`cpu_linear`) keep a packed copy of the head's weight.
    """
    head = getattr(model, "lm_head", None)
    tied = getattr(model.config, "tie_word_embeddings", False)
    if head is None or not hasattr(head, "cpu_linear") or not tied:
        return
    embedding = next(
        (
            module
            for module in model.modules()
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ),
        None,
    )
    if embedding is None:
        raise WeightSyncError(
            f"{type(model).__name__}: tied output head, but no input embedding of vLLM's class"
        )
    if head is not embedding:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)
