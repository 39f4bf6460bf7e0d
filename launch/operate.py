"""An operator's commands on a campaign: look, watch, check, pause, let go on, stop, hand things in.
None of them needs Ray.

The campaign is a run directory at hand, or one elsewhere that serves its control over gRPC
(rayhf.control.commands).
"""

from __future__ import annotations

import getpass
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text

from launch.sanitize import plain
from rayhf import errors
from rayhf.config.load import load_section
from rayhf.config.service import NO_SECURITY, EndpointSecurity
from rayhf.control.commands import Control, FileControl
from rayhf.control.labels import UncertainPair
from rayhf.control.status import Status
from rayhf.data.readers import read_rows
from rayhf.errors import CheckpointError, ConfigError
from rayhf.monitoring.audit import audit

_STYLES = {
    "running": "green",
    "done": "green",
    "new": "cyan",
    "paused": "yellow",
    "stopped": "yellow",
}


def control_of(run: Path | None, address: str | None, security: Path | None) -> Control:
    """The campaign that is meant: RUN, or --address with --security. Raises ConfigError for both
    and for neither."""
    if (run is None) == (address is None):
        raise ConfigError(
            "which campaign? expected a run directory, or --address HOST:PORT of one elsewhere, and not both"
        )
    if run is not None:
        if security is not None:
            raise ConfigError("--security is for --address; a run directory needs none")
        return FileControl(run)
    from rayhf.control.grpc_client import GrpcControl

    shown = NO_SECURITY if security is None else load_section(security, (), EndpointSecurity)
    return GrpcControl(str(address), shown, base=Path.cwd())


def show_status(control: Control, console: Console) -> None:
    """A page that fits a terminal."""
    status = control.status()
    table = Table(
        title=f"{escape(plain(status.run.name))}: {status.state.upper()}",
        show_header=False,
        title_style=_STYLES.get(status.state, "red"),
    )
    for label, value in _lines(status):
        if value:
            table.add_row(label, escape(plain(value)))
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
        (
            "weights",
            ", ".join(
                f"{name.removesuffix('/version')} version {value:.0f}"
                for name, value in status.versions.items()
            ),
        ),
        ("last commit", status.commit),
        ("health", ", ".join(f"{name} {value:.3g}" for name, value in status.health.items())),
        (f"faults in 24 h: {status.fault_count}", "\n".join(status.faults)),
        ("next", status.advice),
    ]


def watch(control: Control, console: Console) -> None:
    """Print events as they come, until the campaign ends or somebody presses Ctrl-C."""
    try:
        for event in control.watch(lambda: True):
            _say(console, f"{event.time[11:19]} {event.kind:<9} {event.message}")
    except KeyboardInterrupt:
        return


def add_prompts(control: Control, file: Path, console: Console) -> None:
    rows = [row for _, row in read_rows(file, key="FILE")]
    _say(console, control.add_prompts(rows, source=getpass.getuser()))


def show_pairs(control: Control, count: int, console: Console) -> None:
    """One JSON object per line, for a labelling tool; `label --file` takes its verdicts back."""
    for pair in control.uncertain_pairs(count):
        row = {
            "pair_id": pair.pair_id,
            "messages": list(pair.messages),
            "first": pair.first,
            "second": pair.second,
        }
        _say(console, json.dumps(row | {"certainty": pair.certainty}))


def label(control: Control, console: Console, *, file: Path | None, count: int) -> None:
    """Hand in a file's verdicts, or ask for them here, pair by pair."""
    if file is not None:
        labels = [_label(row, where) for where, row in read_rows(file, key="--file")]
    else:
        labels = list(_asked(control.uncertain_pairs(count), console))
    _say(
        console, control.label(labels, source=getpass.getuser()) if labels else "nothing was judged"
    )


def _label(row: Mapping[str, Any], where: str) -> dict[str, str]:
    if not all(isinstance(row.get(key), str) for key in ("pair_id", "verdict")):
        raise ConfigError(
            f"{where}: expected `pair_id` and `verdict` (first, second or tie), got keys {', '.join(sorted(row))}"
        )
    return {"pair_id": row["pair_id"], "verdict": row["verdict"]}


def _asked(pairs: Iterable[UncertainPair], console: Console) -> Iterable[dict[str, str]]:
    for pair in pairs:
        for message in pair.messages:
            console.print(
                Panel(Text(plain(message["content"])), title=escape(plain(message["role"])))
            )
        console.print(
            Panel(Text(plain(pair.first)), title="1"), Panel(Text(plain(pair.second)), title="2")
        )
        said = Prompt.ask(
            "better: 1, 2, t(ie), s(kip), q(uit)",
            choices=["1", "2", "t", "s", "q"],
            console=console,
        )
        if said == "q":
            return
        if said != "s":
            yield {
                "pair_id": pair.pair_id,
                "verdict": {"1": "first", "2": "second", "t": "tie"}[said],
            }


def ask(control: Control, wanted: str, console: Console) -> None:
    """pause, unpause or stop."""
    _say(
        console,
        control.unpause()
        if wanted == "unpause"
        else control.request("pause" if wanted == "pause" else "stop"),
    )


def _say(console: Console, line: str) -> None:
    console.print(plain(line), markup=False, highlight=False, soft_wrap=True)


def show_audit(run: Path, console: Console, *, deep: bool) -> None:
    """What was looked at, and what is wrong. Raises CheckpointError where anything is."""
    table = Table("what", "finding", title=f"verify {escape(plain(str(run)))}")
    sound = 0
    problems: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("verify", total=None)
        for finding in audit(run, deep=deep):
            what, problem = escape(plain(finding.what)), escape(plain(finding.problem))
            progress.update(line, description=what, advance=1)
            if finding.problem:
                problems.append(f"{finding.what}: {finding.problem}")
                table.add_row(what, problem, style="red")
            else:
                sound += 1
    table.add_row(
        f"{sound} other{'s' if sound != 1 else ''}" if problems else f"all {sound}",
        "as they were written",
    )
    console.print(table)
    if problems:
        raise CheckpointError(
            f"{run}: {len(problems)} of {len(problems) + sound} findings are bad; the first: {problems[0]}"
        )


def explain(code: int | None, console: Console) -> None:
    """What an exit code means and what to do; all of them where none is named. Raises ConfigError
    for one that is not ours."""
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
    found.append(
        (
            130,
            "",
            "`rayhf submit --follow` was left with Ctrl-C; the job goes on",
            "`rayhf stop RUN` stops it",
        )
    )
    found.append(
        (143, "", "ended by SIGTERM before anything could be said", "the same command continues")
    )
    return sorted(found, key=lambda row: (row[0], row[1]))
