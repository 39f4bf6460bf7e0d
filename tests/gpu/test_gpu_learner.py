"""The learner on one CUDA device: it learns, computes what it computes on CPU, and leaves the
device when it sleeps.

Not run on a GPU yet: none was at hand. Written against torch 2.13 and deepspeed 0.19.8; what does
not ask for CUDA's memory was run with device "cpu".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import alone
from gpu_learner import LARGE, SMALL, learn, start

from tests.bench.random_llama import make_rows, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MEAN, LARGEST = 1e-5, 1e-3
"""Float32 log-probs of two devices may be so far apart, in nats; two implementations on CPU differ
by about 1e-6 on average."""
MEAN_BFLOAT16 = 0.05
"""On CPU bfloat16 is 0.01 away from float32 with these weights."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    write_model(SMALL, directory, seed=0, device="cpu")
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    write_model(LARGE, directory, seed=0, device="cpu")
    return directory


def losses(model: Path, device: str) -> list[float]:
    engine = start(model, device, dtype="bfloat16", zero_stage=2, activation_checkpointing=True)
    return learn(engine, SMALL, 10)


def test_bfloat16_with_zero_2_and_checkpointing_learns(small: Path) -> None:
    found = alone(losses, small, "cuda")
    assert found[-1] < found[0] - 0.2, found


def logprobs(model: Path, device: str, dtype: str) -> Any:
    return np.concatenate(start(model, device, dtype=dtype).outputs(make_rows(SMALL, seed=1), 0.7))


def test_log_probs_are_those_of_the_cpu(small: Path) -> None:
    expected = alone(logprobs, small, "cpu", "float32")
    exact = np.abs(alone(logprobs, small, "cuda", "float32") - expected)
    assert exact.mean() < MEAN and exact.max() < LARGEST, (exact.mean(), exact.max())
    rough = np.abs(alone(logprobs, small, "cuda", "bfloat16") - expected)
    assert rough.mean() < MEAN_BFLOAT16, rough.mean()


def sleep(model: Path, config: dict[str, Any]) -> tuple[float, float]:
    """The share of its memory that a sleeping learner keeps, and how much of it the device has
    back."""
    import torch

    engine = start(model, "cuda", **config)
    first = learn(engine, LARGE, 2)
    rows = make_rows(LARGE, seed=2)[:4]
    expected = engine.outputs(rows, 1.0)
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    engine.sleep()
    asleep, given = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0] - free
    engine.wake()
    assert torch.cuda.memory_allocated() >= 0.95 * before
    for mine, theirs in zip(engine.outputs(rows, 1.0), expected, strict=True):
        np.testing.assert_array_equal(
            mine, theirs
        )  # the same bits: a forward pass on the same device, nothing was lost
    assert learn(engine, LARGE, 1)[0] < first[0]
    return asleep / before, given / before


@pytest.mark.parametrize(
    "config",
    [
        {"zero_stage": 0, "dtype": "float32"},
        {"zero_stage": 2, "dtype": "bfloat16"},
        {"zero_stage": 3, "dtype": "bfloat16"},
    ],
)
def test_a_sleeping_learner_gives_its_memory_back(large: Path, config: dict[str, Any]) -> None:
    kept, given = alone(sleep, large, {**config, "token_budget": LARGE.budget})
    assert kept < 0.05, kept
    assert given > 0.9, given
