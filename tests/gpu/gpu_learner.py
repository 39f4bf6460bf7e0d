"""Learners on a CUDA device, over random Llama models."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from tests.bench.random_llama import Size, make_rows, micro_batches

SMALL = Size(
    hidden=64,
    intermediate=192,
    layers=3,
    heads=4,
    kv_heads=2,
    vocabulary=512,
    tied=True,
    longest=64,
    budget=256,
)


LARGE = Size(
    hidden=1024,
    intermediate=2816,
    layers=8,
    heads=16,
    kv_heads=4,
    vocabulary=32000,
    tied=False,
    longest=256,
    budget=2048,
)
"""156 M parameters: 2.3 GiB of weights and states, beside which CUDA's own memory is little."""


def start(model: Path, device: str, **config: Any) -> Any:
    from rayhf.config.schema import LearnerConfig
    from rayhf.learner.engine import LearnerEngine

    with socket.socket() as probe:
        probe.bind(("", 0))
        master = ("127.0.0.1", probe.getsockname()[1])
    settings = LearnerConfig(**{"token_budget": 256, **config})
    return LearnerEngine(model, settings, lr=1e-3, total_steps=1000, master=master, device=device)


def learn(engine: Any, size: Size, steps: int) -> list[float]:
    """Losses of steps over the same rows."""
    from rayhf.losses.base import Totals
    from rayhf.losses.sft import SFTLoss
    from rayhf.types import Example

    rows = make_rows(size, seed=1)
    micros = [[Example(rows=(row,)) for row in micro] for micro in micro_batches(rows, size.budget)]
    totals = Totals(
        tokens=float(sum(len(row.response_ids) for row in rows)), rows=len(rows), examples=len(rows)
    )
    return [engine.step(micros, totals, SFTLoss(), 1.0)["sft/nll"] for _ in range(steps)]
