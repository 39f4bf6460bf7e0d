"""Trackers: whatever happens to their process, the campaign continues and ends."""

import json
import os
import sys

import psutil
import pytest

from rayhf.monitoring.tracking import TrackerObserver


class Listener:
    def __init__(self):
        self.iterations = []
        self.events = []

    def phase(self, *where):
        return None

    def metrics(self, metrics):
        self.iterations.append(metrics["iteration"])

    def event(self, kind, message):
        self.events.append((kind, message))


def mirror(script, *arguments):
    return [sys.executable, "-c", script, *map(str, arguments)]


def test_tracker_receives_settings_and_every_iteration(tmp_path):
    copy = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    inner = Listener()
    tracked = TrackerObserver(
        inner,
        {"project": "p"},
        name="wandb",
        log=tmp_path / "log",
        command=mirror(copy, tmp_path / "got"),
    )
    for iteration in range(3):
        tracked.metrics({"iteration": float(iteration)})
    tracked.close()
    got = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    settings = {"project": "p", "user_folder": os.getcwd()}
    assert got == [settings, {"iteration": 0.0}, {"iteration": 1.0}, {"iteration": 2.0}]
    assert inner.iterations == [0, 1, 2] and inner.events == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import time; time.sleep(600)", "it did not finish in time"),
        ("exit('no account')", "its process exited with 1, see "),
    ],
)
@pytest.mark.timeout(60, func_only=True)
def test_hanging_or_crashing_tracker_does_not_affect_the_run(monkeypatch, tmp_path, script, why):
    monkeypatch.setattr("rayhf.monitoring.tracking.FINISH_S", 1.0)
    inner = Listener()
    tracked = TrackerObserver(inner, {}, name="wandb", log=tmp_path / "log", command=mirror(script))
    for iteration in range(3000):
        tracked.metrics({"iteration": float(iteration), **{f"metric{i}": 0.0 for i in range(50)}})
    tracked.close()
    children = [
        process
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == os.getpid() and script in (process.info["cmdline"] or ())
    ]
    assert children == []
    assert len(inner.iterations) == 3000
    assert [kind for kind, _ in inner.events] == ["warn"] and why in inner.events[0][1]
    assert ("no account" in (tmp_path / "log").read_text()) == ("exited" in why)
