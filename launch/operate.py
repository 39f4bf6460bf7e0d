"""An operator's commands on a run directory: look, check, pause, let go on, stop. None of them needs Ray."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rayhf import errors
from rayhf.campaign.audit import audit
from rayhf.campaign.control import Wanted, write_control
from rayhf.campaign.files import write_json
from rayhf.campaign.lock import RunLock
from rayhf.campaign.status import Status, read_status
from rayhf.errors import CheckpointError, ConfigError

_STYLES = {"running": "green", "done": "green", "new": "cyan", "paused": "yellow", "stopped": "yellow"}


def show_status(run: Path, console: Console) -> None:
    """A page that fits a terminal. Raises ConfigError where `run` is no run directory."""
    status = read_status(run)
    table = Table(
        title=f"{escape(run.name)}: {status.state.upper()}", show_header=False, title_style=_STYLES.get(status.state, "red")
    )
    for label, value in _lines(status):
        if value:
            table.add_row(label, escape(value))
    console.print(table)


def _lines(status: Status) -> list[tuple[str, str]]:
    age = status.progress_age_s
    eta = f", about {status.eta_s / 60:.0f} min to go" if status.eta_s is not None else ""
    return [
        ("why", status.reason),
        ("rounds", f"{status.iteration} of {status.iterations} committed{eta}"),
        ("now", status.phase if status.state in ("running", "stalled", "paused") else ""),
        ("last progress", f"{age:.0f} s ago" if age is not None else "never"),
        ("held by", status.holder),
        ("attempt", str(status.epoch)),
        ("weights", ", ".join(f"{name.removesuffix('/version')} version {value:.0f}" for name, value in status.versions.items())),
        ("last commit", status.commit),
        ("health", ", ".join(f"{name} {value:.3g}" for name, value in status.health.items())),
        (f"faults in 24 h: {status.fault_count}", "\n".join(status.faults)),
        ("next", status.advice),
    ]


def show_audit(run: Path, console: Console, *, deep: bool) -> None:
    """What was looked at, and what is wrong. Raises CheckpointError where anything is."""
    table = Table("what", "finding", title=f"verify {escape(str(run))}")
    sound = 0
    problems: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("verify", total=None)
        for finding in audit(run, deep=deep):
            progress.update(line, description=escape(finding.what), advance=1)
            if finding.problem:
                problems.append(f"{finding.what}: {finding.problem}")
                table.add_row(escape(finding.what), escape(finding.problem), style="red")
            else:
                sound += 1
    table.add_row(f"{sound} other{'s' if sound != 1 else ''}" if problems else f"all {sound}", "as they were written")
    console.print(table)
    if problems:
        raise CheckpointError(f"{run}: {len(problems)} of {len(problems) + sound} findings are bad; the first: {problems[0]}")


def ask(run: Path, wanted: Wanted, console: Console) -> None:
    """Leave word for the campaign; it acts after the round under way."""
    status = read_status(run)
    if status.state == "done":
        raise ConfigError(f"{run} is done: there is nothing to {wanted}")
    if not status.holder:
        raise ConfigError(f"{run} is not running ({status.state}): there is nobody to {wanted}; {status.advice}")
    write_control(run, wanted)
    after = "pauses" if wanted == "pause" else "stops"
    console.print(f"{run} {after} when round {status.iteration + 1} is done and committed", markup=False)


def unpause(run: Path, console: Console) -> None:
    """Take a pause back. Guards that paused the campaign are accepted: they only warn from now on."""
    status = read_status(run)
    if status.state != "paused":
        raise ConfigError(f"{run} is {status.state}, not paused")
    file = run / "campaign.json"
    if not json.loads(file.read_text(encoding="utf-8"))["guards"]:
        write_control(run, "run")
        console.print(f"{run} goes on", markup=False)
        return
    lock = RunLock(run)  # the process that was paused must be gone, and no other may come
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        accepted = sorted({*state["accepted"], *state["guards"]})
        write_json(file, {**state, "state": "stopped", "reason": None, "guards": [], "accepted": accepted})
    finally:
        lock.release()
    console.print(
        f"{run}: {', '.join(state['guards'])} only warns from now on; the same `rayhf run` command goes on after round "
        f"{state['iteration']}",
        markup=False,
    )


def explain(code: int | None, console: Console) -> None:
    """What an exit code means and what to do; all of them where none is named. Raises ConfigError for one that is not ours."""
    table = Table("exit code", "error", "meaning", "what to do")
    rows = [row for row in exit_codes() if code is None or row[0] == code]
    if not rows:
        known = ", ".join(str(number) for number in sorted({row[0] for row in exit_codes()}))
        raise ConfigError(f"rayhf never ends with {code} by itself; its exit codes are {known}")
    for number, name, meaning, remedy in rows:
        table.add_row(str(number), name, meaning, remedy)
    console.print(table)


def exit_codes() -> list[tuple[int, str, str, str]]:
    """(code, class, meaning, remedy) of every way a command may end."""
    found = [(0, "", "the work was done", "")]
    for name, each in inspect.getmembers(errors, inspect.isclass):
        if issubclass(each, errors.RayhfError):
            found.append((each.exit_code, name, each.meaning, each.remedy))
    found.append((143, "", "ended by SIGTERM before anything could be said", "the same command continues"))
    return sorted(found, key=lambda row: (row[0], row[1]))
