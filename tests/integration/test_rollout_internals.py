"""vLLM's internals have the names and signatures that rayhf.rollout.vllm_internals relies on.

That they behave as expected is what test_rollout_updates.py and test_rollout_adapters.py show.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayhf.rollout.env import engine_env

os.environ.update(engine_env("cpu", 1))

from vllm import LLM
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.outputs import WeightVersionSpan
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker import utils
from vllm.v1.worker.cpu_worker import CPUWorker

from rayhf.rollout.vllm_internals import MEMORY_SHORTAGES
from rayhf.rollout.vllm_worker import BucketTransfer


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (CPUWorker.init_weight_transfer_engine, ["self", "init_info"]),
        (CPUWorker.start_weight_update, ["self"]),
        (CPUWorker.update_weights, ["self", "update_info"]),
        (CPUWorker.finish_weight_update, ["self"]),
        (WeightTransferEngine.receive_weights, ["self", "update_info"]),
        (reload.initialize_layerwise_reload, ["model"]),
        (get_layerwise_info, ["layer"]),
        (reload.finalize_layerwise_processing, ["model", "model_config"]),
        (LLMEngine.step, ["self"]),
        (LLMEngine.has_unfinished_requests, ["self"]),
        (LLM.reset_prefix_cache, ["self", "reset_running_requests", "reset_connector"]),
        (LLMEngine.set_weight_version, ["self", "weight_version"]),
        (Scheduler.set_pause_state, ["self", "pause_state"]),
        (BlockPool.get_num_free_blocks, ["self"]),
        (create_request_queue, ["policy"]),
    ],
)
def test_signatures(function: Callable[..., object], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_every_abstract_method_of_a_transfer_is_implemented() -> None:
    assert not BucketTransfer.__abstractmethods__


def test_attributes_exist() -> None:
    assert callable(InprocClient.shutdown) and callable(LLM.collective_rpc)
    assert list(inspect.signature(LLMEngine.abort_request).parameters)[:2] == [
        "self",
        "request_ids",
    ]
    assert "logprobs" in FlatLogprobs.__dataclass_fields__
    assert {"version", "start"} <= WeightVersionSpan.__dataclass_fields__.keys()


def test_errors_about_gpu_memory_have_the_texts_that_they_are_known_by() -> None:
    # Not imported: its imports need CUDA.
    gpu_worker = Path(inspect.getfile(CPUWorker)).with_name("gpu_worker.py").read_text()
    sources = "".join([inspect.getsource(kv_cache_utils), inspect.getsource(utils), gpu_worker])
    for text in MEMORY_SHORTAGES:
        assert text in sources, text
