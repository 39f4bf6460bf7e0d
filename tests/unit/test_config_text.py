"""The text of configs: YAML 1.2, nothing twice, bounded; paths and truth values."""

import pytest
import yaml
from test_config import MINIMAL

from rayhf.config.load import load_config
from rayhf.config.yaml_text import dump_yaml, parse_yaml
from rayhf.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-11-30", "2026-11-30"),
        ("1e-5", 1e-5),
        ("null", None),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: key 'a' stands twice, first in line 1"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("[" * 3000, "nested too deeply"),
        ("[" * 150 + "]" * 150, "nested more than 100 levels deep"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        (
            "a0: &a0 [1, 2]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
            "more than 100,000 values, counting aliases",
        ),
        (
            "a0: &a0 {k: 1}\n"
            + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30)),
            "merges more than 100,000 values",
        ),
        ("a" * 300_000, "300,000 characters; expected at most 262,144"),
    ],
)
def test_refused_documents(text, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        parse_yaml(text)
    assert message in str(error.value)


def test_dumped_text_reads_back():
    value = {"z": ["010", "yes", "0o17", "1e5", "1:30", "#", ""], "a": {"b": 1e-5, "c": None}}
    assert parse_yaml(dump_yaml(value)) == value
    assert list(parse_yaml(dump_yaml(value))) == ["z", "a"]


def test_section_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + "learner: {lr: 1.0e-4}\nlearner: {epochs: 2}\n")
    with pytest.raises(ConfigError, match=r"line \d+, column 1: key 'learner' stands twice"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.iterations=010", lambda config: config.run.iterations, 10),
        ("run.dir=runs/a #1", lambda config: str(config.run.dir), "runs/a #1"),
        ("run.dir=~/x", lambda config: str(config.run.dir), "/somewhere/x"),
        ("run.dir=$WORK/x", lambda config: str(config.run.dir), "/elsewhere/x"),
        (
            "prompts.train=~/p.jsonl",
            lambda config: str(config.prompts.train[0].path),
            "/somewhere/p",
        ),
        ("trackers=off", lambda config: config.trackers, ()),
        ("trackers=wandb", lambda config: config.trackers[0].type, "wandb"),
        ("rollout.stop=['#']", lambda config: config.rollout.stop, ("#",)),
    ],
)
def test_overrides_mean_what_they_say(monkeypatch, override, read, value):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("WORK", "/elsewhere")
    got = read(load_config(MINIMAL, [override]))
    assert got.startswith(value) if override.startswith("prompts") else got == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.iterations=yes", "run.iterations: input should be a valid integer"),
        ("learner.lr=true", "learner.lr: expected a number, got true"),
        ("learner.betas=[true, 0.9]", "learner.betas: expected a number, got [true, 0.9]"),
        ("seed=1:30", "seed: input should be a valid integer"),
        ("seed=" + "1" * 5000, "the value is not valid YAML (Exceeds the limit"),
        ("run.dir=" + "[" * 3000, "the value is not valid YAML (nested too deeply)"),
        ("scorer.train.².weight=2", "expected an index from 0 to 0, got '²'"),
        ("run.dir=$NOT_SET/x", "run.dir: $NOT_SET/x: the environment variable NOT_SET is not set"),
        ("run.dir=~nobody-here/x", "there is no such user"),
    ],
)
def test_refused_overrides(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(MINIMAL, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
