"""The pool of references without Ray: chunks, lost members, and the weights of a replacement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from fake_actor import FakeRef, finished, no_process

from actors.process import ProcessInfo
from actors.reference import ReferenceActor, ReferencePool, plan_chunks
from actors.supervise import SupervisedActor, SupervisionLimits
from rayhf.errors import ActorLostError, StateLostError
from rayhf.types import FloatArray, Probe, Row, WeightBucket, WeightSnapshot, token_array


class Weight:
    """A reference engine with one weight, which is also every log-prob."""

    packing: Literal["tree"] = "tree"

    def __init__(self) -> None:
        self.weight = np.float32(1.0)
        self.average: dict[str, Any] = {}
        self.chunks: list[list[int]] = []
        """First response tokens of each chunk's rows."""

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: Path | None
    ) -> list[FloatArray]:
        self.chunks.append([int(row.response_ids[0]) for row in rows])
        weight = self.weight if model is None else np.float32((model / "weight").read_text())
        return [np.full(len(row.response_ids), weight * row.response_ids[0]) for row in rows]

    def update(self, buckets: Sequence[tuple[WeightBucket, Any]], *, mix: float) -> None:
        for _, payload in buckets:
            new = np.float32(payload)
            self.weight = (
                new if mix == 1 else np.float32(mix) * new + np.float32(1 - mix) * self.weight
            )
        self.average = {} if mix == 1 else {"w": SimpleNamespace(numpy=lambda w=self.weight: w)}

    def restore(self, average: dict[str, Any]) -> None:
        self.weight = average["w"]
        self.average = {"w": SimpleNamespace(numpy=lambda w=self.weight: w)}

    def save(self, directory: Path) -> None:
        (directory / "weight").write_text(repr(float(self.weight)))

    def load(self, directory: Path) -> None:
        self.weight = np.float32((directory / "weight").read_text())


class Life:
    """Handle of an actor that runs each call at once, until it is dead."""

    def __init__(self) -> None:
        self.actor = ReferenceActor()
        self.actor.engine = Weight()  # type: ignore[assignment]
        self.actor.epoch_guard = SimpleNamespace(check=lambda: None)  # type: ignore[assignment]
        self.actor.updates = 0
        self.dead = False
        self.dies_at: str | None = None
        """Name of the method whose next call kills the actor, after it has run."""
        self.hangs = False

    @property
    def weight(self) -> float:
        return float(self.actor.engine.weight)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: Sequence[Any]) -> FakeRef:
        if name == "process_info":
            return finished(ProcessInfo("node", 0, 0.0))
        ref = FakeRef()
        if self.dead:
            ref.result.set_exception(ActorLostError(f"{name}: it died"))
        elif not self.hangs:
            self._run(ref, name, arguments)
        if name == self.dies_at:
            self.dead = True
            ref = FakeRef()
            ref.result.set_exception(ActorLostError(f"{name}: it died"))
        return ref

    def _run(self, ref: FakeRef, name: str, arguments: Sequence[Any]) -> None:
        try:
            values = [a.result.result() if isinstance(a, FakeRef) else a for a in arguments]
            ref.result.set_result(getattr(self.actor, name)(*values))
        except ActorLostError as error:
            ref.result.set_exception(error)


class Pool:
    """A ReferencePool and all lives of its members."""

    def __init__(self, replicas: int, *, restarts: int = 5, timeout_s: float = 5.0) -> None:
        self.lives: list[list[Life]] = [[] for _ in range(replicas)]
        limits = SupervisionLimits(stall_s=60.0, restarts=restarts)
        self.members = [
            SupervisedActor(f"reference {i}", self._creator(i), limits=limits, terminate=no_process)
            for i in range(replicas)
        ]
        self.timeout_s = timeout_s

    def _creator(self, member: int) -> Callable[[], Any]:
        def create() -> Life:
            self.lives[member].append(Life())
            return self.lives[member][-1]

        return create

    async def start(self) -> ReferencePool:
        for member in self.members:
            await member.start()
        return ReferencePool(self.members, token_budget=64, timeout_s=self.timeout_s)

    def weights(self) -> list[float]:
        return [lives[-1].weight for lives in self.lives]

    def chunks(self) -> list[list[int]]:
        engines: list[Any] = [life.actor.engine for lives in self.lives for life in lives]
        return sorted(chunk for engine in engines for chunk in engine.chunks)


