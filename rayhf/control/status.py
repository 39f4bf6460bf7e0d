"""The status of a campaign, read from its run directory.

In: files only; the campaign may have crashed, or run on another machine. Out: a Status with the
reason for its state and what to do next. Takes no lock.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.files import MANIFEST, open_file, read_bytes
from rayhf.run_dir.identity import read_config
from rayhf.run_dir.lock import is_locked
from rayhf.run_dir.names import check_links, event_logs, numbered
from rayhf.run_dir.progress import Event, Progress, parse_event, read_progress
from rayhf.run_dir.state import CampaignState, read_state

RunState = Literal["new", "running", "stalled", "paused", "stopped", "crashed", "done"]
_TAIL_BYTES = 1 << 18
_EVENT_FILES = 20
"""Logs of the newest attempts that are read: enough for the faults of a day."""
_FAULTS = 5
_STALE_S = 120.0
"""Age of a heartbeat from another host above which its process is taken to be gone."""
_STOPPED = 75
"""Exit code of a campaign that was interrupted on request."""
_RESUMES = "fix the dependency; the run resumes automatically"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything `rayhf status` shows."""

    run: Path
    state: RunState
    reason: str
    """Why the campaign is not running; empty where it is."""
    advice: str
    """What to do next."""
    holder: str
    """Host, pid and start of the process that holds the lock; empty where none does."""
    epoch: int
    algorithm: str
    takes_labels: bool
    """Whether the algorithm trains on human labels of pairs of completions."""
    takes_thumbs: bool
    """Whether it also trains on thumbs up and down on single completions."""
    iteration: int
    """The last committed iteration."""
    iterations: int
    """Iterations that the config asks for."""
    phase: str
    """What is under way after the last committed iteration; empty where nothing is."""
    progress_age_s: float | None
    """Seconds since anything moved; None where nothing ever did."""
    eta_s: float | None
    versions: Mapping[str, float]
    """Weight version per policy, by metric name."""
    models: Mapping[str, str]
    """Commit of each hub name in the config."""
    commit: str
    """The committed checkpoint, its age and size."""
    health: Mapping[str, float]
    """Latest values of held-out figures, and of the metrics that guards check."""
    faults: Sequence[str]
    """The last faults within a day, newest last."""
    fault_count: int
    """All faults within a day."""


_HEALTH = (
    "scorer/reward_mean",
    "reference/kl",
    "rollout/length_mean",
    "rollout/truncated",
    "rollout/mismatch_kl",
    "learner/grad_norm",
)
_HELDOUT = re.compile(r"eval/[^/]+/(sampled|win_rate|pair_accuracy)|game/exploitability_average")


def read_status(run: Path, *, now: float | None = None) -> Status:
    """Return the status of the campaign in `run`; `now` is in seconds since 1970.

    Raises ConfigError where `run` is not a run directory or has links in it, CheckpointError where
    its campaign.json or config.yaml is damaged.
    """
    now = time.time() if now is None else now
    if run.is_dir():
        check_links(run)
    campaign = read_state(run)
    if campaign is None:
        raise ConfigError(f"{run} is not a run directory: there is no campaign.json in it")
    config = read_config(run)
    try:
        stall_s = float(config["run"]["stall_s"])
        iterations = int(config["run"]["iterations"])
        algorithm = str(config["algorithm"]["type"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run}/config.yaml is damaged ({error!r}); the same `rayhf run` command writes it "
            "again"
        ) from None
    progress = read_progress(run) or Progress()
    events = _events(run)
    metrics = list(_metrics(run))
    latest = metrics[-1] if metrics else {}
    holder = lock_holder(run)
    age = None if progress.time is None else now - progress.time
    waiting = progress.waiting if progress.epoch == campaign.epoch else ""
    end = next((e for e in reversed(events) if e.kind == "end" and e.epoch == campaign.epoch), None)
    state, reason = _state(campaign, holder, age, end, waiting, stall_s=stall_s)
    resumes = bool(waiting and holder) and campaign.state != "paused"
    faults = _faults(events, now)
    return Status(
        run=run,
        state=state,
        reason=reason,
        advice=_RESUMES if resumes else _advice(state, run, campaign),
        holder=holder,
        epoch=campaign.epoch,
        algorithm=algorithm,
        takes_labels=campaign.takes_labels,
        takes_thumbs=campaign.takes_thumbs,
        iteration=campaign.iteration,
        iterations=iterations,
        phase=_phase(run, state, campaign.iteration, progress, latest),
        progress_age_s=age,
        eta_s=_eta_s(metrics, iterations - campaign.iteration) if state == "running" else None,
        versions={name: value for name, value in latest.items() if name.endswith("/version")},
        models=campaign.models,
        commit=_commit(run, campaign, now),
        health=_heldout(metrics) | {name: latest[name] for name in _HEALTH if name in latest},
        faults=[f"{event.time[:19]} {event.message}" for event in faults[-_FAULTS:]],
        fault_count=len(faults),
    )


