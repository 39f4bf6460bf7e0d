"""A new process for a test's work on the GPU.

DeepSpeed and vLLM choose their device at import, and a process frees all its GPU memory only when
it ends.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from rayhf.rollout.env import engine_env


@contextmanager
def process() -> Iterator[Callable[..., Any]]:
    """Yield a function that calls functions in one new process, one after the other."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call one function in a new process."""
    with process() as call:
        return call(function, *args)


def _prepare() -> None:
    """Undo what other tests may have set for engines on CPU."""
    for name in ("DS_ACCELERATOR", *engine_env("cpu")):
        os.environ.pop(name, None)
    os.environ.update(engine_env("gpu"))