def new_weights(value: float) -> WeightSnapshot:
    buckets = (WeightBucket(tensors=(), payload=np.float32(value), checksum=""),)
    probe = Probe(token_ids=(), logprobs=())
    return WeightSnapshot(version=1, buckets=buckets, checksum="", probe=probe)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Return rows of which up to three have one prompt; the first response token is the index."""
    rng = np.random.default_rng(seed)
    prompts = [token_array(rng.integers(0, 50, rng.integers(1, 30))) for _ in range(count)]
    return [
        Row(
            prompt_id=f"p{i // 3}",
            sample=i,
            prompt_ids=prompts[i // 3],
            response_ids=token_array((i, *rng.integers(0, 50, rng.integers(0, 40)))),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("packing", ["tree", "rows", "off"])
def test_chunk_is_one_forward_pass_of_the_engine(packing: Any) -> None:
    for seed in range(20):
        rows = make_rows(25, seed)
        chunks = plan_chunks(rows, packing, 64)
        assert sorted(i for chunk in chunks for i in chunk) == list(range(25))
        for chunk in chunks:
            again = plan_chunks([rows[i] for i in chunk], packing, 64)
            assert [sorted(each) for each in again] == [list(range(len(chunk)))]


def test_chunks_do_not_depend_on_the_number_of_replicas() -> None:
    rows = make_rows(25)

    async def scenario(replicas: int) -> tuple[list[list[int]], list[int]]:
        pool = Pool(replicas)
        reference = await pool.start()
        logprobs = await reference.logprobs(rows, temperature=1.0)
        assert [values.tolist() for values in logprobs] == [
            [i] * len(row.response_ids) for i, row in enumerate(rows)
        ]
        counts = await reference.take_counts()
        assert counts["reference/chunks"] == len(pool.chunks())
        used = [sum(len(life.actor.engine.chunks) for life in lives) for lives in pool.lives]  # type: ignore[attr-defined]
        return pool.chunks(), used

    (alone, _), (shared, used) = asyncio.run(scenario(1)), asyncio.run(scenario(3))
    assert alone == shared and len(alone) > 5 and all(used)


def test_late_chunk_and_its_actor_are_named() -> None:
    async def scenario() -> None:
        pool = Pool(2, restarts=0, timeout_s=0.05)
        reference = await pool.start()
        await reference.logprobs(make_rows(1), temperature=1.0)
        pool.lives[1][0].hangs = True
        await reference.logprobs(make_rows(9), temperature=1.0)

    with pytest.raises(
        ActorLostError,
        match=r"reference 1 was lost 1 times .*: reference log-probs, chunk \d of \d: no response "
        r"from reference 1 within 0.05 s",
    ):
        asyncio.run(scenario())


@pytest.mark.parametrize("dies_at", ["logprobs", "update"])
@pytest.mark.parametrize("history", ["", "p", "e", "pe", "ee", "pep", "le", "lee", "l"])
def test_replacement_has_the_weights_of_the_others(
    tmp_path: Path, history: str, dies_at: str
) -> None:
    """History: p replaces the weights, e mixes them, l loads a checkpoint."""
    (tmp_path / "weight").write_text("0.7")

    async def scenario(lost: int | None) -> list[float]:
        pool = Pool(2)
        reference = await pool.start()
        for number, event in enumerate(history):
            last = number == len(history) - 1
            if lost is not None and last and dies_at == "update":
                pool.lives[lost][0].dies_at = "update"
            if event == "l":
                await reference.load(tmp_path)
            else:
                mix = 1.0 if event == "p" else 0.3
                await reference.update(new_weights(3.3 + number), mix=mix)
        if lost is not None and dies_at == "logprobs":
            pool.lives[lost][0].dead = True
        other = await reference.logprobs(make_rows(9), temperature=1.0, model=tmp_path)
        assert other[8][0] == np.float32(0.7) * 8
        logprobs = await reference.logprobs(make_rows(9), temperature=1.0)
        died = lost is not None and (dies_at == "logprobs" or history[-1:] in ("p", "e"))
        assert len(pool.lives[lost or 0]) == 1 + died
        return [*pool.weights(), *map(float, logprobs[8])]

    expected = asyncio.run(scenario(None))
    assert expected[0] == expected[1]
    assert asyncio.run(scenario(0)) == asyncio.run(scenario(1)) == expected


def test_checkpoint_that_is_not_kept_any_more_is_a_named_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = Pool(1)
        reference = await pool.start()
        directory = tmp_path / "iteration-000001"
        directory.mkdir()
        (directory / "weight").write_text("2.0")
        await reference.load(directory)
        (directory / "weight").unlink()
        directory.rmdir()
        pool.lives[0][0].dead = True
        await reference.logprobs(make_rows(1), temperature=1.0)

    with pytest.raises(StateLostError, match="checkpoint of its weights is not kept any more"):
        asyncio.run(scenario())


def test_average_that_nothing_has_any_more_is_a_named_error() -> None:
    async def scenario(replicas: int) -> None:
        pool = Pool(replicas)
        reference = await pool.start()
        await reference.update(new_weights(2.0), mix=0.5)
        for lives in pool.lives:
            lives[0].dead = True
        try:
            await reference.logprobs(make_rows(1), temperature=1.0)
        finally:
            assert len(pool.lives[0]) == 2  # it is not tried again

    with pytest.raises(StateLostError, match=r"moving average .*reference\.replicas is 1"):
        asyncio.run(scenario(1))
    with pytest.raises(StateLostError, match="and so was every other replica: average: it died"):
        asyncio.run(scenario(2))
