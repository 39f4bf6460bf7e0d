"""Ranks and models that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ranks import Ranks, make_model

if TYPE_CHECKING:
    from engines import Start
    from transformers import Qwen2ForCausalLM

    from rayhf.rollout.engine import RolloutEngine


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), tied=False, kind="llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without biases: a key bias has (almost) no gradient, and Adam makes full steps out of its
    rounding errors."""
    return make_model(tmp_path_factory.mktemp("tied_llama"), tied=True, kind="llama")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return a function that starts engines; they are closed after the module."""
    # Imported here: it prepares the process for vLLM, which the learner's tests must not have.
    from engines import build

    with ExitStack() as ends:

        def one_more(
            *,
            tied: bool = False,
            dtype: str = "float32",
            tensor_parallel: int = 1,
            scaled_logprobs: bool = False,
            isolates_waves: bool = False,
            **rollout: Any,
        ) -> Any:
            engine, model = build(
                tmp_path_factory.mktemp("model"),
                tied=tied,
                dtype=dtype,
                tensor_parallel=tensor_parallel,
                scaled_logprobs=scaled_logprobs,
                isolates_waves=isolates_waves,
                **rollout,
            )
            ends.callback(engine.close)
            return engine, model

        yield one_more


@pytest.fixture(scope="module")
def shared(start: Start) -> tuple[RolloutEngine, Qwen2ForCausalLM]:
    """Return an engine that keeps version 0 throughout, and its model."""
    return start()


@pytest.fixture
def engine(shared: tuple[RolloutEngine, Qwen2ForCausalLM]) -> RolloutEngine:
    return shared[0]
