"""wandb, when configured: a mirror of metrics.jsonl, which stays the record. It can neither stall
nor fail a run.

wandb lives in a process of its own (`python -m launch.tracking`), which reads one JSON object per
line. A thread feeds it from a bounded queue; what does not fit is left out and counted. At the end
it has `FINISH_S` seconds, then it is killed. What it says is in the attempt's wandb.log.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayhf.config.schema import CampaignConfig
from rayhf.monitoring.observer import Observer

FINISH_S = 30.0
_LINES = 1000
MIRROR = (sys.executable, "-m", "launch.tracking")


class WandbObserver:
    """Passes everything on to another observer, and metrics to the mirror too."""

    def __init__(
        self,
        inner: Observer,
        settings: Mapping[str, Any],
        *,
        log: Path,
        command: Sequence[str] = MIRROR,
    ) -> None:
        self._inner, self._log = inner, log
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=_LINES)
        self.left_out = 0
        self._gone = False
        with log.open("ab") as file:
            # Not where we are: Ray may unpack a job's directory anew while the job starts, and then
            # ours is gone, name and all.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, cwd=log.parent
            )
        self._lines.put(dict(settings))
        self._feeder = threading.Thread(target=self._feed, name="wandb mirror", daemon=True)
        self._feeder.start()

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._inner.metrics(metrics)
        if not self._gone and self._process.poll() is not None:
            self._gone = True
            self._inner.event(
                "warn",
                f"wandb gets no more: {self._end_of(self._process.returncode)}; metrics.jsonl has everything",
            )
        try:
            self._lines.put_nowait(dict(metrics))
        except queue.Full:
            self.left_out += 1

    def event(self, kind: str, message: str) -> None:
        self._inner.event(kind, message)

    def close(self) -> None:
        """Give the mirror its time to finish; say what it has not got."""
        deadline = time.monotonic() + FINISH_S
        try:
            self._lines.put(None, timeout=FINISH_S / 2)
            self._feeder.join(FINISH_S / 2)
            code: int | None = self._process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            code = None
            self._process.kill()
            self._process.wait()
        if (code != 0 or self.left_out) and not self._gone:
            why = "it did not finish in time" if code is None else self._end_of(code)
            self._inner.event(
                "warn",
                f"wandb has not got everything ({why}, {self.left_out} rounds left out); metrics.jsonl has",
            )

    def _end_of(self, code: int) -> str:
        return f"it ended with {code}, see {self._log}"

    def _feed(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(json.dumps(line).encode() + b"\n")
                pipe.flush()
            pipe.close()
        except OSError:  # the mirror is gone: `close` says so
            while self._lines.get() is not None:
                self.left_out += 1


@contextmanager
def tracked(observer: Observer, config: CampaignConfig, *, logs: Path) -> Iterator[Observer]:
    """The observer, mirrored to wandb where tracking.wandb asks for it. Offline needs no
    account."""
    tracking = config.tracking
    if tracking.wandb == "off":
        yield observer
        return
    settings = {
        "project": tracking.project,
        "name": tracking.name or config.run.dir.name,
        "mode": tracking.wandb,
        "dir": str(config.run.dir.absolute()),
        "config": config.model_dump(mode="json"),
    }
    mirror = WandbObserver(observer, settings, log=logs / "wandb.log")
    try:
        yield mirror
    finally:
        mirror.close()


def _mirror() -> None:
    """The mirror's process: settings first, then a line per round, until the pipe is closed."""
    import signal

    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # whoever stops the whole group means the campaign, which closes the pipe
        signal.signal(name, signal.SIG_IGN)
    import wandb

    options = wandb.Settings(console="off", disable_code=True, disable_git=True, init_timeout=60)
    run = wandb.init(**json.loads(sys.stdin.readline()), settings=options)
    for line in sys.stdin:
        metrics = json.loads(line)
        run.log(metrics, step=int(metrics["iteration"]))
    run.finish()


if __name__ == "__main__":
    _mirror()
