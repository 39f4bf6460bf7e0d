"""A real learner's weights for 16-bit engines: rounding, what a sync reports, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, WeightedLogp, advance, start

from rayhf.config.schema import LoraConfig, ReferenceConfig
from rayhf.weights.buckets import unpack_bucket

SMALL = {"lr": 1e-5, "sync_rounding": "stochastic"}


def payload(engine: Any, version: int, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    buckets, _ = engine.publish(dtype, 20_000, version=version)
    return {name: value for b in buckets for name, value in unpack_bucket(b, b.payload)}


def rounding(keywords: dict[str, Any], model: Path, directory: Path, stage: int) -> Any:
    engine = start(keywords, model, zero_stage=stage, **SMALL)
    advance(engine, range(3), 100, WeightedLogp())
    first = payload(engine, 1)
    metrics = engine.outgoing.metrics()
    again = payload(engine, 1)
    engine.save(directory)
    resumed = start(keywords, model, zero_stage=stage, **SMALL)
    resumed.load(directory)
    after = payload(resumed, 1)
    # The sync after the next step must report the same as without the restart.
    for each in (engine, resumed):
        advance(each, range(3, 4), 100, WeightedLogp())
    second = payload(engine, 2)
    same = payload(resumed, 2)
    reports = [engine.outgoing.metrics(), resumed.outgoing.metrics()]
    if engine.rank != 0:
        assert first == again == after == second == same == {} and reports == [{}, {}]
        return None
    assert reports[0] == reports[1]
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], after[n]) for n in first)
    assert all(torch.equal(second[n], same[n]) for n in second)
    assert any(not torch.equal(first[n], second[n]) for n in first)
    return metrics, reports[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_stochastic_bits_depend_on_seed_version_and_name_only(
    two: Ranks, tied: Path, tmp_path: Path, stage: int
) -> None:
    for metrics in two.call(rounding, tied, tmp_path, stage)[0]:
        assert 0 < metrics["sync/changed_fraction"] < 1
        assert abs(metrics["sync/update_lost"]) < 0.5


def reported(keywords: dict[str, Any], model: Path, dtype: str, config: dict[str, Any]) -> Any:
    engine = start(keywords, model, zero_stage=0, **config)
    advance(engine, range(2), 100, WeightedLogp())
    payload(engine, 1, dtype)
    return engine.outgoing.metrics()


def test_nearest_hides_small_updates_and_float32_none(one: Ranks, tied: Path) -> None:
    small = {"lr": 1e-6}
    (hidden,) = one.call(reported, tied, "bfloat16", small)
    (whole,) = one.call(reported, tied, "float32", small)
    assert hidden["sync/update_lost"] > 0.5 and hidden["sync/changed_fraction"] < 0.2
    assert whole["sync/update_lost"] == pytest.approx(0.0, abs=1e-6)
    assert whole["sync/changed_fraction"] > 0.9


def lora_and_critic(keywords: dict[str, Any], model: Path) -> list[dict[str, float]]:
    adapters = start(keywords, model, zero_stage=0, lora=LoraConfig(rank=2))
    adapters.publish("bfloat16", 20_000)
    critic = start(keywords, model, zero_stage=0, head="value")
    return [adapters.outgoing.metrics(), critic.outgoing.metrics()]


def test_nothing_is_reported_where_nothing_is_rounded(one: Ranks, tied: Path) -> None:
    assert one.call(lora_and_critic, tied) == [[{}, {}]]


def float16_reference(keywords: dict[str, Any], model: Path) -> float:
    from ranks import make_examples

    from rayhf.reference.engine import ReferenceEngine

    rows = [row for example in make_examples(4) for row in example.rows]
    exact, half = (
        ReferenceEngine(model, ReferenceConfig(), dtype=dtype).logprobs(rows, 1.0)
        for dtype in ("float32", "float16")
    )
    return max(float(abs(a - b).max()) for a, b in zip(exact, half, strict=True))


def test_float16_reference(one: Ranks, tied: Path) -> None:
    (gap,) = one.call(float16_reference, tied)
    assert 0 < gap < 0.02
