"""The commands that observe and control a campaign, also through its service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from launch.cli_arguments import Overrides, RunDirectory

console = Console()

RunOrNone = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Run directory, unless --address is given.")
]
Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address of a campaign that serves its control."),
]
Security = Annotated[
    Path | None,
    typer.Option(
        metavar="YAML", help="File with ca, certificate, key and token_file for --address."
    ),
]


def status(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Print a campaign's state, iteration, phase, health and faults, and what to do next."""
    from launch.operate import control_of, show_status

    show_status(control_of(run_dir, address, security), console)


def watch(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Print a campaign's events as they happen, until it ends."""
    from launch import operate

    operate.watch(operate.control_of(run_dir, address, security), console)


def verify(
    run_dir: RunDirectory,
    deep: Annotated[bool, typer.Option(help="Read every file and compare its checksum.")] = False,
) -> None:
    """Check that all committed files are as they were written, with every sample exactly once."""
    from launch.operate import show_audit

    show_audit(run_dir, console, deep=deep)


def pause(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Pause a running campaign after its iteration; its actors keep running."""
    _send("pause", run_dir, address, security)


def unpause(
    run_dir: RunOrNone = None,
    start: Annotated[
        Literal["unhealthy", "healthy"],
        typer.Option(
            "--from",
            help="After a guard's pause: unhealthy accepts the guard and loses nothing, healthy "
            "repeats from the last healthy commit and keeps the guard active.",
        ),
    ] = "unhealthy",
    address: Address = None,
    security: Security = None,
) -> None:
    """Resume a paused campaign."""
    from launch import operate

    operate.unpause(operate.control_of(run_dir, address, security), console, start=start)


def stop(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Stop a running campaign after its iteration; the same `rayhf run` command continues it."""
    _send("stop", run_dir, address, security)


def _send(
    name: Literal["pause", "stop"],
    run_dir: Path | None,
    address: str | None,
    security: Path | None,
) -> None:
    from launch.operate import command, control_of

    command(control_of(run_dir, address, security), name, console)


def add_prompts(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL or Parquet file, like prompts.train.")
    ],
    run_dir: RunOrNone = None,
    address: Address = None,
    security: Security = None,
) -> None:
    """Submit prompts; each is used once, in a campaign's next iteration."""
    from launch import operate

    operate.add_prompts(operate.control_of(run_dir, address, security), file, console)


def pairs(
    run_dir: RunOrNone = None,
    count: Annotated[int, typer.Option(min=1, help="Maximum number of pairs.")] = 20,
    address: Address = None,
    security: Security = None,
) -> None:
    """Print the pairs of completions that the scorers are least certain about, as JSON lines."""
    from launch.operate import control_of, show_pairs

    show_pairs(control_of(run_dir, address, security), count, console)


def completions(
    run_dir: RunOrNone = None,
    count: Annotated[int, typer.Option(min=1, help="Maximum number of completions.")] = 20,
    address: Address = None,
    security: Security = None,
) -> None:
    """Print the single completions that the scorers are least certain about, as JSON lines."""
    from launch.operate import control_of, show_completions

    show_completions(control_of(run_dir, address, security), count, console)


def label(
    run_dir: RunOrNone = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of pair_id and verdict (first, second or tie), or of completion_id "
            "and verdict (up or down); prompts interactively if omitted."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Maximum number to prompt for.")] = 20,
    address: Address = None,
    security: Security = None,
) -> None:
    """Label pairs or completions; the campaign trains on the verdicts in its next iteration."""
    from launch import operate

    operate.label(operate.control_of(run_dir, address, security), console, file=file, count=count)


def serve_campaign(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Serve a campaign's control over gRPC, even while it is not running.

    KEY=VALUE sets keys of the config's `service` section.
    """
    from launch.serve import serve_run

    serve_run(run_dir, overrides or (), console)


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(status)
    app.command()(watch)
    app.command()(verify)
    app.command()(pause)
    app.command()(unpause)
    app.command()(stop)
    app.command("add-prompts")(add_prompts)
    app.command()(pairs)
    app.command()(completions)
    app.command()(label)
    app.command("serve-campaign")(serve_campaign)
