"""What `rayhf check` says of a model's architecture, and LoRA on fused experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from campaigns import make_config
from safetensors.torch import load_file

from rayhf.config.schema import LearnerConfig, LoraConfig, ReferenceConfig
from rayhf.errors import ConfigError
from rayhf.learner.build import load_model
from rayhf.models.architectures import ARCHITECTURES, check_architecture, check_critic
from rayhf.models.peft import lora_targets
from rayhf.planning.preflight import prepare
from rayhf.reference.engine import ReferenceEngine
from rayhf.weights.buckets import checkpoint_shapes, pack_bucket
from rayhf.weights.export import all_weights, export_model, trained_weights


def check(model_type: str, name: str, *, max_length: int = 64, **settings: Any) -> str | None:
    config = {"model_type": model_type, "architectures": [name], **settings}
    return check_architecture(config, key="policy.model", max_length=max_length)


@pytest.mark.parametrize("model_type", [n for n, e in ARCHITECTURES.items() if not e.refused])
def test_tested_architectures_pass_without_a_warning(model_type: str) -> None:
    assert check(model_type, ARCHITECTURES[model_type].engine) is None


@pytest.mark.parametrize("model_type", [n for n, e in ARCHITECTURES.items() if e.refused])
def test_what_does_not_work_is_refused_with_the_reason(model_type: str) -> None:
    entry = ARCHITECTURES[model_type]
    with pytest.raises(ConfigError) as error:
        check(model_type, entry.engine)
    assert str(error.value) == f"policy.model: {model_type} models do not work: {entry.refused}"


def test_untested_architecture_is_a_warning() -> None:
    warning = check("dbrx", "DbrxForCausalLM")
    assert warning is not None and "dbrx models are not tested with rayhf" in warning


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("lamma", "LammaForCausalLM", "no causal language model of model_type 'lamma'"),
        ("codegen", "CodeGenForCausalLM", r"vLLM has no CodeGenForCausalLM \(codegen\)"),
        ("gemma3", "Gemma3ForConditionalGeneration", "reads images or sound"),
    ],
)
def test_what_an_engine_lacks_is_refused(model_type: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(model_type, name)


def test_window_of_an_engine_that_counts_it_otherwise() -> None:
    name = ARCHITECTURES["cohere2"].engine
    assert check("cohere2", name, sliding_window=64) is None
    with pytest.raises(ConfigError, match="max_length of at most 63, got 64"):
        check("cohere2", name, sliding_window=63)


def test_model_without_a_token_classifier_is_no_critic() -> None:
    check_critic({"model_type": "qwen2"}, key="policy.model")
    with pytest.raises(ConfigError, match=r"no token classifier of model_type 'olmo2'.*grpo"):
        check_critic({"model_type": "olmo2"}, key="policy.model")


@pytest.mark.parametrize(
    ("model_type", "algorithm", "message"),
    [
        ("opt", "grpo", "policy.model: opt models do not work: its layers"),
        ("olmo2", "ppo", "policy.model: transformers has no token classifier"),
    ],
)
def test_a_campaign_is_refused_before_it_starts(
    tmp_path: Path, model_type: str, algorithm: str, message: str
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").touch()
    config = {"model_type": model_type, "max_position_embeddings": 2048}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(tmp_path, algorithm={"type": algorithm}), base=tmp_path)


@pytest.fixture(scope="module", params=["Qwen3Moe", "Mixtral"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    directory = tmp_path_factory.mktemp("mixture")
    getattr(transformers, f"{request.param}ForCausalLM")(config).save_pretrained(directory)
    return directory


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_experts_are_sent_and_exported_as_the_directory_has_them(
    mixture: Path, tmp_path: Path
) -> None:
    model = load(mixture)
    expected = load_file(mixture / "model.safetensors")
    sent = {weight.name: weight.value() for weight in all_weights(model)}
    assert sent.keys() == expected.keys() == checkpoint_shapes(mixture, tied=False).keys()
    assert any(".experts.3." in name for name in sent)
    assert all(torch.equal(sent[name], expected[name]) for name in sent)
    export_model(model, tmp_path / "out", source=mixture, sharded=False, rank=0)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_reference_takes_the_experts(mixture: Path, tmp_path: Path) -> None:
    engine = ReferenceEngine(mixture, ReferenceConfig(), dtype="float32")
    moved = load(mixture)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.5)
    bucket = pack_bucket([(w.name, w.value()) for w in all_weights(moved)], torch.float32)
    engine.update([(bucket, bucket.payload)], 1.0)
    for ours, theirs in zip(engine.policy.model.parameters(), moved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    engine.save(tmp_path)
    other = ReferenceEngine(mixture, ReferenceConfig(), dtype="float32")
    other.load(tmp_path)
    assert all(
        torch.equal(other.weights[name].value(), weight.value())
        for name, weight in engine.weights.items()
    )


def test_lora_on_a_mixture_adapts_the_attention(mixture: Path) -> None:
    model = load(mixture)
    targets = lora_targets(model, LoraConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    names = {weight.name for weight in trained_weights(adapted)}
    assert len(names) == 2 * 4 * 2
    assert all(".self_attn." in name for name in names)


def test_adapters_of_experts_are_refused(mixture: Path) -> None:
    config = LearnerConfig(dtype="float32")
    lora = LoraConfig(target_modules=("q_proj", "w1", "w3", "gate_proj", "up_proj"))
    settings = {"zero_optimization": {"stage": 0}}
    with pytest.raises(ConfigError, match=r"q_proj, w1.* names layers of the experts"):
        load_model(mixture, config, head="policy", lora=lora, settings=settings)
