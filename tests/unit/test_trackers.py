"""Trackers: whatever happens to their process, the campaign continues and ends."""

import json
import sys
import time

import pytest

from rayhf.monitoring.tracking import TrackerObserver


class Listener:
    def __init__(self):
        self.rounds, self.heard = [], []

    def phase(self, *where):
        return None

    def metrics(self, metrics):
        self.rounds.append(metrics["iteration"])

    def event(self, kind, message):
        self.heard.append((kind, message))


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
    assert got == [{"project": "p"}, {"iteration": 0.0}, {"iteration": 1.0}, {"iteration": 2.0}]
    assert inner.rounds == [0, 1, 2] and inner.heard == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import time; time.sleep(600)", "it did not finish in time"),
        ("exit('no account')", "its process exited with 1, see "),
    ],
)
def test_hanging_or_crashing_tracker_does_not_affect_the_run(monkeypatch, tmp_path, script, why):
    monkeypatch.setattr("rayhf.monitoring.tracking.FINISH_S", 1.0)
    inner = Listener()
    tracked = TrackerObserver(inner, {}, name="wandb", log=tmp_path / "log", command=mirror(script))
    started = time.monotonic()
    for iteration in range(3000):
        tracked.metrics({"iteration": float(iteration), **{f"metric{i}": 0.0 for i in range(50)}})
    assert time.monotonic() - started < 10
    tracked.close()
    assert time.monotonic() - started < 20 and tracked._process.poll() is not None
    assert len(inner.rounds) == 3000
    assert [kind for kind, _ in inner.heard] == ["warn"] and why in inner.heard[0][1]
    assert ("no account" in (tmp_path / "log").read_text()) == ("exited" in why)
