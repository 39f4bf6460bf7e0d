"""`rayhf export` from a finished run directory: files, model card and refusals."""

import json

import pytest
from campaigns import make_config, run_campaign
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from launch import cli
from launch.model_card import model_card
from rayhf.config.load import read_mapping
from rayhf.errors import CheckpointError
from rayhf.run_dir.files import sha256, write_manifest
from rayhf.run_dir.state import read_state, write_state

COMMIT = "0123456789" * 4


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished campaign from the hub name org/base, with a policy and its adapter."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    config = make_config(tmp_path)
    run_campaign(config)
    run = config.run.dir
    base = str(config.policy.model)
    for name in ("config.yaml", "metrics.jsonl"):
        text = (run / name).read_text().replace(f"model: {base}\n", "model: org/base\n")
        (run / name).write_text(text)
    state = read_state(run)
    config_sum = sha256(run / "config.yaml")
    write_state(
        run, state.model_copy(update={"models": {"org/base": COMMIT}, "config": config_sum})
    )
    (run / "policy" / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (run / "policy" / name).write_text("{}")
    (run / "policy" / "adapter" / "adapter_model.safetensors").write_text("adapter")
    settings = {"base_model_name_or_path": "/cache/snapshot", "revision": None, "r": 2}
    (run / "policy" / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (run / "policy" / "steps").unlink()  # the fake learner's
    write_manifest(run / "policy", {})
    return run


def export(*arguments):
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_merged_model_with_its_card(run, tmp_path):
    directory = tmp_path / "out"
    result = export(run, directory)
    assert result.exit_code == 0, result.output
    assert names(directory) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    card = ModelCard.load(directory / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "transformers"
    assert "rayhf" in card.data.tags
    assert f"| base model | org/base at commit {COMMIT} |" in card.text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["scorer/reward_mean"] for line in lines if "scorer/reward_mean" in line]
    assert f"| `scorer/reward_mean` | {rewards[0]:.4g} | {rewards[-1]:.4g} |" in card.text
    assert "model: org/base" in card.text
    assert str(run) not in card.text


def test_card_of_a_campaign_without_scorers(run):
    config = read_mapping(run / "config.yaml")
    config["scorer"]["train"] = []
    config["prompts"]["train"] = [{"type": "hub", "dataset": "org/data@v1"}, {"type": "file"}]
    card = model_card(run, config, read_state(run), title="t", adapter=False)
    assert "| prompts | org/data@v1, file |" in card.text
    assert "| scorers |" not in card.text
    assert card.data.datasets == ["org/data"]


def test_adapter_names_its_base_model_and_commit(run, tmp_path):
    directory = tmp_path / "out"
    result = export(run, directory, "--adapter")
    assert result.exit_code == 0, result.output
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert names(directory) == expected
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings == {"base_model_name_or_path": "org/base", "revision": COMMIT, "r": 2}
    assert ModelCard.load(directory / "README.md").data.library_name == "peft"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "name"], "expected the name of a repository, org/name"),
        (["--push", "org/name@v1"], "expected the name of a repository, org/name"),
        (["--private"], "--private is for a repository on the hub; expected --push NAME"),
    ],
)
def test_refusals_come_before_anything_is_written(run, tmp_path, arguments, message):
    result = export(run, tmp_path / "out", *arguments)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_damaged_weights_are_not_exported(run, tmp_path, file):
    (run / "policy" / file).write_text("x" * (run / "policy" / file).stat().st_size)
    result = export(run, tmp_path / "out")
    assert result.exit_code and isinstance(result.exception, CheckpointError)
    assert f"{file} does not have the manifest's checksum" in str(result.exception)
    assert "delete" in str(result.exception) and not (tmp_path / "out").exists()


def test_only_files_of_the_manifest_are_exported(run, tmp_path):
    (run / "policy" / "notes.txt").write_text("mine")
    assert export(run, tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "notes.txt").exists()
    (run / "policy" / "config.json").unlink()
    (run / "policy" / "config.json").symlink_to("/etc/hostname")
    result = export(run, tmp_path / "other")
    assert "config.json is a symbolic link" in str(result.exception)
    assert not (tmp_path / "other").exists()


def test_campaign_without_lora_has_no_adapter(run, tmp_path):
    (run / "policy" / "adapter").rename(tmp_path / "elsewhere")
    result = export(run, tmp_path / "out", "--adapter")
    assert "there is no adapter; expected a campaign with policy.lora" in str(result.exception)
