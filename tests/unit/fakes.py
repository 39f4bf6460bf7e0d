"""Roles in a few lines each, for tests that need no engine.

`CONFORMS` at the end is for mypy: every fake fits the protocol of its role.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.data.chat import Chat
from rayhf.errors import StaleWeightsError
from rayhf.losses.base import Loss
from rayhf.monitoring.observer import Observer
from rayhf.roles import Learner, Progress, Reference, Rollout, Scorer, no_progress
from rayhf.run_dir.state import CheckpointState
from rayhf.types import (
    Batch,
    Compared,
    Comparison,
    Completion,
    Failed,
    FloatArray,
    GenerateRequest,
    Invalid,
    Message,
    Outcome,
    Probe,
    Prompt,
    Row,
    Scored,
    ScoreRequest,
    TopLogprobs,
    WeightSnapshot,
    float_array,
    token_array,
)


def make_prompts(n: int) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p{i:03d}",
            messages=({"role": "user", "content": str(i)},),
            token_ids=(1, i + 2),
            reference_answer=str(i),
        )
        for i in range(n)
    ]


def checkpoint_state(iteration: int, **packages: str) -> CheckpointState:
    """Return a controller's state without content."""
    return CheckpointState(
        iteration=iteration,
        versions={},
        algorithm={},
        scorer={},
        prompts="",
        pairs=None,
        inputs={},
        config={},
        packages=packages,
    )


class FakeRollout:
    """Three random tokens per seed; calls take up to `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        self.version = 0
        self.delay = delay
        self.calls: list[list[tuple[str, int]]] = []
        """(prompt id, request number) of every request, by call."""
        self.running = 0
        """Calls in progress."""
        self.busy_at_update = 0
        """Largest number of calls in progress at any update."""
        self.verified: list[int] = []
        """Version at every comparison with the learner."""

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        if version != self.version:
            raise StaleWeightsError(f"engine holds {self.version}, asked for {version}")
        self.calls.append([(r.prompt_id, r.number) for r in requests])
        self.running += 1
        await asyncio.sleep(self.delay * random.random())
        self.running -= 1
        return [
            tuple(self._complete(r, i, seed) for i, seed in enumerate(r.seeds)) for r in requests
        ]

    def _complete(self, request: GenerateRequest, index: int, seed: int) -> Completion:
        tokens = tuple(random.Random(seed).randrange(2, 50) for _ in range(3))
        return Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=seed,
            text=" ".join(map(str, tokens)),
            token_ids=token_array(tokens),
            logprobs=float_array((-1.0, -2.0, -0.5)),
            finish_reason="stop",
            policy_version=self.version,
        )

    async def verify(self, probe: Probe) -> None:
        self.verified.append(self.version)

    async def update(self, snapshot: WeightSnapshot) -> None:
        self.busy_at_update = max(self.busy_at_update, self.running)
        self.version = snapshot.version


class FakeScorer:
    """Scores the share of even tokens; `outcome` replaces every score and comparison."""

    def __init__(self, outcome: Scored | Invalid | Failed | None = None) -> None:
        self.outcome = outcome

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        await asyncio.sleep(0)
        return [
            tuple(
                self.outcome or Scored(value=sum(t % 2 == 0 for t in c.token_ids) / 3)
                for c in r.completions
            )
            for r in requests
        ]

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """First tokens modulo 3 play rock, paper, scissors."""
        await asyncio.sleep(0)
        if isinstance(self.outcome, Invalid | Failed):
            return [self.outcome for _ in requests]
        return [
            Compared(win=_wins([c.token_ids[0] % 3 for c in r.completions]), source="pairwise")
            for r in requests
        ]

    async def state_dict(self) -> dict[str, Any]:
        return {"calls": 1}

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state == {"calls": 1}


def _wins(shapes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    win_by_difference = {0: 0.5, 1: 0.9, 2: 0.1}
    return np.array([[win_by_difference[(a - b) % 3] for b in shapes] for a in shapes])


class FakeChat(Chat):
    """A conversation is its text's characters; a completion ends with token 1."""

    def __init__(self) -> None:
        self.max_length = 64

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(2 + ord(c) % 40 for m in messages for c in m["content"])

    def render_given(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self.render(messages)

    def encode_generated(self, messages: Sequence[Message], text: str) -> tuple[int, ...]:
        return self.encode_response(messages, text)

    def encode_response(self, messages: Sequence[Message], text: str) -> tuple[int, ...]:
        return (*(2 + ord(c) % 40 for c in text), 1)

    def text(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


class FakeReference:
    """Log-probs of -1; under another model minus its steps (FakeLearner). Remembers its updates."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, float]] = []
        """(version, mix) of every update."""

    async def logprobs(
        self, rows: Sequence[Row], *, temperature: float, model: Path | None = None
    ) -> list[FloatArray]:
        value = -1.0 if model is None else -float((model / "steps").read_text())
        return [np.full(len(row.response_ids), value, dtype=np.float32) for row in rows]

    async def top_logprobs(
        self, rows: Sequence[Row], *, temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        return [
            TopLogprobs(
                sampled=values,
                top_ids=np.tile(np.arange(top_k, dtype=np.int32), (len(values), 1)),
                top=np.full((len(values), top_k), -2.0, dtype=np.float32),
            )
            for values in await self.logprobs(rows, temperature=temperature)
        ]

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        assert snapshot.transport == "object_store"
        self.updates.append((snapshot.version, mix))

    async def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "reference.json").write_text(json.dumps(self.updates))

    async def load(self, directory: Path) -> None:
        updates = json.loads((directory / "reference.json").read_text())
        self.updates = [(version, mix) for version, mix in updates]


class FakeLearner:
    """Counts its steps, which are its whole state; fails at step `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps = 0
        self.batches: list[Batch] = []
        self.fail_at = fail_at

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        if self.steps == self.fail_at:
            raise RuntimeError("killed")
        self.steps += 1
        self.batches.append(batch)
        rows = [row for e in batch.examples for row in e.rows]
        return {
            "learner/loss": float(sum(sum(r.response_ids) for r in rows)),
            "learner/grad_norm": 1.0,
            "value/return_mean": 1.0,
            "value/return_square": 2.0,
            "value/error_mean": 0.0,
            "value/error_square": 0.5,
        }

    async def outputs(
        self, rows: Sequence[Row], *, temperature: float, progress: Progress = no_progress
    ) -> list[FloatArray]:
        return [np.zeros(len(row.response_ids), dtype=np.float32) for row in rows]

    async def probe(self) -> Probe:
        return Probe(token_ids=(), logprobs=())

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        return WeightSnapshot(
            version=version,
            buckets=(),
            checksum="",
            probe=Probe(token_ids=(), logprobs=()),
            transport="object_store" if stored else "broadcast",
        )

    async def sync_metrics(self) -> dict[str, float]:
        return {"sync/changed_fraction": 1.0}

    async def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "steps").write_text(str(self.steps))

    async def load(self, directory: Path) -> None:
        self.steps = int((directory / "steps").read_text())

    async def export(self, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        (directory / "steps").write_text(str(self.steps))


class SilentObserver:
    """An observer that does nothing."""

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None: ...

    def metrics(self, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, message: str) -> None: ...


CONFORMS: tuple[Rollout, Scorer, Reference, Learner, Observer] = (
    FakeRollout(),
    FakeScorer(),
    FakeReference(),
    FakeLearner(),
    SilentObserver(),
)
