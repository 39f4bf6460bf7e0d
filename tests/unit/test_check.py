"""`rayhf check --no-hardware` prints the plan of every recipe, from config.json files alone."""

import json
from pathlib import Path

import pytest
from llama_config import LLAMA
from typer.testing import CliRunner

from launch.cli import app, main
from rayhf.config.load import load_config
from rayhf.errors import ConfigError
from rayhf.planning.preflight import prepare

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of the recipes, without weights."""
    directory = tmp_path_factory.mktemp("recipes")
    for name in ("policy-8b-sft", "reward-8b", "general-preference-8b"):
        (directory / "models" / name).mkdir(parents=True)
        (directory / "models" / name / "config.json").write_text(json.dumps(LLAMA))
    return directory


def check(directory, monkeypatch, *arguments):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_gpus(models, monkeypatch, recipe):
    result = check(
        models,
        monkeypatch,
        recipe,
        "--no-hardware",
        "--engine-rate",
        "2500",
        "--learner-rate",
        "8000",
    )
    assert result.exit_code == 0, result.output
    for text in (
        "optimizer steps per iteration",
        "placement",
        "GiB per GPU at the peak",
        "of a GPU with 79.00",
        "learner rank",
        "cache",
    ):
        assert text in result.output, result.output
    assert ("LoRA adapters only" in result.output) == ("lora" in recipe.read_text(encoding="utf-8"))
    assert (
        "iterations per hour" in result.output
        and "one checkpoint, and exported models" in result.output
    )


def test_no_estimate_without_the_model(tmp_path, monkeypatch):
    result = check(tmp_path, monkeypatch, RECIPES[0], "--no-hardware")
    assert (
        result.exit_code == 0
        and "no estimates: models/policy-8b-sft/config.json is missing" in result.output
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.ranks=1"], "learner rank 0 needs about 1"),
        (["cluster.gpu_memory_gib=24"], "GiB on a GPU, and there are 24.0"),
        (["rollout.memory_fraction=0.2"], "and one sequence of 4096 tokens needs more"),
    ],
)
def test_refusal_is_one_line_after_the_tables(models, monkeypatch, capsys, overrides, expected):
    recipe = next(path for path in RECIPES if path.stem.startswith("inpo"))
    monkeypatch.chdir(models)
    monkeypatch.setattr("sys.argv", ["rayhf", "check", str(recipe), *overrides, "--no-hardware"])
    monkeypatch.delenv("RAYHF_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr()
    assert stop.value.code == 2 and expected in output.err and output.err.count("\n") == 1
    assert "placement" in output.out and "at the peak" in output.out


@pytest.mark.parametrize(("device", "expected"), [("cpu", "cluster.device gpu"), ("gpu", "sdpa")])
def test_flash_attention_is_refused_where_it_is_missing(device, expected):
    overrides = ["learner.attention=flash_attention_2", f"cluster.device={device}"]
    with pytest.raises(ConfigError, match=rf"flash_attention_2 needs .*{expected}"):
        prepare(load_config(RECIPES[0], overrides), base=Path.cwd())
