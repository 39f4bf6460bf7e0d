"""Malicious names in configs, run directories and commands touch no file outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from campaigns import make_config, run_campaign
from rich.console import Console

from launch.operate import show_audit, show_status, unpause
from launch.submit import plan
from rayhf.control.commands import FileControl
from rayhf.errors import CheckpointError, ConfigError, RayhfError
from rayhf.run_dir.checkpoints import Checkpoints, Retention, read_checkpoint
from rayhf.run_dir.files import MANIFEST, checksum, verify
from rayhf.run_dir.store import RunDir

PAYLOADS = [
    "..", ".", "../", "../outside", "../../outside", "../../../../../../etc/passwd",
    "./../outside", "a/../../outside", "a/b", "/etc/passwd", "/", "//etc/passwd", "/tmp",
    "/proc/self/environ", "~", "~root", "~/.ray/auth_token", "$HOME", "${HOME}/x", "..\\outside",
    "C:\\Windows", "\\\\server\\share", "..%2foutside", "%2e%2e%2foutside", "..%c0%afoutside",
    "..%00", "\x00", "a\x00b", "iteration-000002\x00/../../outside", "\n", "a\n../outside",
    "a\r\nb", "\t", " ", "", " ..", ".. ", "\uff0e\uff0e\uff0foutside",
    "\u2024\u2024/outside", "\u2025/outside", "\u2215etc\u2215passwd", "\u202e../",
    "..\u200b/outside", ".hidden", "a" * 65, "a" * 5000, "../" * 500,
    "iteration-000002/../../outside", "iteration-../outside", "\x1b[2J..", "file:///etc/passwd",
    "`touch x`", "$(touch x)", "|touch x",
]  # fmt: skip


def snapshot(root: Path) -> dict[str, str]:
    """Return the type and content of everything below `root`."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
            )
    return found


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    run_campaign(make_config(root))
    return root / "run"


@pytest.fixture
def world(campaign: Path, tmp_path: Path) -> Path:
    """A finished campaign in world/run, and files beside it that must not change."""
    shutil.copytree(campaign, tmp_path / "world/run")
    (tmp_path / "world/outside").mkdir()
    shutil.copytree(
        campaign / "checkpoints/iteration-000002", tmp_path / "world/outside/iteration-000002"
    )
    (tmp_path / "world/outside/secret").write_text("secret")
    return tmp_path / "world"


def damage(run: Path, **changes: Any) -> None:
    file = run / "campaign.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_at_least_fifty_payloads() -> None:
    assert len(set(PAYLOADS)) >= 50


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: ascii(payload)[:30])
def test_names_in_a_config(payload: str, tmp_path: Path) -> None:
    scorer = {"type": "rule", "function": "a:b"}
    for sections in (
        {"prompts": {"train": "t", "task": payload}},
        {"evaluations": {payload: {"prompts": "p", "scorer": [scorer]}}},
        {"evaluations": {"e": {"prompts": "p", "scorer": [scorer], "policy": payload}}},
        {"scorer": {"train": [{**scorer, "name": payload}]}},
    ):
        with pytest.raises(ConfigError) as refused:
            make_config(tmp_path, **sections)
        assert "\n" not in str(refused.value) and "at most 64 letters" in str(refused.value)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: ascii(payload)[:30])
