"""An operator's commands, from files alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from campaigns import make_config, metrics_of, play
from fakes import FakeRollout, SilentObserver
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from launch.operate import exit_codes, show_audit
from launch.supervise import CRASHES, supervise
from rayhf.control.commands import FileControl
from rayhf.control.status import read_status
from rayhf.errors import (
    ActorLostError,
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    PausedError,
)
from rayhf.monitoring.audit import audit
from rayhf.monitoring.event_log import EventLog
from rayhf.run_dir.operator_request import read_request, write_request
from rayhf.run_dir.progress import Progress
from rayhf.run_dir.store import RunDir


def screen():
    return Console(width=200, force_terminal=False, record=True)


@pytest.fixture
def finished(tmp_path):
    config = make_config(tmp_path)
    play(config)
    return config


def test_a_finished_campaign(finished):
    status = read_status(finished.run.dir)
    assert (status.state, status.iteration, status.holder, status.fault_count) == ("done", 4, "", 0)
    assert status.commit.startswith("iteration-000004") and status.versions == {
        "policy/version": 4.0
    }
    shown = CliRunner().invoke(app, ["status", str(finished.run.dir)]).output
    assert "DONE" in shown and "4 of 4" in shown


def test_status_is_quick_and_imports_nothing_heavy(finished):
    code = "import sys; from launch.operate import *; from rayhf.control.status import read_status; from pathlib import Path;"
    code += "read_status(Path(sys.argv[1])); print([m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, finished.run.dir], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_who_holds_the_lock_is_seen_without_taking_it(tmp_path):
    store = RunDir(make_config(tmp_path))
    status = read_status(store.path)
    assert f"pid {os.getpid()}" in status.holder and status.state == "running"
    store.close()
    assert read_status(store.path).holder == ""


def test_a_campaign_that_went_away_says_what_is_known(tmp_path):
    config = make_config(tmp_path, run={"checkpoint_every": 1})
    store = RunDir(config)
    store.set_state("running")
    store.event("fault", "rollout engine 0 is replaced: it died")
    store.close()
    status = read_status(config.run.dir)
    assert status.state == "crashed" and "without reporting an error" in status.reason
    assert status.fault_count == 1 and "rollout engine 0" in status.faults[0]
    assert "the same `rayhf run` command continues after iteration 0" in status.advice


def test_a_stall_is_named(tmp_path):
    store = RunDir(make_config(tmp_path, run={"stall_s": 10}))
    store.write_progress(Progress(iteration=1, phase="explore", done=3, total=4, time=time.time()))
    assert read_status(store.path).state == "running"
    late = read_status(store.path, now=time.time() + 60)
    assert (
        late.state == "stalled"
        and late.phase == "iteration 1, explore 3/4"
        and "no progress for 60 s" in late.reason
    )
    store.close()


def test_rounds_that_report_in_turn_are_not_written_down_each_time(tmp_path):
    store = RunDir(make_config(tmp_path))
    recorder = EventLog(store, SilentObserver())
    for done in range(50):
        for iteration in (1, 2):
            recorder.phase(iteration, "explore", done, 50)
    recorder.phase(1, "learn")
    store.close()
    events = [
        json.loads(line) for line in (store.attempt / "events.jsonl").read_text().splitlines()
    ]
    assert [(e["iteration"], e["message"]) for e in events] == [
        (1, "explore"),
        (2, "explore"),
        (1, "learn"),
    ]


def test_who_waits_for_a_scorer_is_paused_and_says_for_what(tmp_path):
    store = RunDir(make_config(tmp_path))
    recorder = EventLog(store, SilentObserver())
    recorder.phase(1, "explore", 3, 4)
    recorder.event("pause", "the scorer is down")
    status = read_status(store.path)
    assert (status.state, status.reason) == (
        "paused",
        "the scorer is down",
    ) and "resumes automatically" in status.advice
    recorder.event("unpause", "the scorer is back")
    assert read_status(store.path).state == "running"
    store.close()


def test_a_campaign_on_another_host_is_known_by_its_heartbeat(tmp_path):
    store = RunDir(make_config(tmp_path))
    recorder = EventLog(store, SilentObserver())
    recorder.phase(1, "explore", 3, 4)
    store.set_state("running")
    store.close()
    (store.path / ".lock").write_text("host elsewhere, pid 7, since then")
    progress = json.loads((store.path / "progress.json").read_text())
    quiet = {
        **progress,
        "time": progress["time"] - 300,
    }  # nothing has moved for a while, but the process is there
    (store.path / "progress.json").write_text(json.dumps(quiet))
    assert read_status(store.path).state == "running"
    (store.path / "progress.json").write_text(
        json.dumps({**quiet, "alive": progress["alive"] - 300})
    )
    assert read_status(store.path).state == "crashed"


@pytest.mark.parametrize("command", ["status", "verify", "pause", "unpause", "stop"])
def test_what_is_no_run_directory_is_refused(tmp_path, command):
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert isinstance(result.exception, ConfigError) and "not a run directory" in str(
        result.exception
    )


class Watching(FakeRollout):
    """Leaves word for its own campaign when it is asked for the n-th time."""

    def __init__(self, run, at, wanted):
        super().__init__()
        self.run, self.at, self.wanted = run, at, wanted

    async def generate(self, requests, *, version):
        if len(self.calls) == self.at:
            write_request(self.run, self.wanted)
        return await super().generate(requests, version=version)


def test_stop_commits_the_round_and_the_same_command_continues(tmp_path):
    whole, config = (
        make_config(tmp_path / "whole"),
        make_config(tmp_path, run={"checkpoint_every": 0}),
    )
    play(whole)
    with pytest.raises(InterruptedRunError, match="stopped after iteration 2"):
        play(config, rollout=Watching(config.run.dir, 3, "stop"))
    assert read_status(config.run.dir).iteration == 2
    write_request(config.run.dir, "run")
    play(config)
    assert metrics_of(config) == metrics_of(whole)


def test_a_paused_campaign_waits_until_it_may_go_on(tmp_path):
    import threading

    config = make_config(tmp_path)

    def release():
        deadline = time.monotonic() + 30
        while read_status(config.run.dir).state != "paused" and time.monotonic() < deadline:
            time.sleep(0.02)
        FileControl(config.run.dir).unpause()

    RunDir(config).close()
    operator = threading.Thread(target=release)
    operator.start()
    play(config, rollout=Watching(config.run.dir, 3, "pause"))
    operator.join()
    assert read_request(config.run.dir) == "run" and read_status(config.run.dir).state == "done"


def test_only_a_running_campaign_can_be_asked(finished):
    with pytest.raises(ConfigError, match="is done: there is nothing to pause"):
        FileControl(finished.run.dir).request("pause")
    with pytest.raises(ConfigError, match="is done, not paused"):
        FileControl(finished.run.dir).unpause()


def test_a_guard_pauses_commits_nothing_more_and_may_be_overruled(tmp_path):
    config = make_config(
        tmp_path,
        run={"iterations": 4, "checkpoint_every": 1},
        guards={"length": {"warn": None, "pause": None}},
    )
    low = {"kl": {"warn": 1e-9, "pause": 1e-8}}
    strict = make_config(tmp_path, run={"iterations": 8, "checkpoint_every": 1}, guards=low)
    play(config)

    original = RunDir.append_metrics
    RunDir.append_metrics = lambda self, metrics: original(self, {**metrics, "reference/kl": 5.0})
    try:
        with pytest.raises(PausedError, match="kl"):
            play(strict)
        status = read_status(config.run.dir)
        assert status.state == "paused" and status.reason
        committed = status.iteration
        store = RunDir(strict)
        with pytest.raises(PausedError, match="rayhf unpause"):
            store.check_paused()
        store.close()
        FileControl(config.run.dir).unpause()
        store = RunDir(strict)
        store.check_paused()
        store.close()
        play(strict)
        assert read_status(config.run.dir).iteration == 8 > committed
    finally:
        RunDir.append_metrics = original


def test_verify_names_what_is_wrong(finished):
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert [f for f in audit(finished.run.dir, deep=True) if f.problem] == []
    samples = finished.run.dir / "samples/iteration-000002.parquet"
    table = pq.read_table(samples)
    pq.write_table(table.slice(1), samples)
    with pytest.raises(
        CheckpointError,
        match=r"samples and examples of iteration 2: prompt \w+ has the samples \[1, 2, 3\]",
    ):
        show_audit(finished.run.dir, screen(), deep=False)
    others = [row for row in table.to_pylist() if row["prompt_id"] != table["prompt_id"][0].as_py()]
    pq.write_table(pa.Table.from_pylist(others, schema=table.schema), samples)
    with pytest.raises(
        CheckpointError, match="samples and examples of iteration 2: 3 prompts, expected 4"
    ):
        show_audit(finished.run.dir, screen(), deep=False)
    pq.write_table(table, samples)
    metrics = finished.run.dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    with pytest.raises(CheckpointError, match=r"repeated: \[4\]"):
        show_audit(finished.run.dir, screen(), deep=False)


def test_every_exit_code_is_explained():
    rows = exit_codes()
    assert {0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 75, 130, 143} == {code for code, *_ in rows}
    assert all(meaning for _, _, meaning, _ in rows)
    shown = CliRunner().invoke(app, ["explain", "12"]).output
    assert "PausedError" in shown and "unpause" in shown
    assert "exit codes are 0, 1, 2" in str(CliRunner().invoke(app, ["explain", "99"]).exception)


def run_supervised(tmp_path, monkeypatch, script):
    """`supervise` with this script in place of the campaign."""
    file = tmp_path / "child.py"
    file.write_text(script)
    real = subprocess.Popen
    monkeypatch.setattr(
        "launch.supervise.subprocess.Popen",
        lambda command, **how: real([sys.executable, file], **how),
    )
    monkeypatch.setattr("launch.supervise._FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("launch.supervise._MAX_WAIT_S", 0.0)
    return supervise(["run"], tmp_path / "run", screen())


def test_a_supervised_campaign_is_started_again_until_it_is_done(tmp_path, monkeypatch):
    script = "from pathlib import Path; import os, signal; f = Path(__file__).with_name('n');"
    script += "n = int(f.read_text()) if f.exists() else 0; f.write_text(str(n + 1));"
    script += "os.kill(os.getpid(), signal.SIGKILL) if n < 3 else exit(0)"
    assert run_supervised(tmp_path, monkeypatch, script) == 0
    assert (tmp_path / "n").read_text() == "4"


@pytest.mark.parametrize("code", [2, 4, 5, 9, 12, 75])
def test_what_cannot_get_better_by_itself_is_not_started_again(tmp_path, monkeypatch, code):
    script = "from pathlib import Path; f = Path(__file__).with_name('n'); f.write_text(f.read_text() + 'x' if f.exists() else 'x');"
    assert run_supervised(tmp_path, monkeypatch, f"{script} exit({code})") == code
    assert (tmp_path / "n").read_text() == "x"


def test_a_crash_loop_is_given_up(tmp_path, monkeypatch):
    with pytest.raises(
        ActorLostError, match=f"ended {CRASHES + 1} times in a row without a new commit"
    ):
        run_supervised(tmp_path, monkeypatch, "exit(10)")


@pytest.mark.parametrize("code", [8, 13])
def test_who_has_no_disk_or_no_scorer_waits_for_it_as_long_as_it_takes(tmp_path, monkeypatch, code):
    script = "from pathlib import Path; f = Path(__file__).with_name('n'); n = int(f.read_text()) if f.exists() else 0;"
    assert (
        run_supervised(
            tmp_path,
            monkeypatch,
            f"{script} f.write_text(str(n + 1)); exit({code} if n < {2 * CRASHES} else 0)",
        )
        == 0
    )
    assert (tmp_path / "n").read_text() == str(2 * CRASHES + 1)


def test_a_campaign_does_not_outlive_its_supervisor(tmp_path):
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "import subprocess, sys; from launch.supervise import _end_with_parent;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], preexec_fn=_end_with_parent).wait()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, tmp_path / "pid"])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_supervisor_passes_on_what_it_is_told_and_does_not_start_again(tmp_path, monkeypatch):
    script = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *a: exit(75));"
    script += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    before = signal.getsignal(signal.SIGTERM)
    assert run_supervised(tmp_path, monkeypatch, script) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_committed_rounds_of_another_directory_are_unknown(tmp_path):
    from launch.supervise import _committed

    assert _committed(Path(tmp_path / "nothing")) == -1
