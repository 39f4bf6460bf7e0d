"""Commands around a config file: `rayhf init` and `rayhf config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli_arguments import Overrides
from rayhf.config.registry import ALGORITHMS
from rayhf.errors import ConfigError


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="New or empty directory for the project.")
    ],
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Algorithm; `rayhf list algorithms` prints them.",
            autocompletion=lambda: list(ALGORITHMS.builtin),
        ),
    ] = "online_dpo",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model directory or hub name.")
    ] = "Qwen/Qwen3-0.6B",
    device: Annotated[Literal["cpu", "gpu"], typer.Option(help="Device of every model.")] = "cpu",
) -> None:
    """Write a starting config with comments, a reward function and example rows."""
    from launch.new_project import show, write_project

    typer.echo(show(directory, write_project(directory, algorithm, model, device)))


def config(
    file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a campaign.")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of all keys, for editors.")
    ] = False,
    command: Annotated[
        Literal["run", "fit-scorer", "serve-scorer"],
        typer.Option("--for", help="The command whose config --schema describes."),
    ] = "run",
) -> None:
    """Print a config with every default, or the JSON schema of all configs."""
    from rayhf.config.base import Section
    from rayhf.config.fit import FitConfig
    from rayhf.config.json_schema import json_schema
    from rayhf.config.load import dump_config, load_config
    from rayhf.config.schema import CampaignConfig
    from rayhf.config.serve import ServeScorerConfig

    if schema == (file is not None):
        raise ConfigError("rayhf config: expected a config file, or --schema without one")
    if file is not None:
        typer.echo(dump_config(load_config(file, overrides or ())), nl=False)
        return
    roots: dict[str, type[Section]] = {
        "run": CampaignConfig,
        "fit-scorer": FitConfig,
        "serve-scorer": ServeScorerConfig,
    }
    typer.echo(json.dumps(json_schema(roots[command]), indent=2))