def test_names_in_campaign_json(payload: str, world: Path) -> None:
    damage(world / "run", checkpoint=payload, state="paused", guards=["kl"])
    before, console = snapshot(world), Console(width=200, record=True)
    for operation in (
        lambda: RunDir(make_config(world)),
        lambda: show_status(FileControl(world / "run"), console),
        lambda: show_audit(world / "run", console, deep=True),
        lambda: unpause(FileControl(world / "run"), console, start="unhealthy"),
    ):
        with pytest.raises(CheckpointError, match=r"campaign\.json is damaged, checkpoint"):
            operation()
    after = snapshot(world)
    after.pop("run/.lock", None), before.pop("run/.lock", None)
    assert after == before


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": "../1"}, {"epoch": -1}, {"iteration": 1e400}, {"iteration": "2"},
        {"iteration": True}, {"iteration": 10**13},
        {"best": {"iteration": "../../outside", "score": 1.0}}, {"best": {"iteration": 2}},
        {"best": "x"}, {"manifest": "../" * 22}, {"state": "../outside"}, {"guards": "kl"},
        {"guards": [{}]}, {"reason": ["x"]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_in_campaign_json(changes: dict[str, Any], world: Path) -> None:
    damage(world / "run", **changes)
    with pytest.raises(CheckpointError, match=r"campaign\.json is damaged"):
        RunDir(make_config(world))


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: ascii(payload)[:30])
def test_names_in_a_manifest(payload: str, world: Path) -> None:
    """The manifest's own checksum is valid."""
    before = snapshot(world / "outside")
    folder = world / "run/checkpoints/iteration-000004"
    original = (folder / MANIFEST).read_text()
    for rename in (True, False):
        facts = json.loads(original)
        facts.pop("checksum")
        files = facts["files"]
        files[payload] = files.pop(next(iter(files))) if rename else next(iter(files.values()))
        (folder / MANIFEST).write_text(json.dumps({**facts, "checksum": checksum(facts)}))
        with pytest.raises(CheckpointError, match=r"is missing|is not in the manifest"):
            verify(folder)
    store = RunDir(make_config(world))
    assert store.latest().iteration == 2  # the one before
    store.close()
    assert snapshot(world / "outside") == before


@pytest.mark.parametrize(
    "facts",
    [
        {}, {"files": []}, {"files": {"state.json": []}},
        {"files": {"state.json": {"bytes": 1}}}, {"files": "x"}, {"iteration": "../x"},
        {"iteration": 2},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_manifest(facts: dict[str, Any], world: Path) -> None:
    folder = world / "run/checkpoints/iteration-000004"
    if "iteration" in facts:
        facts = {**json.loads((folder / MANIFEST).read_text()), **facts}
        facts.pop("checksum")
    (folder / MANIFEST).write_text(json.dumps({**facts, "checksum": checksum(facts)}))
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_links_out_of_the_run_directory_are_not_followed(world: Path) -> None:
    checkpoints, before = world / "run/checkpoints", snapshot(world / "outside")
    store = RunDir(make_config(world))
    for name in ("iteration-000004", "iteration-000002"):
        shutil.rmtree(checkpoints / name)
    (checkpoints / "iteration-000002").symlink_to(world / "outside/iteration-000002")
    (checkpoints / ".saving-000001").symlink_to(world / "outside")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        verify(checkpoints / "iteration-000002")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        store.latest()
    with pytest.raises(RayhfError):
        store.checkpoints.begin()
    store.close()
    retention = Retention(last=1, every=0, best=False)
    thin = Checkpoints(checkpoints, epoch=9, retention=retention, check=lambda: None)
    (checkpoints / "iteration-000001").symlink_to(world / "outside/iteration-000002")
    (checkpoints / "iteration-000003").mkdir()
    thin.prune(None)
    assert snapshot(world / "outside") == before


def test_link_among_checkpoint_files(world: Path) -> None:
    folder = world / "run/checkpoints/iteration-000004"
    shutil.move(folder / "state.json", world / "state.json")
    (folder / "state.json").symlink_to(world / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is a symbolic link"):
        verify(folder)


@pytest.mark.parametrize(
    "payload", [p for p in PAYLOADS if "\x00" not in p], ids=lambda payload: ascii(payload)[:30]
)
def test_job_names_are_sanitized(
    payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    from rayhf.config.load import dump_config

    (tmp_path / "c.yaml").write_text(dump_config(make_config(tmp_path)))
    monkeypatch.chdir(tmp_path)
    job = plan(
        Path("c.yaml"),
        [f"run.dir={json.dumps('/shared/' + payload)}"],
        env=(),
        cpus=None,
        supervised=False,
    )
    assert re.fullmatch(r"rayhf-[a-z0-9-]{0,41}[0-9a-f]{8}", job.name), job.name
