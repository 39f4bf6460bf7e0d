"""`rayhf init` and `rayhf config`: every first project passes `rayhf check`; the JSON schema."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from chat_tokenizer import make_model_directory
from typer.testing import CliRunner

from launch.cli import app
from rayhf.config.fit import FitConfig
from rayhf.config.json_schema import json_schema
from rayhf.config.load import load_config
from rayhf.config.registry import ALGORITHMS
from rayhf.config.schema import CampaignConfig
from rayhf.config.serve import ServeScorerConfig
from rayhf.config.yaml_text import parse_yaml
from rayhf.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
ROOTS = {"fit": FitConfig, "serve": ServeScorerConfig}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("init") / "model")


@pytest.fixture(scope="module")
def validators():
    return {
        root: jsonschema.Draft202012Validator(json_schema(root))
        for root in (CampaignConfig, FitConfig, ServeScorerConfig)
    }


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("algorithm", [entry.name for entry in ALGORITHMS.entries()])
def test_every_first_project_passes_the_check(tmp_path, monkeypatch, model, validators, algorithm):
    project = tmp_path / "project"
    made = invoke("init", project, "--algorithm", algorithm, "--model", model)
    assert made.exit_code == 0, made.output
    text = (project / "config.yaml").read_text()
    assert "# Number of iterations (explore, train, sync)." in text  # help of the config classes
    validators[CampaignConfig].validate(parse_yaml(text))
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    monkeypatch.setenv("COLUMNS", "80")
    checked = invoke("check", "config.yaml")
    assert checked.exit_code == 0, (checked.output, checked.exception)
    assert checked.output.rstrip().endswith("ok")
    assert max(map(len, checked.output.splitlines())) <= 80


def test_documentation_names_the_module_of_rewards_that_init_writes():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *CONFIGS]
    named = {
        module
        for page in pages
        for module in re.findall(r'function: "?([\w.]+):\w', page.read_text())
        if not module.startswith("rayhf.")
    }
    assert named == {"rewards"}


def test_comments_of_a_first_config(tmp_path):
    invoke("init", tmp_path, "--algorithm", "ppo", "--model", "org/name", "--device", "gpu")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# PPO with a critic: GAE advantages")
    assert "  # Iterations at the start in which only the critic is trained.\n" in text
    assert "  device: gpu\n" in text and "  dtype: bfloat16\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_directory_with_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        app(["init", str(tmp_path)], standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--algorithm", "grop", "'grop' is not a known algorithm; did you mean grpo?"),
        ("--model", "./nowhere", "./nowhere is no directory"),
        ("--model", ".tiny/game/policy", "`rayhf tiny .tiny --task game` builds"),
    ],
)
def test_wrong_option_writes_nothing(tmp_path, monkeypatch, option, value, expected):
    monkeypatch.chdir(tmp_path)  # a clone's tiny world may be there
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        app(["init", str(tmp_path / "new"), option, value], standalone_mode=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_by_the_schema(validators, path):
    root = ROOTS.get(path.stem.split("_")[0], CampaignConfig)
    validators[root].validate(parse_yaml(path.read_text()))


@pytest.mark.parametrize(
    ("section", "valid"),
    [
        ({"algorithm": {"type": "ppo", "gama": 1}}, False),
        ({"algorithm": {"type": "pp"}}, False),
        ({"algorithm": "grpo"}, True),
        ({"algorithm": {"type": "online_dpo", "loss": "clipped"}}, False),  # of another family
        ({"algorithm": {"type": "online_dpo", "loss": {"beta": 0.2}}}, True),
        ({"algorithm": {"type": "my_package.mine:Mine", "anything": 1}}, True),
        ({"learner": {"lrr": 1}}, False),
        ({"trackers": "wandb"}, True),
        ({"prompts": {"train": ["a.jsonl", {"type": "hub", "dataset": "a/b"}]}}, True),
        ({"prompts": {"train": 3}}, False),
    ],
)
def test_schema_and_config_agree(validators, section, valid):
    data = parse_yaml((ROOT / "configs/tiny/ppo_words.yaml").read_text()) | section
    assert validators[CampaignConfig].is_valid(data) is valid
    if "my_package" not in str(section):
        if valid:
            load_config(data)
        else:
            with pytest.raises(ConfigError):
                load_config(data)


def test_config_prints_defaults_and_the_schema():
    shown = invoke("config", ROOT / "configs/tiny/ppo_words.yaml", "algorithm.gamma=0.5")
    assert parse_yaml(shown.output)["algorithm"]["gamma"] == 0.5
    assert parse_yaml(shown.output)["learner"]["zero_stage"] == 0
    schema = json.loads(invoke("config", "--schema", "--for", "fit-scorer").output)
    assert "objective" in schema["properties"]
    assert invoke("config").exit_code != 0
    assert invoke("config", ROOT / "configs/tiny/ppo_words.yaml", "--schema").exit_code != 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", shell], prog_name="rayhf")
    assert script.exit_code == 0 and "_RAYHF_COMPLETE" in script.output


def test_completion_offers_algorithms(monkeypatch):
    monkeypatch.setenv("_RAYHF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "rayhf init new --algorithm gr")
    monkeypatch.setenv("COMP_CWORD", "4")
    result = CliRunner().invoke(app, [], prog_name="rayhf")
    assert result.output.split() == ["grpo"]
