"""Mistakes that this machine knows are reported together, before anything is downloaded."""

import pytest
from campaigns import make_config

from rayhf.errors import ConfigError, listed
from rayhf.models.source import missing_hint
from rayhf.planning.inputs import function_fingerprints, user_functions
from rayhf.planning.local_checks import check_local


def config_of(directory, **sections):
    """A config whose files are all there."""
    (directory / "train.jsonl").write_text('{"prompt": "a"}\n')
    (directory / "own.py").write_text("def score(completion):\n    return 1.0\n")
    given = {
        "policy": {"model": "org/name"},
        "prompts": {"train": "train.jsonl"},
        "scorer": {"train": [{"type": "rule", "function": "own:score"}]},
    }
    return make_config(directory, **(given | sections))


def test_every_local_mistake_is_named_before_the_download(tmp_path):
    check_local(config_of(tmp_path), base=tmp_path)
    config = config_of(
        tmp_path,
        prompts={"train": "train.jsonl", "heldout": ["nothing.jsonl", "train.jsonl"]},
        reference={"model": "./models/none"},
        scorer={"train": [{"type": "rule", "function": "own:scor"}]},
    )
    with pytest.raises(ConfigError) as refused:
        check_local(config, base=tmp_path)
    text = str(refused.value)
    assert text.startswith("3 problems: (1) reference.model: no such model directory")
    assert "; (2) prompts.heldout[0]: no such file" in text
    assert "; (3) scorer.train[0]: rule own:scor" in text and "did you mean score?" in text


def test_one_mistake_is_one_line_without_a_number(tmp_path):
    config = config_of(tmp_path, prompts={"train": "nothing.jsonl"})
    with pytest.raises(ConfigError, match=r"^prompts\.train: no such file or directory"):
        check_local(config, base=tmp_path)


@pytest.mark.parametrize(
    ("where", "command"),
    [
        (".tiny/game/policy", "rayhf tiny .tiny --task game"),
        ("../.tiny/words/policy", "rayhf tiny ../.tiny --task words"),
    ],
)
def test_missing_files_of_the_tiny_world_say_how_to_build_them(
    tmp_path, monkeypatch, where, command
):
    folder = tmp_path / "task"
    folder.mkdir()
    monkeypatch.chdir(folder)
    train = where.replace("policy", "train.jsonl")
    config = config_of(folder, policy={"model": where}, prompts={"train": train})
    with pytest.raises(ConfigError) as refused:
        check_local(config, base=folder)
    assert str(refused.value).count(f"`{command}` builds") == 2


def test_more_than_five_problems_are_counted():
    assert listed(["a", "b"]) == "2 problems: (1) a; (2) b"
    assert listed([*"abcdefg"]).endswith(
        "; (5) e; 2 more, which are shown once these are corrected"
    )


def test_misspelled_path_gets_the_nearest_name_of_its_directory(tmp_path):
    (tmp_path / ".tiny/game/policy").mkdir(parents=True)
    missing = {"policy": {"model": "./.tiny/game/polciy"}, "prompts": {"train": "trian.jsonl"}}
    with pytest.raises(ConfigError) as refused:
        check_local(config_of(tmp_path, **missing), base=tmp_path)
    text = str(refused.value)
    assert "did you mean policy?" in text and "did you mean train.jsonl?" in text
    assert "builds in minutes" not in text
    assert missing_hint(tmp_path / "trian.jsonl") == "; did you mean train.jsonl?"
    assert missing_hint(tmp_path / "nowhere/a.jsonl") == ""


def test_files_of_functions_have_fingerprints(tmp_path):
    config = config_of(tmp_path)
    (before,) = function_fingerprints(user_functions(config), tmp_path).items()
    (tmp_path / "own.py").write_text("def score(completion):\n    return 2.0\n")
    (after,) = function_fingerprints(user_functions(config), tmp_path).items()
    assert before[0] == after[0] == "own.py" and before[1] != after[1]
    (tmp_path / "own.py").unlink()  # installed, or nowhere: nothing to compare
    assert function_fingerprints(user_functions(config), tmp_path) == {}
