"""Names of models in a config: directory or hub name, and how a config's names are replaced."""

from pathlib import Path

import pytest

from rayhf.config.load import dump_config, load_config
from rayhf.config.models import ModelName, map_models
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory

COMMIT = "0123456789" * 4
CONFIG = {
    "run": {"dir": "runs/x", "iterations": 1},
    "policy": {"model": "org/policy@main"},
    "reference": {"model": "./reference"},
    "prompts": {"train": "train.jsonl"},
    "algorithm": {"type": "spar", "refiner": {"model": "org/refiner"}},
    "scorer": {
        "train": [
            {"type": "reward_model", "model": "org/reward"},
            {"type": "judge", "model": "org/judge", "name": "judge"},
        ]
    },
    "learner": {"critic_model": "org/critic"},
}


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
        ("Qwen/Qwen3-0.6B@v1.0", "Qwen/Qwen3-0.6B", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("./org/name", None, None),
        ("/models/name", None, None),
        ("models/org/name", None, None),
        ("name", None, None),
        (".tiny/policy", None, None),
    ],
)
def test_hub_names_and_paths(text, repository, revision):
    name = ModelName.parse(text)
    assert (name.repository, name.revision, str(name)) == (repository, revision, text)


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MODELS", "/models")
    assert str(ModelName.parse("~/policy")) == "/home/me/policy"
    assert str(ModelName.parse("$MODELS/policy")) == "/models/policy"
    with pytest.raises(ValueError, match="NOT_SET is not set"):
        ModelName.parse("$NOT_SET/policy")


@pytest.mark.parametrize("value", ["", 3, None, ["org/name"], "org/name@"])
def test_what_cannot_be_a_model_is_refused(value):
    config = CONFIG | {"policy": {"model": value}}
    with pytest.raises(ConfigError, match=r"policy\.model: .*expected a (model directory|branch)"):
        load_config(config)


def test_every_model_of_a_config_is_replaced_and_nothing_else():
    config = load_config(CONFIG)
    seen: dict[str, str] = {}

    def pin(key: str, name: ModelName) -> ModelName:
        seen[key] = str(name)
        return name.at(COMMIT) if name.repository else name

    pinned = map_models(config, pin)
    assert seen == {
        "policy.model": "org/policy@main",
        "reference.model": "./reference",
        "algorithm.refiner.model": "org/refiner",
        "scorer.train[0].model": "org/reward",
        "scorer.train[1].model": "org/judge",
        "learner.critic_model": "org/critic",
    }
    text = dump_config(config)
    for name in ("policy@main", "refiner", "reward", "judge", "critic"):
        text = text.replace(f"org/{name}\n", f"org/{name.removesuffix('@main')}@{COMMIT}\n")
    assert dump_config(pinned) == text
    assert map_models(config, lambda key, name: name) is config


def test_pinned_name_is_a_snapshot_in_the_cache_and_a_path_stays_one(tmp_path):
    pinned = ModelName("org/name").at(COMMIT)
    directory = local_directory(pinned, tmp_path)
    assert directory.parts[-3:] == ("models--org--name", "snapshots", COMMIT)
    assert pinned.below(tmp_path) == pinned
    assert local_directory(ModelName("policy").below(tmp_path)) == tmp_path / "policy"
    assert local_directory(ModelName("/policy"), tmp_path) == Path("/policy")
