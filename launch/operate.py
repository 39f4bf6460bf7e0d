"""Commands on a campaign: status, watch, verify, pause, unpause, stop, prompts, labels.

In: a run directory at hand, or the address of a campaign elsewhere that serves its control over
gRPC (rayhf/control/commands.py). Out: text on the console. None of the commands needs Ray.
"""

from __future__ import annotations

import getpass
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text

from launch.sanitize import plain, print_plain
from rayhf import errors
from rayhf.config.load import load_section
from rayhf.config.service import NO_SECURITY, EndpointSecurity
from rayhf.control.commands import Control, FileControl, Start
from rayhf.control.questions import UncertainCompletion, UncertainPair
from rayhf.control.status import Status
from rayhf.data.readers import read_rows
from rayhf.errors import CheckpointError, ConfigError
from rayhf.monitoring.audit import audit
from rayhf.run_dir.inbox import LABEL_KEYS
from rayhf.types import Message

Command = Literal["pause", "stop"]
_STYLES = {
    "running": "green",
    "done": "green",
    "new": "cyan",
    "paused": "yellow",
    "stopped": "yellow",
}
_VERDICTS = {"1": "first", "2": "second", "t": "tie"}
_THUMBS = {"u": "up", "d": "down"}


def control_of(run: Path | None, address: str | None, security: Path | None) -> Control:
    """Return the control of a campaign: of RUN, or of --address with --security.

    Raises ConfigError for both and for neither.
    """
    if (run is None) == (address is None):
        raise ConfigError(
            "which campaign? expected a run directory, or --address HOST:PORT of a campaign "
            "elsewhere, and not both"
        )
    if run is not None:
        if security is not None:
            raise ConfigError("--security is for --address; a run directory needs none")
        return FileControl(run)
    from rayhf.control.grpc_client import GrpcControl

    settings = NO_SECURITY if security is None else load_section(security, (), EndpointSecurity)
    return GrpcControl(str(address), settings, base=Path.cwd())


def show_status(control: Control, console: Console) -> None:
    """Print a campaign's state, small enough for one screen."""
    status = control.status()
    table = Table(
        title=f"{escape(plain(status.run.name))}: {status.state.upper()}",
        show_header=False,
        title_style=_STYLES.get(status.state, "red"),
    )
    for label, value in _status_rows(status):
        if value:
            table.add_row(label, escape(plain(value)))
    console.print(table)


def _status_rows(status: Status) -> list[tuple[str, str]]:
    age = status.progress_age_s
    eta = f", about {status.eta_s / 60:.0f} min left" if status.eta_s is not None else ""
    versions = [
        f"{name.removesuffix('/version')} version {value:.0f}"
        for name, value in status.versions.items()
    ]
    return [
        ("reason", status.reason),
        ("iterations", f"{status.iteration} of {status.iterations} committed{eta}"),
        ("under way", status.phase),
        ("last progress", f"{age:.0f} s ago" if age is not None else "never"),
        ("locked by", status.holder),
        ("attempt", str(status.epoch)),
        ("weights", ", ".join(versions)),
        (
            "models",
            "\n".join(f"{name} at {commit[:12]}" for name, commit in status.models.items()),
        ),
        ("last commit", status.commit),
        ("health", ", ".join(f"{name} {value:.3g}" for name, value in status.health.items())),
        (f"faults in 24 h: {status.fault_count}", "\n".join(status.faults)),
        ("next step", status.advice),
    ]


def watch(control: Control, console: Console) -> None:
    """Print events as they happen, until the campaign ends or Ctrl-C."""
    try:
        for event in control.watch(lambda: True):
            print_plain(console, f"{event.time[11:19]} {event.kind:<9} {event.message}")
    except KeyboardInterrupt:
        return


def add_prompts(control: Control, file: Path, console: Console) -> None:
    """Submit the prompts of a file."""
    rows = [row for _, row in read_rows(file, key="FILE")]
    print_plain(console, control.add_prompts(rows, source=_user()))


