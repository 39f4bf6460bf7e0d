"""What `rayhf check` refuses of QLoRA, and its memory; the arithmetic is an integration test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_config import LLAMA

from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.errors import ConfigError
from rayhf.models.quantized import check_quantize
from rayhf.planning.memory import NF4_BYTES, learner_memory
from rayhf.planning.shape import read_shape

NF4 = LoraConfig(quantize="nf4")


@pytest.mark.parametrize(
    ("installed", "learner", "model", "message"),
    [
        (False, LearnerConfig(), LLAMA, r"bitsandbytes is not installed; pip install 'rayhf"),
        (True, LearnerConfig(zero_stage=3), LLAMA, "zero_stage 3 would shard the 4-bit weights"),
        (True, LearnerConfig(), LLAMA | {"num_experts": 8}, "a mixture of experts"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    learner: LearnerConfig,
    model: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    with pytest.raises(ConfigError, match=f"policy.lora.quantize: .*{message}"):
        check_quantize(SimpleNamespace(learner=learner), model)  # type: ignore[arg-type]


def test_memory_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    shape = read_shape(tmp_path, key="policy.model")
    config = LearnerConfig(dtype="bfloat16")
    plain = learner_memory(shape, config, device="gpu", lora=LoraConfig())
    packed = learner_memory(shape, config, device="gpu", lora=NF4)
    saved = (2 - NF4_BYTES) * shape.linear_weights
    assert plain.weights - packed.weights == pytest.approx(saved)
    assert packed.weights < 0.4 * plain.weights
