"""`rayhf run --supervise`: which ends of the campaign are restarted."""

import signal
import subprocess
import sys

import pytest
from rich.console import Console
from waiting import is_running, wait_until

from launch.supervise import CRASHES, _committed, supervise
from rayhf.errors import ActorLostError

COUNT = """
import os, signal
from pathlib import Path
file = Path(__file__).with_name("starts")
start = int(file.read_text()) + 1 if file.exists() else 1
file.write_text(str(start))
"""
"""Start of a child's script: `start` counts its starts from 1."""


def run_supervised(tmp_path, monkeypatch, script):
    """Run `supervise` with a script in place of the campaign."""
    file = tmp_path / "child.py"
    file.write_text(script)
    real = subprocess.Popen
    monkeypatch.setattr(
        "launch.supervise.subprocess.Popen",
        lambda command, **options: real([sys.executable, file], **options),
    )
    monkeypatch.setattr("launch.supervise._FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("launch.supervise._MAX_WAIT_S", 0.0)
    return supervise(["run"], tmp_path / "run", Console(width=200, force_terminal=False))


def starts(tmp_path):
    return int((tmp_path / "starts").read_text())


def test_crashed_campaign_is_restarted_until_it_is_done(tmp_path, monkeypatch):
    script = COUNT + "os.kill(os.getpid(), signal.SIGKILL) if start < 4 else exit(0)"
    assert run_supervised(tmp_path, monkeypatch, script) == 0
    assert starts(tmp_path) == 4


@pytest.mark.parametrize("code", [2, 4, 5, 9, 12, 75])
def test_permanent_failure_is_not_restarted(tmp_path, monkeypatch, code):
    assert run_supervised(tmp_path, monkeypatch, COUNT + f"exit({code})") == code
    assert starts(tmp_path) == 1


def test_crash_loop_ends(tmp_path, monkeypatch):
    with pytest.raises(
        ActorLostError, match=f"crashed {CRASHES + 1} times in a row without a new commit"
    ):
        run_supervised(tmp_path, monkeypatch, "exit(10)")


@pytest.mark.parametrize("code", [8, 13])
def test_restarts_without_disk_or_scorer_are_not_limited(tmp_path, monkeypatch, code):
    script = COUNT + f"exit({code} if start <= {2 * CRASHES} else 0)"
    assert run_supervised(tmp_path, monkeypatch, script) == 0
    assert starts(tmp_path) == 2 * CRASHES + 1


def test_campaign_does_not_outlive_its_supervisor(tmp_path):
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "import subprocess, sys; from launch.supervise import _end_with_parent;"
        f"command = [sys.executable, '-c', {child!r}, sys.argv[1]];"
        "subprocess.Popen(command, preexec_fn=_end_with_parent).wait()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, tmp_path / "pid"])
    file = tmp_path / "pid"
    wait_until(lambda: file.exists() and file.read_text())
    pid = int(file.read_text())
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not is_running(pid))


def test_supervisor_forwards_signals_and_does_not_restart(tmp_path, monkeypatch):
    script = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *arguments: exit(75))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)
"""
    before = signal.getsignal(signal.SIGTERM)
    assert run_supervised(tmp_path, monkeypatch, script) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_committed_without_a_run_directory(tmp_path):
    assert _committed(tmp_path / "nothing") == -1


def test_users_launch_py_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "launch.py").write_text("open('executed', 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert supervise(["--help"], tmp_path / "run", Console(force_terminal=False)) == 0
    assert not (tmp_path / "executed").exists()