def _user() -> str:
    """Return who runs this command; containers often have no name for their user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def show_pairs(control: Control, count: int, console: Console) -> None:
    """Print one JSON object per pair, for a labeling tool; `label --file` takes its verdicts."""
    for pair in control.uncertain_pairs(count):
        row = {
            "pair_id": pair.pair_id,
            "messages": list(pair.messages),
            "first": pair.first,
            "second": pair.second,
            "certainty": pair.certainty,
        }
        print_plain(console, json.dumps(row))


def show_completions(control: Control, count: int, console: Console) -> None:
    """Print one JSON object per completion; `label --file` takes its verdicts."""
    for each in control.uncertain_completions(count):
        row = {
            "completion_id": each.completion_id,
            "messages": list(each.messages),
            "completion": each.completion,
            "certainty": each.certainty,
        }
        print_plain(console, json.dumps(row))


def label(control: Control, console: Console, *, file: Path | None, count: int) -> None:
    """Submit the verdicts of a file, or prompt for them one by one.

    For thumbs where the algorithm takes them, else for verdicts on pairs.
    """
    if file is not None:
        labels = [_label(row, where) for where, row in read_rows(file, key="--file")]
    elif control.status().takes_thumbs:
        labels = list(_prompt_for_thumbs(control.uncertain_completions(count), console))
    else:
        labels = list(_prompt_for_labels(control.uncertain_pairs(count), console))
    if labels:
        print_plain(console, control.label(labels, source=_user()))
    else:
        print_plain(console, "no verdicts were given")


def _label(row: Mapping[str, object], where: str) -> dict[str, str]:
    given = {key: row[key] for key in LABEL_KEYS if isinstance(row.get(key), str)}
    if len(given) != 2 or "verdict" not in given:
        raise ConfigError(
            f"{where}: expected `pair_id` and `verdict` (first, second or tie), or `completion_id` "
            f"and `verdict` (up or down), got keys {', '.join(sorted(row))}"
        )
    return {key: str(value) for key, value in given.items()}


def _prompt_for_labels(
    pairs: Iterable[UncertainPair], console: Console
) -> Iterable[dict[str, str]]:
    for pair in pairs:
        _print_messages(pair.messages, console)
        console.print(Panel(Text(plain(pair.first)), title="1"))
        console.print(Panel(Text(plain(pair.second)), title="2"))
        choice = Prompt.ask(
            "better: 1, 2, t(ie), s(kip), q(uit)",
            choices=[*_VERDICTS, "s", "q"],
            console=console,
        )
        if choice == "q":
            return
        if choice in _VERDICTS:
            yield {"pair_id": pair.pair_id, "verdict": _VERDICTS[choice]}


def _prompt_for_thumbs(
    completions: Iterable[UncertainCompletion], console: Console
) -> Iterable[dict[str, str]]:
    for each in completions:
        _print_messages(each.messages, console)
        console.print(Panel(Text(plain(each.completion)), title="completion"))
        choice = Prompt.ask(
            "thumb: u(p), d(own), s(kip), q(uit)", choices=[*_THUMBS, "s", "q"], console=console
        )
        if choice == "q":
            return
        if choice in _THUMBS:
            yield {"completion_id": each.completion_id, "verdict": _THUMBS[choice]}


def _print_messages(messages: Iterable[Message], console: Console) -> None:
    for message in messages:
        title = escape(plain(message["role"]))
        console.print(Panel(Text(plain(message["content"])), title=title))


def command(control: Control, name: Command, console: Console) -> None:
    """Send a command, and print what will happen."""
    print_plain(console, control.request(name))


def unpause(control: Control, console: Console, *, start: Start) -> None:
    """Resume a paused campaign, and print what will happen."""
    print_plain(console, control.unpause(start=start))


def show_audit(run: Path, console: Console, *, deep: bool) -> None:
    """Print what was checked and what is wrong. Raise CheckpointError where anything is."""
    table = Table("what", "finding", title=f"verify {escape(plain(str(run)))}")
    sound = 0
    problems: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("verify", total=None)
        for finding in audit(run, deep=deep):
            what = escape(plain(finding.what))
            progress.update(line, description=what, advance=1)
            if finding.problem:
                problems.append(f"{finding.what}: {finding.problem}")
                table.add_row(what, escape(plain(finding.problem)), style="red")
            else:
                sound += 1
    rest = f"{sound} other{'s' if sound != 1 else ''}" if problems else f"all {sound}"
    scope = "" if deep else " (names and sizes; --deep compares checksums)"
    table.add_row(rest, f"as they were written{scope}")
    console.print(table)
    if problems:
        raise CheckpointError(
            f"{run}: {len(problems)} of {len(problems) + sound} checks failed; the first: "
            f"{problems[0]}"
        )


def explain(code: int | None, console: Console) -> None:
    """Print what an exit code means and what to do; all of them by default.

    Raises ConfigError for a code that rayhf does not use.
    """
    table = Table("exit code", "error", "meaning", "what to do")
    rows = [row for row in exit_codes() if code is None or row[0] == code]
    if not rows:
        known = ", ".join(str(number) for number in sorted({row[0] for row in exit_codes()}))
        raise ConfigError(f"rayhf does not exit with {code}; its exit codes are {known}")
    for number, name, meaning, remedy in rows:
        table.add_row(str(number), name, meaning, remedy)
    console.print(table)


def exit_codes() -> list[tuple[int, str, str, str]]:
    """Return (code, error class, meaning, remedy) for every way in which a command may end."""
    codes = [
        (0, "", "the work was done", ""),
        (
            130,
            "",
            "ended by Ctrl-C before it could report anything; or `rayhf submit --follow` was left "
            "with it, and the job continues",
            "the same command continues; `rayhf stop RUN` stops a job",
        ),
    ]
    # In the first second of a start, or of another command than `run`, a signal itself ends it.
    for number, name in ((129, "SIGHUP"), (131, "SIGQUIT"), (143, "SIGTERM")):
        meaning = f"ended by {name} before it could report anything"
        codes.append((number, "", meaning, "the same command continues"))
    codes.append(
        (
            137,
            "",
            "ended by SIGKILL, for instance by the kernel because memory was short",
            "see `rayhf check` for the memory that it needs; the same command continues",
        )
    )
    for name, each in inspect.getmembers(errors, inspect.isclass):
        if issubclass(each, errors.RayhfError):
            codes.append((each.exit_code, name, each.meaning, each.remedy))
    return sorted(codes, key=lambda row: row[:2])
