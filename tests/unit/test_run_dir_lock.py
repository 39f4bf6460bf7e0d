"""The lock file and the exact names of a run directory."""

import os
import subprocess
import sys

import pytest
from campaigns import make_config, run_campaign

from rayhf.control.status import lock_holder
from rayhf.errors import FencedError
from rayhf.run_dir.lock import RunLock, is_locked
from rayhf.run_dir.names import numbered
from rayhf.run_dir.state import read_state, write_state
from rayhf.run_dir.store import RunDir


def test_lock_is_seen_by_its_device_and_inode(tmp_path):
    lock = RunLock(tmp_path / "run")
    assert is_locked(tmp_path / "run") and f"pid {os.getpid()}" in lock_holder(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").write_text("host elsewhere, pid 7")
    assert not is_locked(tmp_path / "other")
    lock.release()
    assert not (tmp_path / "run").exists()


def test_replaced_lock_file_is_not_released_by_its_former_holder(tmp_path):
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run/.lock").rename(tmp_path / "kept")  # so that its inode is not used again
    (tmp_path / "run/.lock").write_text("another's")
    with pytest.raises(FencedError, match=r"\.lock was replaced while this process held the lock"):
        lock.check()
    lock.release()
    assert (tmp_path / "run/.lock").read_text() == "another's"


def test_later_attempt_fences_a_launcher_that_still_holds_its_lock(tmp_path):
    store = RunDir(make_config(tmp_path))
    write_state(store.path, store.state.model_copy(update={"epoch": store.epoch + 1}))
    for write in (
        lambda: store.set_state("paused"),
        lambda: store.append_metrics({"iteration": 1}),
    ):
        with pytest.raises(FencedError, match="is at epoch 2, this process belongs to epoch 1"):
            write()
    store.close()


def test_epoch_rises_above_earlier_attempts_of_an_older_campaign_json(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    older = read_state(config.run.dir)
    RunDir(config).close()
    write_state(config.run.dir, older)
    store = RunDir(config)
    assert store.epoch == 3
    store.close()


def test_only_exact_names_are_listed(tmp_path):
    for name in (
        "a-000002.x",
        "a-000010.x",
        "a-1000000.x",
        "a-0000003.x",
        "a-00004.x",
        "a-000005.x~",
    ):
        (tmp_path / name).write_text("")
    assert list(numbered(tmp_path, "a-", ".x")) == [2, 10, 1_000_000]
    assert numbered(tmp_path / "missing", "a-") == {}


def test_second_launcher_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "run").mkdir()
    config = tmp_path / "c.yaml"
    config.write_text("run: {dir: elsewhere}\nalgorithm: {type: online_dpo}\n")
    lock = RunLock(tmp_path / "run")
    command = f"""
import sys
from launch.main import main
sys.argv = ["rayhf", "run", {str(config)!r}, "run.dir={tmp_path / "run"}"]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    lock.release()
    assert done.returncode == 4 and "is in use by" in done.stderr
    assert done.stdout == "False\n"
