"""`rayhf eval`: what the command line means, and what it refuses before anything starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import checkpoint_state
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from launch.cli import app
from launch.eval_config import build_config
from launch.eval_target import find_target
from rayhf.config.evaluate import powers_of_two
from rayhf.config.load import dump_config, load_config
from rayhf.config.registry import SUITES
from rayhf.errors import ConfigError
from rayhf.run_dir.files import seal, write_json
from rayhf.run_dir.state import CampaignState, write_state

CAMPAIGN = {
    "run": {"dir": "r", "iterations": 4, "eval_prompts": 5},
    "policy": {"model": "start", "dtype": "float32"},
    "prompts": {"train": "t.jsonl", "heldout": "h.jsonl", "task": "toy"},
    "rollout": {"max_tokens": 33},
    "algorithm": {"type": "online_dpo"},
    "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
}


def build(model="m", **given):
    given = {"suites": (), "file": None, "baseline": None, "out": None, "overrides": ()} | given
    return build_config(model, **given)[0]


def write_policy(run, name):
    """Export a policy of one weight."""
    shutil.rmtree(run / "policy", ignore_errors=True)
    temporary = run / ".policy"
    temporary.mkdir()
    weights = {name: torch.full((2,), 4.0, dtype=torch.bfloat16)}
    save_file(weights, temporary / "model.safetensors")
    (temporary / "config.json").write_text("{}")
    seal(temporary, run / "policy", {})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with checkpoints of iterations 2 and 4, and a policy of one weight."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(load_config(CAMPAIGN)))
    write_state(directory, CampaignState.model_construct(iteration=4, models={}))
    write_policy(directory, "w")
    for iteration in (2, 4):
        temporary = directory / f"temporary-{iteration}"
        (temporary / "learner").mkdir(parents=True)
        weights = {"model.w": torch.full((2,), float(iteration))}
        save_file(weights, temporary / "learner/weights-00000.safetensors")
        write_json(temporary / "state.json", checkpoint_state(iteration).model_dump(mode="json"))
        (directory / "checkpoints").mkdir(exist_ok=True)
        final = directory / f"checkpoints/iteration-{iteration:06d}"
        seal(temporary, final, {"iteration": iteration})
    return directory


def test_run_brings_its_held_out_prompts(run):
    config = build(str(run))
    assert config.policy.model.text == str(run / "policy") and config.policy.dtype == "float32"
    assert config.rollout.max_tokens == 33
    (suite,) = config.suites.values()
    assert list(config.suites) == ["toy"] and suite.type == "scored" and suite.limit == 5
    assert suite.scorer[0].function == "a:b"


def test_iterations_of_a_run(run):
    assert find_target(f"{run}@0").model.text == "start"
    assert find_target(f"{run}@4").model.text == str(run / "policy")
    middle = Path(find_target(f"{run}@2").model.text)
    weights = load_file(middle / "model.safetensors")["w"]
    assert weights.dtype == torch.bfloat16 and weights.tolist() == [2, 2]
    assert (middle / "config.json").is_file()
    with pytest.raises(ConfigError, match="no checkpoint of iteration 3; expected one of 0, 2, 4"):
        find_target(f"{run}@3")


def test_checkpoint_in_another_form_is_refused(run):
    write_policy(run, "v")
    with pytest.raises(ConfigError, match="another form"):
        find_target(f"{run}@2")


def test_campaign_config_as_settings(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(CAMPAIGN))
    config = build("other", file=file)
    assert config.policy.model.text == "other" and list(config.suites) == ["toy"]
    assert list(build("other", file=file, suites=["gsm8k"]).suites) == ["gsm8k"]


def test_files_become_suites_by_their_columns(tmp_path):
    pairs = tmp_path / "pairs.test.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}))
    prompts = tmp_path / "my prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "p", "answer": "a"}))
    config = build(suites=[str(pairs), str(prompts)], overrides=["samples=4"])
    assert {name: suite.type for name, suite in config.suites.items()} == {
        "pairs": "preferences",
        "my_prompts": "scored",
    }
    assert config.sizes == (1, 2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--suite is missing"),
        ({"suites": ["gsm8"]}, "neither a suite nor a file; did you mean gsm8k"),
        ({"suites": ["gsm8k"], "overrides": ["samples=2", "k=[4]"]}, "k is 4, and there are 2"),
        ({"suites": ["gsm8k"], "overrides": ["samples=2", "temperature=0"]}, "at temperature 0"),
        (
            {"suites": ["gsm8k"], "overrides": ["judge=[{type: rule, function: 'a:b'}]"]},
            "judge compares with a baseline",
        ),
        ({"suites": ["gsm8k"], "overrides": ["suites.gsm8k.limits=3"]}, "unknown key"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        build(**given)


def test_default_sizes_end_with_all_samples():
    assert powers_of_two(1) == (1,) and powers_of_two(6) == (1, 2, 4, 6)


def test_suites_are_listed():
    shown = CliRunner().invoke(app, ["list", "suites"], catch_exceptions=False)
    assert all(name in shown.output for name in SUITES.builtin)


def test_own_rows_get_the_suites_template(tmp_path):
    config = build(
        suites=["gsm8k"],
        overrides=[f"suites.gsm8k.prompts={tmp_path}/x.jsonl", "suites.gsm8k.limit=3"],
    )
    suite = SUITES.build(config.suites["gsm8k"])
    (source,) = suite.sources("suites.gsm8k")
    assert source.type == "file" and source.limit == 3 and "{{ question }}" in source.template
    (public,) = SUITES.build(SUITES.config_type("gsm8k")()).sources("x")
    assert public.dataset == "openai/gsm8k" and public.split == "test"
    with pytest.raises(ConfigError, match="has no public data set"):
        SUITES.build(SUITES.config_type("constraints")()).sources("suites.x")
