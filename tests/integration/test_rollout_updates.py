"""New weights for a real vLLM engine: they are the learner's, or it generates nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    LONG,
    Start,
    make_request,
    mean_gap,
    payloads_of,
    perturb,
    rebuilt,
    snapshot_of,
    without_one,
)
from transformers import Qwen2ForCausalLM

from rayhf.errors import ActorLostError, StaleWeightsError, WeightSyncError
from rayhf.rollout.engine import RolloutEngine, UpdateReport
from rayhf.types import WeightSnapshot
from rayhf.weights.broadcast import Sender
from rayhf.weights.buckets import pack_bucket, snapshot_checksum


def test_update_waits_for_running_waves(start: Start) -> None:
    engine, model = start()
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    running = engine.submit([make_request(seeds=tuple(range(8)), max_tokens=100)], version=0)
    engine.update(snapshot, payloads_of(snapshot))
    assert running.done()
    assert {completion.policy_version for completion in running.result()[0]} == {0}
    with pytest.raises(StaleWeightsError, match="weights 0, this engine holds weights 1"):
        engine.generate([make_request()], version=0)


def corrupted(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    payloads = [bucket.payload.copy() for bucket in snapshot.buckets]
    payloads[1][100] ^= 1
    return snapshot, payloads


def with_one_more(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    return rebuilt(
        (*snapshot.buckets, pack_bucket([("value_head.weight", torch.ones(3))], torch.float32)),
        snapshot,
    )


def reordered(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    return replace(snapshot, buckets=snapshot.buckets[::-1]), payloads_of(snapshot)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupted, r"weight bucket .*: received checksum \w+, the learner sent \w+"),
        (without_one, ".* missing model.embed_tokens.weight; unexpected none"),
        (with_one_more, ".* missing none; unexpected value_head.weight"),
        (reordered, r"the buckets have checksum \w+, the snapshot says"),
    ],
)
def test_bad_snapshots_are_refused_before_the_engine_is_touched(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM],
    damage: Callable[[WeightSnapshot], tuple[WeightSnapshot, list[np.ndarray]]],
    message: str,
) -> None:
    engine, model = shared
    before = engine.generate([make_request()], version=0)
    with pytest.raises(
        WeightSyncError, match="weights 7 refused, weights 0 stay in place: " + message
    ):
        engine.update(*damage(snapshot_of(model, 7)))
    assert engine.weight_version == 0
    assert engine.generate([make_request()], version=0) == before


def test_wrong_weights_make_the_engine_unusable(start: Start) -> None:
    engine, model = start()
    snapshot = snapshot_of(model, 1)
    perturb(model, 1)
    sabotaged = replace(snapshot_of(model, 1), probe=snapshot.probe)
    with pytest.raises(WeightSyncError, match=r"differ by [\d.]+ nats on average \(limit 0.001\)"):
        engine.update(sabotaged, payloads_of(sabotaged))
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([make_request()], version=1)
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.update(snapshot, payloads_of(snapshot))


def test_worker_itself_detects_an_incomplete_update(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = start()
    monkeypatch.setattr("rayhf.rollout.engine.check_complete", lambda *_: None)
    with pytest.raises(
        WeightSyncError,
        match=r"failed: WeightSyncError: .* 1 parameters, model.embed_tokens.weight",
    ):
        engine.update(*without_one(snapshot_of(model, 1)))
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([make_request()], version=0)


def announced(snapshot: WeightSnapshot) -> WeightSnapshot:
    buckets = tuple(replace(bucket, payload=None, checksum="") for bucket in snapshot.buckets)
    return replace(snapshot, buckets=buckets, checksum="", transport="broadcast")


def broadcast(
    engine: RolloutEngine,
    model: Qwen2ForCausalLM,
    *,
    version: int = 1,
    sender: type[Sender] = Sender,
    buckets: int = 3,
    workers: int = 1,
) -> tuple[str, Future[UpdateReport]]:
    """Announce three buckets and send `buckets`; return their checksum and the engine's report."""
    learner = sender("127.0.0.1", members=1 + workers, timeout_s=20.0, device=torch.device("cpu"))
    snapshot = snapshot_of(model, version)
    parameters = dict(model.named_parameters())
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(engine.join_broadcast, learner.rendezvous, 1)
        learner.join()
        joined.result(20)
        report = pool.submit(engine.update, announced(snapshot))
        for bucket in snapshot.buckets[:buckets]:
            learner.send(
                version, bucket.tensors, (parameters[spec.name] for spec in bucket.tensors)
            )
        checksum = snapshot_checksum(learner.finish())
        learner.close()
    return checksum, report


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_by_broadcast_are_the_learners(start: Start, tied: bool) -> None:
    engine, model = start(tied=tied)
    for version in (1, 2):
        perturb(model, version)
        checksum, report = broadcast(engine, model, version=version)
        assert report.result().version == version and report.result().checksum == checksum
        assert report.result().gap.mean < 1e-4 and engine.fingerprint() == (version, checksum)
        (completions,) = engine.generate([make_request(LONG)], version=version)
        assert mean_gap(model, make_request(LONG), completions) <= 1e-4


@pytest.mark.timeout(300)
def test_engine_of_two_workers_takes_weights_by_each_transport(start: Start) -> None:
    engine, model = start(tensor_parallel=2)
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    report = engine.update(snapshot, payloads_of(snapshot))
    assert report.checksum == snapshot.checksum and report.gap.mean < 1e-4
    perturb(model, 2)
    checksum, sent = broadcast(engine, model, version=2, workers=2)
    assert sent.result().checksum == checksum and sent.result().gap.mean < 1e-4
    (completions,) = engine.generate([make_request(LONG)], version=2)
    assert mean_gap(model, make_request(LONG), completions) <= 1e-4


class Damaging(Sender):
    """Flips a bit of the second bucket."""

    sent = 0

    def transmit(self, flat: torch.Tensor) -> Any:
        self.sent += 1
        flat[100] ^= self.sent == 2
        return super().transmit(flat)


def test_damaged_broadcast_makes_the_engine_unusable(start: Start) -> None:
    engine, model = start()
    _, report = broadcast(engine, model, sender=Damaging)
    with pytest.raises(
        WeightSyncError,
        match=r"failed: WeightSyncError: weight bucket 2 of 3 of weights 1: received checksum",
    ):
        report.result()
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([make_request()], version=0)


def test_broken_broadcast_is_not_reported_as_bad_weights(start: Start) -> None:
    engine, model = start()
    _, report = broadcast(engine, model, buckets=2)
    with pytest.raises(ActorLostError, match="weights by broadcast, receiving: "):
        report.result()
    with pytest.raises(WeightSyncError, match="the update from weights 0 to 1 did not finish"):
        engine.generate([make_request()], version=0)
