"""Adapters sent to a real vLLM engine: same bits as with the weights that the learner merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engines import (
    LONG,
    MAX_LENGTH,
    make_model,
    make_request,
    mean_gap,
    payloads_of,
    snapshot_of,
    without_one,
)

from rayhf.config.schema import RolloutConfig
from rayhf.errors import WeightSyncError
from rayhf.rollout.engine import RolloutEngine
from rayhf.types import WeightSnapshot
from rayhf.weights.buckets import pack_bucket, snapshot_checksum
from rayhf.weights.export import Weight, all_weights, trained_weights


def snapshot(model: Any, version: int, weights: Sequence[Weight]) -> WeightSnapshot:
    packed = (pack_bucket([(weight.name, weight.value()) for weight in weights], torch.float32),)
    return replace(snapshot_of(model, version), buckets=packed, checksum=snapshot_checksum(packed))


def move(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize(
    ("tied", "targets"),
    [(False, "all-linear"), (True, "all-linear"), (False, ["q_proj", "up_proj"])],
    ids=["untied", "tied", "parts of fused layers"],
)
def test_engine_merges_to_the_learners_bits(tmp_path: Path, tied: bool, targets: Any) -> None:
    base = make_model(tmp_path, tied=tied)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    config = RolloutConfig(kv_cache_gib=0.05)
    engine = RolloutEngine(
        tmp_path, config, dtype="float32", max_length=MAX_LENGTH, seed=0, device="cpu"
    )
    for version in (1, 2):
        move(model, version)
        adapters = snapshot(model, version, trained_weights(model))
        whole = snapshot(model, version, all_weights(model))
        assert adapters.buckets[0].payload.nbytes < whole.buckets[0].payload.nbytes / 4
        report = engine.update(adapters, payloads_of(adapters))
        assert (report.version, report.checksum) == (version, adapters.checksum)
        assert report.gap.mean < 1e-4
        (completions,) = engine.generate([make_request(LONG)], version=version)
        assert mean_gap(model, make_request(LONG), completions) <= 1e-4
    # As in an iteration that updates the reference: merged by the learner.
    engine.update(whole, payloads_of(whole))
    assert engine.generate([make_request(LONG)], version=2) == [completions]
    # After its weights were discarded it starts from the directory again.
    engine.sleep(keep_weights=False)
    engine.update(adapters, payloads_of(adapters))
    assert engine.generate([make_request(LONG)], version=2) == [completions]
    with pytest.raises(
        WeightSyncError,
        match=r"weights 2 stay in place: adapter of model.layers.0.self_attn.q_proj.weight: fac",
    ):
        engine.update(*without_one(adapters))
    assert engine.generate([make_request(LONG)], version=2) == [completions]
    engine.close()
