"""Commands on a campaign through the files of its run directory."""

import json
import os
import subprocess
import sys
import time

import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeRollout, SilentObserver
from rich.console import Console
from typer.testing import CliRunner
from waiting import wait_until

from launch.cli import app
from launch.operate import exit_codes, show_audit
from rayhf.control.commands import FileControl
from rayhf.control.status import read_status
from rayhf.errors import (
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
    run_campaign(config)
    return config


def test_status_of_a_finished_campaign(finished):
    status = read_status(finished.run.dir)
    assert (status.state, status.iteration, status.holder, status.fault_count) == ("done", 4, "", 0)
    assert status.commit.startswith("iteration-000004") and status.versions == {
        "policy/version": 4.0
    }
    shown = CliRunner().invoke(app, ["status", str(finished.run.dir)]).output
    assert "DONE" in shown and "4 of 4" in shown and "under way" not in shown


def test_status_imports_nothing_heavy(finished):
    code = (
        "import sys; from launch.operate import *; from rayhf.control.status import read_status;"
        "from pathlib import Path; read_status(Path(sys.argv[1]));"
        "heavy = ('ray', 'torch', 'vllm', 'transformers');"
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, finished.run.dir], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_status_names_the_lock_holder_without_the_lock(tmp_path):
    store = RunDir(make_config(tmp_path))
    status = read_status(store.path)
    assert f"pid {os.getpid()}" in status.holder and status.state == "running"
    store.close()
    assert read_status(store.path).holder == ""


def test_status_has_the_figures_of_the_last_evaluation(tmp_path):
    store = RunDir(make_config(tmp_path))
    lines = [
        {
            "iteration": 1,
            "eval/toy/sampled": 0.1,
            "eval/toy/length": 7.0,
            "eval/toy/a/sampled": 0.3,
        },
        {"iteration": 2, "eval/toy/sampled": 0.2, "eval/chat/win_rate": 0.6, "learner/loss": 1.0},
        {"iteration": 3, "scorer/reward_mean": 0.5},
    ]
    (store.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store.close()
    expected = {"eval/toy/sampled": 0.2, "eval/chat/win_rate": 0.6, "scorer/reward_mean": 0.5}
    assert read_status(store.path).health == expected


def test_status_of_a_crashed_campaign(tmp_path):
    config = make_config(tmp_path, run={"checkpoint_every": 1})
    store = RunDir(config)
    store.set_state("running")
    store.event("fault", "restarting rollout engine 0: it died")
    store.close()
    status = read_status(config.run.dir)
    assert status.state == "crashed" and "without reporting an error" in status.reason
    assert status.fault_count == 1 and "rollout engine 0" in status.faults[0]
    assert "the same `rayhf run` command continues after iteration 0" in status.advice


def test_status_of_a_stalled_campaign(tmp_path):
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


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress(iteration=1, phase="explore", done=3, total=4), "(explore 3/4)"),
        (Progress(iteration=0, phase="start actors"), ""),
    ],
)
def test_stopped_campaign_says_which_iteration_is_begun(tmp_path, progress, expected):
    store = RunDir(make_config(tmp_path))
    store.journal_file(1).write_bytes(b"")
    store.write_progress(progress)
    store.set_state("stopped")
    store.event("end", "interrupted", code=75)
    store.close()
    status = read_status(store.path)
    begun = f"iteration 1 is begun and not committed {expected}".rstrip()
    assert (status.state, status.phase) == ("stopped", begun)
    shown = CliRunner().invoke(app, ["status", str(store.path)], env={"COLUMNS": "200"}).output
    assert "0 of 4 committed" in shown and begun in shown


def test_status_counts_finished_iterations_that_are_not_committed(tmp_path):
    store = RunDir(make_config(tmp_path))
    for iteration in (1, 2):
        store.append_metrics({"iteration": float(iteration)})
    store.write_progress(Progress(iteration=3, phase="learn", time=time.time()))
    finished = "iterations 1 to 2 are finished and not committed"
    assert read_status(store.path).phase == f"iteration 3, learn; {finished}"
    store.close()
    begun = "iteration 3 is begun and not committed (learn)"
    assert read_status(store.path).phase == f"{begun}; {finished}"


def test_alternating_phases_of_two_iterations_are_logged_once(tmp_path):
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


