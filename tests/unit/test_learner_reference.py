"""The reference engine: log-probs, updates, and that a bad snapshot or file changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayhf.config.schema import ReferenceConfig
from rayhf.errors import CheckpointError, WeightSyncError
from rayhf.reference.engine import ReferenceEngine
from rayhf.types import Row, WeightBucket, token_array
from rayhf.weights.buckets import pack_bucket

ROWS = [
    Row(
        prompt_id=f"p{i}",
        sample=0,
        prompt_ids=token_array((1, 2 + i)),
        response_ids=token_array((7 * i + k) % 41 for k in range(1 + 3 * i)),
    )
    for i in range(5)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def snapshot(
    model: Path, shift: float, dtype: torch.dtype = torch.float32
) -> list[tuple[WeightBucket, np.ndarray]]:  # type: ignore[type-arg]
    tensors = sorted(load_file(model / "model.safetensors").items())
    parts = [
        pack_bucket([(name, t + shift) for name, t in half], dtype)
        for half in (tensors[:5], tensors[5:])
    ]
    return [(bucket, bucket.payload) for bucket in parts]


def flat(engine: ReferenceEngine) -> torch.Tensor:
    return torch.cat(
        [engine.weights[name].value().float().flatten() for name in sorted(engine.weights)]
    )


def test_logprobs_do_not_depend_on_the_budget(model: Path) -> None:
    wide = ReferenceEngine(model, ReferenceConfig(token_budget=4096), dtype="float32")
    narrow = ReferenceEngine(model, ReferenceConfig(token_budget=16), dtype="float32")
    a = wide.logprobs(ROWS, 0.7)
    b = narrow.logprobs(ROWS, 0.7)
    assert [len(x) for x in a] == [len(row.response_ids) for row in ROWS]
    assert all(x.dtype == np.float32 for x in a)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert not np.allclose(a[2], wide.logprobs(ROWS, 1.0)[2])


def test_update_replaces_or_mixes(model: Path) -> None:
    engine = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    start = flat(engine)
    engine.update(snapshot(model, 1.0), 0.25)
    torch.testing.assert_close(flat(engine), start + 0.25)
    engine.update(snapshot(model, 1.0), 0.5)
    torch.testing.assert_close(flat(engine), start + 0.625)
    engine.update(snapshot(model, -1.0), 1.0)
    torch.testing.assert_close(flat(engine), start - 1.0)


def test_small_steps_of_a_bfloat16_average_are_kept(model: Path, tmp_path: Path) -> None:
    engine = ReferenceEngine(model, ReferenceConfig(), dtype="bfloat16")
    start = flat(engine)
    for _ in range(300):
        engine.update(snapshot(model, 0.5, torch.bfloat16), 0.001)
    moved = flat(engine) - start
    assert moved.mean() == pytest.approx(0.5 * (1 - 0.999**300), rel=0.05)
    engine.save(tmp_path)
    other = ReferenceEngine(model, ReferenceConfig(), dtype="bfloat16")
    other.load(tmp_path)
    for one in (engine, other):
        one.update(snapshot(model, 0.5, torch.bfloat16), 0.001)
    assert all(torch.equal(engine.average[name], other.average[name]) for name in engine.average)


def test_another_model_beside_the_reference(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    engine = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    own = engine.logprobs(ROWS, 1.0)
    others = [tmp_path / name for name in "ab"]
    for shift, other in enumerate(others, start=1):
        shutil.copytree(model, other)
        tensors = load_file(model / "model.safetensors")
        moved = {name: tensor * (1 + 0.1 * shift) for name, tensor in tensors.items()}
        save_file(moved, other / "model.safetensors", {"format": "pt"})
    for other in (*others, *others):
        expected = ReferenceEngine(other, ReferenceConfig(), dtype="float32").logprobs(ROWS, 1.0)
        for a, b in zip(engine.logprobs(ROWS, 1.0, other), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(expected[2], own[2])
    for a, b in zip(engine.logprobs(ROWS, 1.0), own, strict=True):
        np.testing.assert_array_equal(a, b)


def test_save_and_load_give_the_same_logprobs(model: Path, tmp_path: Path) -> None:
    engine = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    engine.update(snapshot(model, 0.1), 1.0)
    engine.save(tmp_path)
    other = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    other.load(tmp_path)
    for a, b in zip(engine.logprobs(ROWS, 1.0), other.logprobs(ROWS, 1.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_snapshot_changes_nothing(model: Path) -> None:
    engine = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    start = flat(engine)
    good = snapshot(model, 1.0)
    damaged = good[1][1].copy()
    damaged[3] ^= 1
    with pytest.raises(WeightSyncError, match="checksum"):
        engine.update([good[0], (good[1][0], damaged)], 1.0)
    with pytest.raises(WeightSyncError, match="missing"):
        engine.update(good[:1], 1.0)
    assert torch.equal(flat(engine), start)


def test_missing_or_broken_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    engine = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    with pytest.raises(CheckpointError, match="no reference checkpoint"):
        engine.load(tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no reference checkpoint"):
        engine.load(tmp_path)
