"""Bad input is refused with one line on stderr and exit code 2, before anything starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaign_runs import RAYHF
from world import make_world, write_config

from launch import cli
from rayhf.tiny.tokenizer import REWARD_FORMAT, train_tokenizer

pytestmark = pytest.mark.timeout(60, func_only=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("bad"))


def refuse(
    world: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run a command in this process, which saves the imports; return its line of refusal."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["rayhf", *arguments])
    monkeypatch.delenv("RAYHF_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2, error
    assert error.startswith("rayhf: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lrr=1", "unknown key learner.lrr; did you mean lr?"),
        ("learner.lr=fast", "learner.lr: input should be a valid number"),
        (
            "learner.prompts_per_step=3",
            "does not divide prompts.batch 4; nearest valid values: 1, 2, 4",
        ),
        ("prompts.batch=100", "train.jsonl has only 24 different prompts; expected at most 24"),
        ("policy.model=polic", "policy.model: no such model directory"),
        ("policy.model=.", "has no config.json"),
        ("prompts.train=nothing.jsonl", "prompts.train: no such file"),
        ("rollout.max_tokens=400", "rollout.max_tokens is 400"),
        ("rollout.max_tokens=126", "train.jsonl row 1: the prompt has"),
        ("rollout.tensor_parallel=3", "policy has 2 attention heads; expected a divisor: 1, 2"),
        (
            "cluster.device=gpu",
            "3 GPU requested (rollout 1, learner 1, reference 1), 0 available on 1 node(s)",
        ),
        (
            "cluster.resources={rollout: {moon: 1}}",
            "1 moon requested (rollout 1), 0 available on 1 node(s)",
        ),
        ("cluster.address=10.255.255.1:1", "no Ray cluster responds there"),
        ("scorer.train.0.function=my_rules:evven", "did you mean even?"),
        ("scorer.train.0.function=nothing:here", "there is no module nothing"),
        ("scorer.train=[{type: reward_model, model: policy}]", "scorer.train[0]"),
        ("run.dir=/proc/rayhf", "run.dir /proc/rayhf cannot be written"),
    ],
)
def test_refused_before_anything_starts(
    world: Path,
    override: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(world, "base")
    command = "check" if override.startswith("rollout.tensor") else "run"
    assert expected in refuse(world, [command, str(config), override], monkeypatch, capsys)
    assert not (world / "base" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "bad.jsonl is empty"),
        (
            '{"prompt": "a"}\n{"prompt": 3}\n',
            "bad.jsonl row 2: `prompt` must be text or a list of messages, got 3",
        ),
        ('{"prompt": "a"}\nnot json\n', "bad.jsonl row 2: not valid JSON"),
        (
            '{"question": "a"}\n',
            "bad.jsonl row 1: expected either `prompt` (text or messages) or `messages` (list), "
            "got keys question",
        ),
        (
            '{"messages": [{"role": "user"}]}\n',
            "bad.jsonl row 1: a message of `messages` must have `content` (text",
        ),
        (
            '{"prompt": "a", "answer": [1]}\n',
            "bad.jsonl row 1: `answer` must be text or a number",
        ),
        (json.dumps({"prompt": "long " * 400}) + "\n", "bad.jsonl row 1: the prompt has"),
    ],
)
def test_bad_prompt_files_are_named_by_row(
    world: Path,
    content: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (world / "bad.jsonl").write_text(content)
    config = write_config(world, "rows", prompts={"train": "bad.jsonl"})
    assert expected in refuse(world, ["run", str(config)], monkeypatch, capsys)


def test_tokenizer_without_chat_template(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "policy", world / "mute", dirs_exist_ok=True)
    (world / "mute/chat_template.jinja").unlink()
    config = write_config(world, "mute-run", policy={"model": "mute"})
    assert "has no chat template" in refuse(world, ["run", str(config)], monkeypatch, capsys)


def test_reference_with_another_tokenizer(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "policy", world / "other", dirs_exist_ok=True)
    train_tokenizer(
        ["quite other words"] * 3, REWARD_FORMAT, max_vocab=290, max_length=128
    ).save_pretrained(world / "other")
    config = write_config(world, "other-run", reference={"model": "other"})
    line = refuse(world, ["run", str(config)], monkeypatch, capsys)
    assert (
        "reference.model: its tokenizer (" in line
        and "differs from the one of policy.model" in line
    )


def test_run_directory_of_another_campaign(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayhf.config.load import load_config
    from rayhf.run_dir.store import RunDir

    config = write_config(world, "taken")
    monkeypatch.chdir(world)
    RunDir(load_config(config)).close()
    line = refuse(world, ["run", str(config), "seed=6"], monkeypatch, capsys)
    assert "taken holds another campaign: seed was 5, now 6; choose another run.dir" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nothing.yaml"], "config nothing.yaml: no such file"),
        (["export", "nothing", "out"], "nothing has no exported policy yet"),
        (["tiny", "/proc/x"], "cannot make /proc/x"),
    ],
)
def test_other_commands(
    world: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in refuse(world, arguments, monkeypatch, capsys)


def test_installed_command_and_its_exit_codes(world: Path) -> None:
    done = subprocess.run(
        [RAYHF, "run", "missing.yaml"], cwd=world, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "rayhf: config missing.yaml: no such file"
    )
    version = subprocess.run([RAYHF, "--version"], capture_output=True, text=True, timeout=60)
    assert version.stdout == "rayhf 0.1.0\n"
    incomplete = subprocess.run([RAYHF, "run"], capture_output=True, text=True, timeout=60)
    assert incomplete.returncode == 2
