"""The commands that measure models: `rayhf eval` and `rayhf rank`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model directory, hub name, RUN or RUN@ITERATION (0: its start)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, like samples=8."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A suite (`rayhf list suites`), or a file of prompts or preference pairs; "
            "repeatable. Default: the config's.",
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="YAML",
            help="Settings of the evaluation, or a campaign's config, whose held-out prompts and "
            "scorers are a suite.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What to compare with: as MODEL, or a file of answers."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for results. Default: evals.")
    ] = None,
) -> None:
    """Measure a model, or a reward model, on suites: figures with intervals, win rates."""
    from launch.eval import evaluate
    from launch.eval_config import build_config

    config, target = build_config(
        model,
        suites=suite or (),
        file=settings,
        baseline=baseline,
        out=out,
        overrides=overrides or (),
    )
    evaluate(config, target, console)


def rank(
    answers: Annotated[
        list[Path], typer.Argument(metavar="ANSWERS...", help="Files of answers of `rayhf eval`.")
    ],
    judge: Annotated[
        Path, typer.Option(metavar="YAML", help="File with the key `judge`: a list of scorers.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write.")] = None,
) -> None:
    """Rank several policies by comparing their answers (Bradley-Terry), with intervals."""
    from launch.rank import rank

    rank(answers, judge, out, console)


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("eval")(evaluate)
    app.command()(rank)
