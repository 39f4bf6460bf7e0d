"""Send metrics to trackers in a way that can neither stall nor fail a run.

Each tracker runs in its own process (`python -m rayhf.monitoring.tracking`), which reads one JSON
object per line: first its config and a description of the run, then one line per iteration. A
thread feeds it from a bounded queue; iterations that do not fit are dropped and counted. At the end
it has `FINISH_S` seconds, then it is killed. Its output is in the attempt's <type>.log. A tracker
with `log_samples` also gets completions: its process reads them from the run directory.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from rayhf.config.import_path import import_path, user_folder
from rayhf.config.registry import TRACKERS
from rayhf.config.schema import CampaignConfig
from rayhf.config.trackers import TrackerConfig
from rayhf.errors import ConfigError
from rayhf.monitoring.observer import Observer
from rayhf.run_dir.names import iteration_name
from rayhf.types import JsonObject

FINISH_S = 30.0
_LINES = 1000
COMMAND = (sys.executable, "-P", "-m", "rayhf.monitoring.tracking")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Description of the run for trackers."""

    name: str
    """Name of the run directory."""
    directory: str
    """Absolute path of the run directory, for the tracker's own files."""
    config: JsonObject
    """The campaign's resolved config."""


class Tracker(Protocol):
    """Receives a campaign's metrics. Constructor: `Class(config, run)`."""

    Config: ClassVar[type[TrackerConfig]]

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics; `iteration` is among them."""
        ...

    def close(self) -> None:
        """Finish; called once at the end of the campaign's process."""
        ...


@runtime_checkable
class LogsSamples(Protocol):
    """A tracker that also takes completions as a table."""

    def log_samples(self, iteration: int, rows: Sequence[SampleRow]) -> None:
        """Log some of an iteration's completions; called after its metrics."""
        ...


SampleRow = Mapping[str, str | float | None]
"""One completion with the columns SAMPLE_COLUMNS."""
SAMPLE_COLUMNS = ("iteration", "prompt", "completion", "score", "finish_reason")


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """Refuse a tracker whose library is not installed. Raises ConfigError."""
    for index, tracker in enumerate(trackers):
        if tracker.library is None or find_spec(tracker.library) is not None:
            continue
        install = f'"rayhf[{tracker.extra}]"' if tracker.extra else tracker.library
        raise ConfigError(
            f"trackers[{index}]: {tracker.type} needs the package {tracker.library}, which is not "
            f"installed; pip install {install}"
        )


class TrackerObserver:
    """Observer that forwards to another observer, and sends metrics to a tracker's process."""

    def __init__(
        self,
        inner: Observer,
        settings: JsonObject,
        *,
        name: str,
        log: Path,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._inner = inner
        self._name = name
        self._log = log
        self._lines: queue.Queue[JsonObject | None] = queue.Queue(maxsize=_LINES)
        self.dropped = 0
        """Iterations that did not fit into the queue."""
        self._exited = False
        *path, here = import_path(sys.path, user_folder())
        with log.open("ab") as file:
            # Not in the current directory: Ray may unpack a job's directory anew while the job
            # starts, and then the current one no longer exists. The module path stays this
            # process's, with the user's directory last: the tracker may be a class in it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                cwd=log.parent,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        self._lines.put({**settings, "user_folder": here})
        self._feeder = threading.Thread(target=self._feed, name=f"{name} tracker", daemon=True)
        self._feeder.start()

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        """Forward."""
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Forward, and queue for the tracker without waiting."""
        self._inner.metrics(metrics)
        if not self._exited and self._process.poll() is not None:
            self._exited = True
            self._inner.event(
                "warn",
                f"{self._name} receives no more metrics: {self._end(self._process.returncode)}; "
                "metrics.jsonl is complete",
            )
        try:
            self._lines.put_nowait(dict(metrics))
        except queue.Full:
            self.dropped += 1

    def event(self, kind: str, message: str) -> None:
        """Forward."""
        self._inner.event(kind, message)

    def close(self) -> None:
        """Wait until the tracker has finished, at most FINISH_S; report an incomplete upload."""
        deadline = time.monotonic() + FINISH_S
        try:
            self._lines.put(None, timeout=FINISH_S / 2)
            self._feeder.join(FINISH_S / 2)
            code: int | None = self._process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            code = None
            self._process.kill()
            self._process.wait()
        if (code != 0 or self.dropped) and not self._exited:
            why = "it did not finish in time" if code is None else self._end(code)
            self._inner.event(
                "warn",
                f"{self._name} upload is incomplete ({why}, {self.dropped} iterations dropped); "
                "metrics.jsonl is complete",
            )

    def _end(self, code: int) -> str:
        return f"its process exited with {code}, see {self._log}"

    def _feed(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(json.dumps(line).encode() + b"\n")
                pipe.flush()
            pipe.close()
        except OSError:  # the process has exited, which `metrics` or `close` reports
            while self._lines.get() is not None:
                self.dropped += 1


@contextmanager
def tracked(observer: Observer, config: CampaignConfig, *, logs: Path) -> Iterator[Observer]:
    """Yield the observer, mirrored to every tracker of the config."""
    with ExitStack() as stack:
        for number, tracker in enumerate(config.trackers):
            run = TrackedRun(
                name=config.run.dir.name,
                directory=str(config.run.dir.absolute()),
                config=config.model_dump(mode="json"),
            )
            name = tracker.type.rpartition(":")[2]
            mirror = TrackerObserver(
                observer,
                {"tracker": tracker.model_dump(mode="json"), "run": asdict(run)},
                name=name,
                log=logs / f"{name}{f'-{number}' if number else ''}.log",
            )
            stack.callback(mirror.close)
            observer = mirror
        yield observer


def _run_tracker() -> None:
    """Run one tracker: settings first, then a line per iteration, until the pipe is closed."""
    # Signals to the whole process group are for the campaign, which then closes the pipe.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    sys.path.append(settings["user_folder"])
    plugin = TRACKERS.resolve(settings["tracker"]["type"])
    config = plugin.Config.model_validate(settings["tracker"])
    tracker: Tracker = plugin(config, TrackedRun(**settings["run"]))
    for line in sys.stdin:
        metrics = json.loads(line)
        tracker.log(metrics)
        iteration = int(metrics["iteration"])
        if config.samples and iteration and iteration % config.samples_every == 0:
            rows = read_samples(Path(settings["run"]["directory"]), iteration, config.samples)
            if rows and isinstance(tracker, LogsSamples):
                tracker.log_samples(iteration, rows)
    tracker.close()


def read_samples(run: Path, iteration: int, count: int) -> list[dict[str, Any]]:
    """Return the first `count` whole completions of an iteration, with SAMPLE_COLUMNS.

    None where the iteration has no samples (an algorithm that trains on given rows).
    """
    import pyarrow.parquet as pq

    file = run / "samples" / f"{iteration_name(iteration)}.parquet"
    if not file.exists():
        return []
    columns = ["messages", "kind", "thinking", "text", "score", "finish_reason"]
    rows: list[dict[str, Any]] = []
    for batch in pq.ParquetFile(file).iter_batches(batch_size=1024, columns=columns):
        for row in batch.to_pylist():
            if row["kind"] != "answer":
                continue
            rows.append(
                {
                    "iteration": iteration,
                    "prompt": "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]),
                    "completion": (row["thinking"] or "") + row["text"],
                    "score": row["score"],
                    "finish_reason": row["finish_reason"],
                }
            )
            if len(rows) == count:
                return rows
    return rows


if __name__ == "__main__":
    _run_tracker()
