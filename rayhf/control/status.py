"""How a campaign is doing, from the files of its run directory alone: Ray may be dead, the machine
another one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from rayhf.config.registry import ALGORITHMS
from rayhf.errors import ConfigError
from rayhf.run_dir.state import read_state

State = Literal["new", "running", "stalled", "paused", "stopped", "crashed", "done"]
_TAIL_BYTES = 1 << 18
_STALE_S = 120.0
"""A heartbeat older than this, on a machine whose processes cannot be seen from here, is no sign of
life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a person wants to know at three in the morning."""

    run: Path
    state: State
    reason: str
    """Why it is not running; empty where it is."""
    advice: str
    """What to do next."""
    holder: str
    """Who holds the lock: host, pid, since when; empty where nobody does."""
    epoch: int
    algorithm: str
    takes_labels: bool
    """Whether people's verdicts on pairs of answers are trained on."""
    iteration: int
    """Rounds committed."""
    iterations: int
    """Rounds wanted."""
    phase: str
    progress_age_s: float | None
    """Since anything moved; None where nothing ever did."""
    eta_s: float | None
    versions: Mapping[str, float]
    commit: str
    """The newest checkpoint, its age and size."""
    health: Mapping[str, float]
    """The last values of what guards look at."""
    faults: Sequence[str]
    """Of the last day, newest last."""
    fault_count: int


_HEALTH = (
    "scorer/reward_mean",
    "reference/kl",
    "rollout/length_mean",
    "rollout/truncated",
    "rollout/mismatch_kl",
    "learner/grad_norm",
)


def read_status(run: Path, *, now: float | None = None) -> Status:
    """Raises ConfigError where `run` is no run directory, CheckpointError where its campaign.json
    is damaged."""
    now = time.time() if now is None else now
    campaign = read_state(run)
    if campaign is None:
        raise ConfigError(f"{run} is not a run directory: there is no campaign.json in it")
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{run} is not a run directory yet: {error}") from None
    progress = _json(run / "progress.json") or {}
    events = _events(run)
    metrics = _last_lines(run / "metrics.jsonl")
    holder = lock_holder(run)
    age = now - progress["time"] if "time" in progress else None
    iterations = int(config["run"]["iterations"])
    ended = next(
        (
            event
            for event in reversed(events)
            if event["kind"] == "end" and event["epoch"] == campaign["epoch"]
        ),
        None,
    )
    waiting = str(progress.get("waiting", "")) if progress.get("epoch") == campaign["epoch"] else ""
    state, reason = _state(
        campaign, holder, age, ended, waiting, stall_s=float(config["run"]["stall_s"])
    )
    day = datetime.fromtimestamp(now, UTC) - timedelta(days=1)
    faults = [
        e
        for e in events
        if e["kind"] in ("fault", "pause") and datetime.fromisoformat(e["time"]) > day
    ]
    last = metrics[-1] if metrics else {}
    done, total = progress.get("done", 0), progress.get("total", 0)
    phase = str(progress.get("phase", "")) + (f" {done}/{total}" if total else "")
    seconds = [line["time/iteration_s"] for line in metrics if "time/iteration_s" in line]
    left = iterations - int(campaign["iteration"])
    return Status(
        run=run,
        state=state,
        reason=reason,
        advice=_WAITS
        if waiting and campaign["state"] != "paused" and holder
        else _advice(state, run, campaign),
        holder=holder,
        epoch=int(campaign["epoch"]),
        algorithm=config["algorithm"]["type"],
        takes_labels=hasattr(ALGORITHMS.resolve(config["algorithm"]["type"]), "takes_labels"),
        iteration=int(campaign["iteration"]),
        iterations=iterations,
        phase=f"round {progress['iteration']}, {phase}" if "iteration" in progress else "",
        progress_age_s=age,
        eta_s=left * sum(seconds) / len(seconds) if seconds and state == "running" else None,
        versions={name: value for name, value in last.items() if name.endswith("/version")},
        commit=_commit(run, campaign, now),
        health={name: last[name] for name in _HEALTH if name in last},
        faults=[f"{e['time'][:19]} {e['message']}" for e in faults[-5:]],
        fault_count=len(faults),
    )


def _state(
    campaign: Mapping[str, Any],
    holder: str,
    age: float | None,
    ended: Mapping[str, Any] | None,
    waiting: str,
    *,
    stall_s: float,
) -> tuple[State, str]:
    if campaign["state"] == "done":
        return "done", ""
    if holder:
        if campaign["state"] == "paused" or waiting:
            return "paused", campaign["reason"] or waiting
        quiet = age is not None and age > 3 * stall_s
        return ("stalled", f"nothing has moved for {age:.0f} s") if quiet else ("running", "")
    if (
        campaign["state"] == "paused" and campaign["guards"]
    ):  # an operator's pause ends with its process
        return "paused", campaign["reason"] or ""
    if campaign["state"] == "new" and ended is None:
        return "new", ""
    if ended is None:
        return "crashed", "its process ended without a word (killed, or its machine is gone)"
    return ("stopped" if ended.get("code") == 75 else "crashed"), ended["message"]


_WAITS = "mend what it waits for: it goes on by itself"


def _advice(state: State, run: Path, campaign: Mapping[str, Any]) -> str:
    where = f"round {campaign['iteration']}"
    again = f"the same `rayhf run` command continues after {where}"
    return {
        "new": again,
        "running": "nothing to do",
        "stalled": f"look at {run}/logs for who hangs; end the process, then {again}",
        "paused": f"`rayhf unpause {run}`"
        + (f", then {again}" if campaign["guards"] else " lets it go on"),
        "stopped": again,
        "crashed": f"see why above, then {again}",
        "done": f"the policy is in {run}/policy",
    }[state]


def lock_holder(run: Path) -> str:
    """host, pid and since when of the process that holds the run directory's lock; empty where none
    does.

    Asks nobody and takes no lock, so that looking can never get in a launcher's way: /proc/locks on
    the holder's own host, and fresh heartbeats where the holder is on another.
    """
    file = run / ".lock"
    try:
        text, inode = file.read_text(encoding="utf-8"), file.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return ""
    if any(
        line.split()[1:2] == ["FLOCK"] and line.split()[5].endswith(f":{inode}")
        for line in locks.splitlines()
    ):
        return text
    here = f"host {os.uname().nodename}, "
    progress = _json(run / "progress.json")
    fresh = progress is not None and time.time() - progress.get("alive", 0.0) < _STALE_S
    return text if text and not text.startswith(here) and fresh else ""


def _commit(run: Path, campaign: Mapping[str, Any], now: float) -> str:
    if campaign["checkpoint"] is None:
        return "none yet"
    directory = run / "checkpoints" / campaign["checkpoint"]
    try:
        entries = json.loads((directory / "MANIFEST.json").read_text(encoding="utf-8"))[
            "files"
        ].values()
        size = sum(entry["bytes"] for entry in entries)
        age = now - (directory / "MANIFEST.json").stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{directory.name}: not readable ({error})"
    return f"{directory.name}, {_age(age)} ago, {size / 2**20:,.1f} MiB"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _events(run: Path) -> list[dict[str, Any]]:
    """Of the newest attempts: enough to tell the last day's story."""
    files = sorted((run / "logs").glob("attempt-*/events.jsonl"))[-20:]
    return [line for file in files for line in _last_lines(file)]


def _last_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file's last part; a torn line does not count."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