def _state(
    campaign: CampaignState,
    holder: str,
    age: float | None,
    end: Event | None,
    waiting: str,
    *,
    stall_s: float,
) -> tuple[RunState, str]:
    """Return the state and its reason."""
    if campaign.state == "done":
        return "done", ""
    if holder:
        if campaign.state == "paused" or waiting:
            return "paused", campaign.reason or waiting
        if age is not None and age > 3 * stall_s:
            return "stalled", f"no progress for {age:.0f} s"
        return "running", ""
    # An operator's pause ends with the process; one by a guard stays until it is accepted.
    if campaign.state == "paused" and campaign.guards:
        return "paused", campaign.reason or ""
    if campaign.state == "new" and end is None:
        return "new", ""
    if end is None:
        return "crashed", (
            "its process exited without reporting an error (killed, or its machine was lost)"
        )
    return ("stopped" if end.code == _STOPPED else "crashed"), end.message


def _advice(state: RunState, run: Path, campaign: CampaignState) -> str:
    again = f"the same `rayhf run` command continues after iteration {campaign.iteration}"
    return {
        "new": again,
        "running": "nothing to do",
        "stalled": f"see {run}/logs for the actor that hangs; end the process, then {again}",
        "paused": f"{campaign.ways_to_continue(run)}; then start the same `rayhf run` command"
        if campaign.guards
        else f"`rayhf unpause {run}` resumes it",
        "stopped": again,
        "crashed": f"fix the reason above, then {again}",
        "done": f"the policy is in {run}/policy",
    }[state]


def _phase(
    run: Path,
    state: RunState,
    committed: int,
    progress: Progress,
    latest: Mapping[str, float],
) -> str:
    """Describe the iterations after the committed one: the one under way, and finished ones."""
    if state == "done":
        return ""
    finished = int(latest.get("iteration", 0))
    begun = set(numbered(run / "journal", "iteration-", ".journal"))
    count = f" {progress.done}/{progress.total}" if progress.total else ""
    parts = []
    if progress.iteration is not None:
        begun.add(progress.iteration)
        if state in ("running", "stalled", "paused"):
            parts.append(f"iteration {progress.iteration}, {progress.phase}{count}")
    open_iterations = [each for each in begun if each > max(committed, finished)]
    if not parts and open_iterations:
        first = min(open_iterations)
        where = f" ({progress.phase}{count})" if first == progress.iteration else ""
        parts.append(f"iteration {first} is begun and not committed{where}")
    if finished > committed:
        which = f"iteration {finished} is"
        if finished > committed + 1:
            which = f"iterations {committed + 1} to {finished} are"
        parts.append(f"{which} finished and not committed")
    return "; ".join(parts)


def _eta_s(metrics: Sequence[Mapping[str, float]], left: int) -> float | None:
    """Estimate the remaining seconds from the mean of recent iterations."""
    seconds = [line["time/iteration_s"] for line in metrics if "time/iteration_s" in line]
    return left * sum(seconds) / len(seconds) if seconds else None


def _faults(events: Sequence[Event], now: float) -> list[Event]:
    """Return the faults and pauses of the last day."""
    day = datetime.fromtimestamp(now, UTC) - timedelta(days=1)
    return [
        event
        for event in events
        if event.kind in ("fault", "pause") and datetime.fromisoformat(event.time) > day
    ]


def lock_holder(run: Path) -> str:
    """Return host, pid and start of the process that holds the run directory's lock, if any.

    Takes no lock itself, so that it can never refuse a launcher: on the holder's own host it reads
    /proc/locks, for another host it trusts a fresh heartbeat.
    """
    try:
        text = read_bytes(run / ".lock").decode(errors="replace")
        if is_locked(run):
            return text
    except OSError:
        return ""
    is_here = text.startswith(f"host {os.uname().nodename}, ")
    progress = read_progress(run)
    is_fresh = progress is not None and time.time() - progress.alive < _STALE_S
    return text if is_fresh and not is_here else ""


def _commit(run: Path, campaign: CampaignState, now: float) -> str:
    """Describe the committed checkpoint."""
    if campaign.checkpoint is None:
        return "none yet"
    manifest = run / "checkpoints" / campaign.checkpoint / MANIFEST
    try:
        entries = json.loads(read_bytes(manifest))["files"].values()
        size = sum(entry["bytes"] for entry in entries)
        age = now - manifest.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{campaign.checkpoint}: cannot be read ({error})"
    return f"{campaign.checkpoint}, {_age(age)} ago, {size / 2**20:,.1f} MiB"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _heldout(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of the last evaluation; not every iteration has one."""
    for line in reversed(metrics):
        if found := {name: value for name, value in line.items() if _HELDOUT.fullmatch(name)}:
            return found
    return {}


def _events(run: Path) -> list[Event]:
    """Return recent events, oldest first."""
    files = event_logs(run)[-_EVENT_FILES:]
    events = (parse_event(line) for file in files for line in _last_lines(file))
    return [event for event in events if event is not None]


def _metrics(run: Path) -> Iterator[dict[str, float]]:
    """Yield the metrics of recent iterations, oldest first."""
    for line in _last_lines(run / "metrics.jsonl"):
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        if isinstance(metrics, dict):
            yield metrics


def _last_lines(file: Path) -> list[bytes]:
    """Return the lines in a file's last part; the first and the last one may be incomplete."""
    try:
        with open_file(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            return stream.read().splitlines()
    except OSError:
        return []
