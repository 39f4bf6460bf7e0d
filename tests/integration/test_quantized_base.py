"""QLoRA: learner, engine and reference compute with the same 4-bit base. Needs bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LR, Ranks, WeightedLogp, advance, start, weights

from rayhf.config.schema import LoraConfig
from rayhf.models.quantized import nearest_nf4, write_base
from rayhf.weights.buckets import checkpoint_shapes, checkpoint_tensors

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra qlora)")
LORA = LoraConfig(rank=4, alpha=8)
NF4 = LORA.model_copy(update={"quantize": "nf4"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(source, tmp_path_factory.mktemp("run") / "base", dtype="float32")


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint_tensors(directory, checkpoint_shapes(directory, tied=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_4_bits_again_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128).to(dtype)
    rounded = nearest_nf4(weight)
    assert rounded.dtype == dtype and not torch.equal(rounded, weight)
    assert torch.equal(nearest_nf4(rounded), rounded)
    assert len(rounded[0, :64].unique()) <= 16


def test_base_rounds_linear_layers_only(source: Path, base: Path) -> None:
    before, after = stored(source), stored(base)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    before_second = (base / "model.safetensors").stat().st_mtime_ns
    write_base(source, base, dtype="float32")
    assert (base / "model.safetensors").stat().st_mtime_ns == before_second


def train(keywords: Any, model: Path, lora: LoraConfig, directory: Path) -> Any:
    engine = start(keywords, model, lora=lora, dtype="float32")
    linear = engine.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weights(engine)
    metrics = advance(engine, range(3), 4096, WeightedLogp())
    engine.export(directory)
    return metrics, before, weights(engine), str(linear.dtype)


def test_learner_trains_like_lora_on_the_rounded_base(
    one: Ranks, source: Path, base: Path, tmp_path: Path
) -> None:
    ((metrics, before, after, dtype),) = one.call(train, base, NF4, tmp_path / "nf4")
    ((expected, plain_before, plain_after, plain_dtype),) = one.call(
        train, base, LORA, tmp_path / "plain"
    )
    assert (dtype, plain_dtype) == ("torch.uint8", "torch.float32")
    assert [m["learner/loss"] for m in metrics] == pytest.approx(
        [m["learner/loss"] for m in expected], abs=1e-5
    )
    assert before.keys() == after.keys() == stored(base).keys()
    for name, tensor in stored(base).items():
        assert (tensor.numpy() == before[name]).all() and (before[name] == plain_before[name]).all()
        assert abs(after[name] - plain_after[name]).max() < 5 * LR, name
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    exported = stored(tmp_path / "nf4")
    assert all((exported[name].numpy() == after[name]).all() for name in after)