def test_status_of_a_campaign_that_waits_for_a_scorer(tmp_path):
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


def test_status_on_another_host_follows_the_heartbeat(tmp_path):
    store = RunDir(make_config(tmp_path))
    recorder = EventLog(store, SilentObserver())
    recorder.phase(1, "explore", 3, 4)
    store.set_state("running")
    store.close()
    (store.path / ".lock").write_text("host elsewhere, pid 7, since then")
    progress = json.loads((store.path / "progress.json").read_text())
    # No progress for a while, but the process is alive.
    quiet = {**progress, "time": progress["time"] - 300}
    (store.path / "progress.json").write_text(json.dumps(quiet))
    assert read_status(store.path).state == "running"
    (store.path / "progress.json").write_text(
        json.dumps({**quiet, "alive": progress["alive"] - 300})
    )
    assert read_status(store.path).state == "crashed"


@pytest.mark.parametrize("command", ["status", "verify", "pause", "unpause", "stop"])
def test_directory_without_a_campaign_is_refused(tmp_path, command):
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert isinstance(result.exception, ConfigError) and "not a run directory" in str(
        result.exception
    )


class Commanding(FakeRollout):
    """Rollout that sends a command to its own campaign at its n-th call."""

    def __init__(self, run, at, wanted):
        super().__init__()
        self.run, self.at, self.wanted = run, at, wanted

    async def generate(self, requests, *, version):
        if len(self.calls) == self.at:
            write_request(self.run, self.wanted)
        return await super().generate(requests, version=version)


def test_stop_commits_and_the_same_command_continues(tmp_path):
    whole, config = (
        make_config(tmp_path / "whole"),
        make_config(tmp_path, run={"checkpoint_every": 0}),
    )
    run_campaign(whole)
    with pytest.raises(InterruptedRunError, match="stopped after iteration 2"):
        run_campaign(config, rollout=Commanding(config.run.dir, 3, "stop"))
    assert read_status(config.run.dir).iteration == 2
    write_request(config.run.dir, "run")
    run_campaign(config)
    assert metrics_of(config) == metrics_of(whole)


def test_paused_campaign_waits_until_it_is_resumed(tmp_path):
    import threading

    config = make_config(tmp_path)

    def release():
        wait_until(lambda: read_status(config.run.dir).state == "paused")
        FileControl(config.run.dir).unpause()

    RunDir(config).close()
    operator = threading.Thread(target=release)
    operator.start()
    run_campaign(config, rollout=Commanding(config.run.dir, 3, "pause"))
    operator.join()
    assert read_request(config.run.dir) == "run" and read_status(config.run.dir).state == "done"


def test_finished_campaign_takes_no_commands(finished):
    with pytest.raises(ConfigError, match="is done: there is nothing to pause"):
        FileControl(finished.run.dir).request("pause")
    with pytest.raises(ConfigError, match="is done, not paused"):
        FileControl(finished.run.dir).unpause()


def test_guard_pauses_and_can_be_overruled(tmp_path):
    config = make_config(
        tmp_path,
        run={"iterations": 4, "checkpoint_every": 1},
        guards={"length": {"warn": None, "pause": None}},
    )
    low = {"kl": {"warn": 1e-9, "pause": 1e-8}}
    strict = make_config(tmp_path, run={"iterations": 8, "checkpoint_every": 1}, guards=low)
    run_campaign(config)

    original = RunDir.append_metrics
    RunDir.append_metrics = lambda self, metrics: original(self, {**metrics, "reference/kl": 5.0})
    try:
        with pytest.raises(PausedError, match="kl"):
            run_campaign(strict)
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
        run_campaign(strict)
        assert read_status(config.run.dir).iteration == 8 > committed
    finally:
        RunDir.append_metrics = original


def test_verify_names_problems(finished):
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
    signals = {129, 130, 131, 137, 143}
    assert {0, 1, 2, *range(4, 14), 75, *signals} == {code for code, *_ in rows}
    assert all(meaning for _, _, meaning, _ in rows)
    shown = CliRunner().invoke(app, ["explain", "12"]).output
    assert "PausedError" in shown and "unpause" in shown
    assert "exit codes are 0, 1, 2" in str(CliRunner().invoke(app, ["explain", "99"]).exception)
