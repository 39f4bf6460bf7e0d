"""Faults of a run directory: kills during commits, flipped bits, a full disk, stale actors."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from campaigns import make_config, run_campaign
from fakes import checkpoint_state

from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from rayhf.errors import CheckpointError, FencedError, LockedError, StorageError
from rayhf.monitoring.audit import audit
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.run_dir.files import seal, verify
from rayhf.run_dir.state import Best, read_state, write_state
from rayhf.run_dir.store import RunDir

WRITER = Path(__file__).with_name("commit_writer.py")
"""Kills processes during commits and counts what was lost; `make chaos` uses it 200 times."""


def problems(config):
    return [finding for finding in audit(config.run.dir, deep=True) if finding.problem]


def test_kill_during_commit_loses_no_acknowledged_commit(tmp_path):
    done = subprocess.run(
        [sys.executable, WRITER, tmp_path / "run", "25", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["inside"] > 0 and counts["commits"] > 0, counts
    assert counts["lost"] == counts["corrupt"] == 0, counts


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_flipped_bits_and_truncations_are_detected(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    folder = config.run.dir / "checkpoints/iteration-000004"
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert problems(config) == []
    rng = random.Random(0)
    for turn in range(200):
        file = rng.choice(files)
        whole = file.read_bytes()
        if turn % 4 == 3:
            file.write_bytes(whole[: rng.randrange(len(whole))])
        else:
            flip(file, rng)
        with pytest.raises(CheckpointError):
            verify(folder)
        file.write_bytes(whole)
    assert problems(config) == []


def test_replaced_checkpoint_is_detected(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    folder = config.run.dir / "checkpoints/iteration-000004"
    folder.rename(tmp_path / "other")
    (tmp_path / "other/MANIFEST.json").unlink()
    (tmp_path / "other/learner/steps").write_text("9")
    seal(tmp_path / "other", folder, {"iteration": 4})
    verify(folder)  # it is consistent with itself
    (finding,) = problems(config)
    assert "the manifest of iteration-000004 is not the one that was committed" in finding.problem


def test_sealed_but_uncommitted_checkpoint_is_used(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    changes = {"iteration": 2, "checkpoint": "iteration-000002", "state": "running"}
    state = read_state(config.run.dir)
    write_state(config.run.dir, state.model_copy(update=changes))
    store = RunDir(config)
    assert store.latest().iteration == 4
    store.close()


def test_committed_campaign_never_starts_from_scratch(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    for folder in (config.run.dir / "checkpoints").glob("iteration-*"):
        flip(folder / "state.json", random.Random(1))
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        run_campaign(make_config(tmp_path, run={"iterations": 6}))
    assert len(list((config.run.dir / "checkpoints").glob(".corrupt-*"))) == 2


def test_retention_keeps_newest_every_nth_and_best(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.5, 7: 0.6, 8: 0.7}
    store = RunDir(make_config(tmp_path, run={"keep_checkpoints": 2, "keep_every": 4}))
    for iteration, score in scores.items():
        temporary = store.checkpoints.begin()
        (temporary / "weights").write_text(str(score))
        store.commit(temporary, checkpoint_state(iteration), campaign_state="running", score=score)
    kept = sorted(int(p.name[-6:]) for p in store.checkpoints.root.glob("iteration-*"))
    store.close()
    assert kept == [2, 4, 7, 8]
    assert store.state.best == Best(iteration=2, score=0.9)


def test_full_disk_leaves_last_commit_intact(tmp_path):
    import resource

    config = make_config(tmp_path)
    store = RunDir(config)
    temporary = store.checkpoints.begin()
    (temporary / "weights").write_bytes(b"x" * 1000)
    store.commit(temporary, checkpoint_state(1), campaign_state="running", score=None)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        temporary = store.checkpoints.begin()
        with pytest.raises(StorageError):
            large = checkpoint_state(2, much="x" * 1000)
            store.commit(temporary, large, campaign_state="running", score=None)
        with pytest.raises(StorageError):
            store.append_metrics({"iteration": 2.0, **{f"metric{i}": 0.0 for i in range(100)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.latest().iteration == 1
    store.close()


def test_actor_of_earlier_attempt_may_not_write(tmp_path):
    config = make_config(tmp_path)
    first = RunDir(config)
    stale = EpochGuard(first.path, first.epoch)
    stale.check()
    first.close()
    second = RunDir(config)
    with pytest.raises(FencedError, match="is at epoch 2, this process belongs to epoch 1"):
        stale.check()
    EpochGuard(second.path, second.epoch).check()
    second.close()
    (config.run.dir / "campaign.json").unlink()
    with pytest.raises(FencedError, match="cannot be read"):
        EpochGuard(second.path, second.epoch).check()


@pytest.mark.parametrize("actor_class", [LearnerActor, ReferenceActor])
def test_stale_actor_writes_nothing(tmp_path, actor_class):
    config = make_config(tmp_path)
    written = []
    first = RunDir(config)
    actor = actor_class()
    actor.epoch_guard = EpochGuard(first.path, first.epoch)
    actor.engine = SimpleNamespace(save=written.append, export=written.append)
    actor.save(Path("in time"))
    first.close()
    RunDir(config).close()
    for write in [actor.save] + ([actor.export] if actor_class is LearnerActor else []):
        with pytest.raises(FencedError):
            write(Path("too late"))
    assert written == [Path("in time")]


def test_second_launcher_is_refused_and_changes_nothing(tmp_path):
    config = make_config(tmp_path)
    store = RunDir(config)
    before = {file: file.read_bytes() for file in config.run.dir.rglob("*.json")}
    for _ in range(10):
        with pytest.raises(LockedError, match=r"in use by host .*, pid \d+, since"):
            RunDir(config)
    assert {file: file.read_bytes() for file in config.run.dir.rglob("*.json")} == before
    store.close()
