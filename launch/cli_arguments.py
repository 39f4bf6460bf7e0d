"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="YAML file; see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides, like learner.lr=1e-6."),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
