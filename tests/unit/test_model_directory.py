"""Model directories that cannot work are refused before anything starts, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaigns import make_config
from chat_tokenizer import make_model_directory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from rayhf.errors import ConfigError
from rayhf.models.directory import check_model
from rayhf.models.source import read_model_config
from rayhf.models.weight_files import INDEX, fingerprints, stored_shapes
from rayhf.planning.preflight import prepare

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "sharded"
    shutil.copytree(whole, directory, ignore=shutil.ignore_patterns(WEIGHTS))
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(directory, max_shard_size="40KB")
    return directory


def check(path: Path, **options: Any) -> None:
    check_model(path, read_model_config(path, key="policy.model"), key="policy.model", **options)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def set_config(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def add_weights(path: Path, name: str, rename: str = "") -> None:
    tensors = {rename + key: value * 2 for key, value in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / name)


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4166368\n"
EMBED = "model.embed_tokens.weight"
Damage = Callable[[Path], object]
OF_WHOLE: dict[str, tuple[Damage, str]] = {
    "git-lfs pointer": (
        lambda p: (p / WEIGHTS).write_text(LFS),
        r"model\.safetensors is a git-lfs pointer, not the weights; run `git lfs pull`",
    ),
    "not safetensors": (
        lambda p: (p / WEIGHTS).write_bytes(b"\x80\x02}q\x00" * 9),
        "is not a safetensors file, or is cut off",
    ),
    "empty": (lambda p: (p / WEIGHTS).write_bytes(b""), "is not a safetensors file"),
    "cut off": (lambda p: cut(p / WEIGHTS), r"is cut off: it has [\d,]+ bytes, its header needs"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), r"has no \*\.safetensors weights"),
    "adapter only": (
        lambda p: (p / WEIGHTS).rename(p / "adapter_model.safetensors"),
        "holds a LoRA adapter without its model; merge it",
    ),
    "adapter beside weights": (
        lambda p: (p / "adapter_config.json").write_text("{}"),
        r"has adapter_config\.json beside whole weights: transformers would add that adapter",
    ),
    "second file": (
        lambda p: add_weights(p, "zz_old.safetensors"),
        r"has zz_old\.safetensors beside model\.safetensors, with the same tensors \(.*weight",
    ),
    "second file of other names": (
        lambda p: add_weights(p, "a.safetensors", "other."),
        r"has a\.safetensors beside model\.safetensors, with other tensors: vLLM would read both",
    ),
    "other name": (
        lambda p: (p / WEIGHTS).rename(p / "weights.safetensors"),
        r"has weights\.safetensors; expected model\.safetensors",
    ),
    "index of other files": (
        lambda p: (
            add_weights(p, "b.safetensors"),
            (p / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "b.safetensors"}}'
            ),
        ),
        "transformers would read the one, vLLM the other",
    ),
    "index outside": (
        lambda p: (p / INDEX).write_text('{"weight_map": {"x": "../b"}}'),
        r"names the file '\.\./b'; expected names beside it",
    ),
    "generation_config": (
        lambda p: (p / "generation_config.json").write_text("{"),
        r"generation_config\.json is not valid JSON",
    ),
    "generation_config with BOM": (
        lambda p: (p / "generation_config.json").write_bytes(b"\xef\xbb\xbf{}"),
        r"generation_config\.json is not valid JSON \(Unexpected UTF-8 BOM",
    ),
    "config is a list": (
        lambda p: (p / "config.json").write_text("[]"),
        r"config\.json holds list, expected a JSON object",
    ),
    "quantized": (
        lambda p: set_config(p, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is a quantized checkpoint \(quant_method gptq\).* expected the unquantized model",
    ),
    "other shape": (
        lambda p: set_config(p, intermediate_size=48),
        r"gate_proj\.weight has shape 32x32 in the weights, and config\.json describes 48x32",
    ),
    "more layers": (
        lambda p: set_config(p, num_hidden_layers=3),
        r"the weights lack \d+ of the \d+ tensors that config\.json describes, model\.layers\.2",
    ),
    "lacks a tensor": (
        lambda p: resave(p, lambda tensors: tensors.pop(EMBED)),
        rf"lack 1 of the \d+ tensors that config\.json describes, {EMBED} among them",
    ),
    "impossible": (
        lambda p: set_config(p, model_type="nothing_of_this_kind"),
        r"transformers cannot build the model that .*config\.json describes",
    ),
}
OF_SHARDS: dict[str, tuple[Damage, str]] = {
    "missing": (
        lambda p: shards(p)[1].unlink(),
        r"lacks model-00002-of-\d+\.safetensors, one of the \d+ weight files",
    ),
    "cut off": (lambda p: cut(shards(p)[1]), r"model-00002-of-\d+\.safetensors is cut off"),
    "no index": (
        lambda p: (p / INDEX).unlink(),
        r"has \d+ weight files and no model\.safetensors\.index\.json",
    ),
    "same tensor twice": (
        lambda p: shutil.copy(shards(p)[0], shards(p)[1]),
        "in two files",
    ),
}


@pytest.mark.parametrize("case", OF_WHOLE)
def test_refused(whole: Path, tmp_path: Path, case: str) -> None:
    damage, expected = OF_WHOLE[case]
    refuse(whole, tmp_path, damage, expected)


@pytest.mark.parametrize("case", OF_SHARDS)
def test_refused_shards(sharded: Path, tmp_path: Path, case: str) -> None:
    damage, expected = OF_SHARDS[case]
    refuse(sharded, tmp_path, damage, expected)


def refuse(source: Path, directory: Path, damage: Damage, expected: str) -> None:
    path = directory / "model"
    shutil.copytree(source, path)
    damage(path)
    with pytest.raises(ConfigError, match=f"^policy.model: .*{expected}") as error:
        check(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_directories_that_work(whole: Path, sharded: Path, tmp_path: Path) -> None:
    check(whole)
    check(sharded)
    assert stored_shapes(whole, key="k") == stored_shapes(sharded, key="k")
    # Beside an index, other files are of no account: vLLM and transformers read those it names.
    extra = tmp_path / "extra"
    shutil.copytree(sharded, extra)
    shutil.copy(whole / WEIGHTS, extra / "consolidated.safetensors")
    check(extra)
    assert stored_shapes(extra, key="k") == stored_shapes(whole, key="k")


def test_tied_embeddings_need_no_head(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "tied"
    shutil.copytree(whole, path)
    resave(path, lambda tensors: tensors.pop("lm_head.weight", None))
    set_config(path, tie_word_embeddings=True)
    check(path)
    set_config(path, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lm_head\.weight among them"):
        check(path)
    check(path, causal=False)  # a critic's head is new


def test_mixtures_are_stored_expert_by_expert(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any(".experts.1.w2." in name for name in stored_shapes(tmp_path, key="k"))
    check(tmp_path)
    resave(tmp_path, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight"))
    with pytest.raises(ConfigError, match=r"experts\.1\.w2\.weight among them"):
        check(tmp_path)


# ---------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "k_projj"], "k_projj matches no linear layer.* did you mean k_proj?"),
        (["zz"], r"zz matches no linear layer of the model; its layers are embed_tokens, q_proj"),
        (["proj"], "proj matches no linear layer"),
        (["mlp"], "mlp matches no linear layer"),
    ],
)
def test_lora_targets_that_match_nothing(whole: Path, targets: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^policy\.lora\.target_modules: {expected}"):
        check(whole, lora_targets=targets)


def test_lora_targets_that_match(whole: Path) -> None:
    check(whole, lora_targets="all-linear")
    check(whole, lora_targets=["q_proj", "layers.0.mlp.up_proj", "embed_tokens"])


# -------------------------------------------------------------------------------- fingerprints


def test_fingerprint_changes_with_every_file_that_counts(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(whole, path)
    before = fingerprints(path, key="k")
    assert before == fingerprints(whole, key="k")
    assert set(before) >= {"config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS}
    (path / "README.md").write_text("words")
    assert fingerprints(path, key="k") == before
    resave(path, lambda t: t.update({name: 1.01 * value for name, value in t.items()}))
    set_config(path, rope_theta=1.0)
    after = fingerprints(path, key="k")
    assert {name for name in after if after[name] != before[name]} == {"config.json", WEIGHTS}


# ------------------------------------------------------------------------------------ preflight


@pytest.fixture
def campaign(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that prepares a campaign with changes to its config."""
    shutil.copytree(whole, tmp_path / "policy")
    rows = [{"prompt": f"Say {n}", "answer": str(n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("rayhf.scorer.build.check_entries", lambda *_, **__: [])

    def prepared(policy: dict[str, Any] | None = None, **sections: Any) -> Any:
        config = make_config(
            tmp_path,
            policy={"model": "policy", **(policy or {})},
            prompts={"train": "rows.jsonl", "batch": 4},
            rollout={"max_tokens": 16},
            **sections,
        )
        return prepare(config, base=tmp_path)

    return prepared


def test_prepared_campaign_knows_its_inputs(campaign: Any, tmp_path: Path) -> None:
    plain = campaign()
    assert plain.stop_tokens == {1: "<|end|>"} and plain.data.exported_files == {}
    assert {"chat template", "prompts as rendered", f"policy.model/{WEIGHTS}"} <= set(
        plain.data.inputs
    )
    template = (tmp_path / "policy" / "chat_template.jinja").read_text() + " {{ mood }}"
    other = campaign({"chat_template": template, "chat_template_kwargs": {"mood": "glad"}})
    changed = {n for n, v in plain.data.inputs.items() if other.data.inputs[n] != v}
    assert changed == {"chat template", "prompts as rendered"}
    assert set(other.data.exported_files) == {"chat_template.jinja"}


def test_refused_by_preflight(campaign: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k_projj matches no linear layer"):
        campaign({"lora": {"target_modules": ["q_proj", "k_projj"]}})
    shutil.copytree(tmp_path / "policy", tmp_path / "reference")
    cut(tmp_path / "reference" / WEIGHTS)
    with pytest.raises(ConfigError, match=r"^reference\.model: .*is cut off"):
        campaign(reference={"model": "reference"})
    with pytest.raises(ConfigError, match=r"^prompts\.train: .*rows\.jsonl row 1: .*leaves out"):
        campaign({"chat_template": "{{ 'nothing' }}"})
