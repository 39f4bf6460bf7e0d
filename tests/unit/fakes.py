"""Roles in a few lines each: what a loop needs of an engine, without the engine."""

from __future__ import annotations

import asyncio
import json
import random

import numpy as np

from rayhf.errors import StaleWeightsError
from rayhf.run_dir.state import CheckpointState
from rayhf.types import Compared, Completion, Probe, Prompt, Scored, WeightSnapshot


def make_prompts(n: int) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p{i:03d}",
            messages=({"role": "user", "content": str(i)},),
            token_ids=(1, i + 2),
            answer=str(i),
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
        config={},
        packages=packages,
    )


class FakeRollout:
    """Three random tokens per seed; `delay` makes some answers late."""

    def __init__(self, delay: float = 0.0) -> None:
        self.version, self.delay, self.calls, self.running, self.busy_at_update = 0, delay, [], 0, 0

    async def generate(self, requests, *, version):
        if version != self.version:
            raise StaleWeightsError(f"engine holds {self.version}, asked for {version}")
        self.calls.append([(r.prompt_id, r.number) for r in requests])
        self.running += 1
        await asyncio.sleep(self.delay * random.random())
        self.running -= 1
        return [
            tuple(self._complete(r, i, seed) for i, seed in enumerate(r.seeds)) for r in requests
        ]

    def _complete(self, request, index, seed):
        tokens = tuple(random.Random(seed).randrange(2, 50) for _ in range(3))
        return Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=seed,
            text=" ".join(map(str, tokens)),
            token_ids=tokens,
            logprobs=(-1.0, -2.0, -0.5),
            finish_reason="stop",
            policy_version=self.version,
        )

    async def update(self, snapshot):
        self.busy_at_update = max(self.busy_at_update, self.running)
        self.version = snapshot.version


class FakeScorer:
    """The share of even tokens; `outcome` overrides it."""

    def __init__(self, outcome=None) -> None:
        self.outcome = outcome

    async def score(self, requests):
        await asyncio.sleep(0)
        return [
            tuple(
                self.outcome or Scored(value=sum(t % 2 == 0 for t in c.token_ids) / 3)
                for c in r.completions
            )
            for r in requests
        ]

    async def compare(self, requests):
        """First tokens modulo 3 play rock, paper, scissors."""
        await asyncio.sleep(0)
        if self.outcome is not None:
            return [self.outcome for _ in requests]
        return [
            Compared(win=self._play([c.token_ids[0] % 3 for c in r.completions]), source="pairwise")
            for r in requests
        ]

    @staticmethod
    def _play(kinds):
        table = {0: 0.5, 1: 0.9, 2: 0.1}
        return np.array([[table[(a - b) % 3] for b in kinds] for a in kinds])

    async def state_dict(self):
        return {"calls": 1}

    async def load_state_dict(self, state):
        assert state == {"calls": 1}


class FakeChat:
    """A conversation is its text's characters; an answer ends with token 1."""

    max_length = 64

    def render(self, messages):
        return tuple(2 + ord(c) % 40 for m in messages for c in m["content"])

    def answer(self, messages, text):
        return (*(2 + ord(c) % 40 for c in text), 1)

    def text(self, token_ids):
        return " ".join(map(str, token_ids))


class FakeReference:
    def __init__(self) -> None:
        self.updates = []

    async def logprobs(self, rows, *, temperature):
        return [np.full(len(row.response_ids), -1.0, dtype=np.float32) for row in rows]

    async def update(self, snapshot, *, mix):
        assert snapshot.transport == "object_store"
        self.updates.append((snapshot.version, mix))

    async def save(self, directory):
        directory.mkdir(parents=True)
        (directory / "reference.json").write_text(json.dumps(self.updates))

    async def load(self, directory):
        self.updates = [tuple(u) for u in json.loads((directory / "reference.json").read_text())]


class FakeLearner:
    """Counts; its whole state is a number."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps, self.batches, self.fail_at = 0, [], fail_at

    async def step(self, batch, loss):
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

    async def outputs(self, rows, *, temperature):
        return [np.zeros(len(row.response_ids), dtype=np.float32) for row in rows]

    async def publish(self, version, *, stored=False):
        probe, way = Probe(token_ids=(), logprobs=()), "object_store" if stored else "broadcast"
        return WeightSnapshot(version=version, buckets=(), checksum="", probe=probe, transport=way)

    async def save(self, directory):
        directory.mkdir(parents=True)
        (directory / "steps").write_text(str(self.steps))

    async def load(self, directory):
        self.steps = int((directory / "steps").read_text())

    async def export(self, directory):
        (directory / "config.json").write_text("{}")


class Quiet:
    """An observer that looks away."""

    def phase(self, iteration, name, done=0, total=0):
        return None

    def metrics(self, metrics):
        return None

    def event(self, kind, message):
        return None
