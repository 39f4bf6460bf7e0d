"""`rayhf tiny`: build the tiny world with a progress bar, and show what was built."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from rayhf.tiny import TaskInfo

_EVERY_S = 15.0
"""Seconds between two lines of a stage where the output is no terminal."""


def build_with_progress(
    directory: Path, *, tasks: Sequence[str], seed: int, console: Console
) -> dict[str, TaskInfo]:
    """Build the parts that are missing; return in no time when none is."""
    from rayhf.rollout.env import openmp_env

    os.environ.update(openmp_env())
    from rayhf.tiny import build

    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        line = progress.add_task("tiny world", total=1.0)
        started = time.monotonic()
        shown: dict[str, float] = {}
        """By stage, when its last line was shown."""

        def show(stage: str, fraction: float) -> None:
            progress.update(line, description=f"tiny world: {stage}", completed=fraction)
            now = time.monotonic()
            due = now - shown.get(stage, -_EVERY_S) >= _EVERY_S or fraction == 1.0
            if due and not console.is_terminal:
                text = f"tiny world: {stage}, {fraction:.0%} ({now - started:.0f} s)"
                console.print(text, markup=False, highlight=False)
                shown[stage] = now

        return build(directory, tasks=tasks, seed=seed, progress=show)


def tiny_table(built: dict[str, TaskInfo]) -> Table:
    """Return a table of sizes and measured figures."""
    table = Table("task", "what", "value", title="tiny world")
    for task, info in built.items():
        rows = [(name, f"{size:,}") for name, size in info.sizes.items()]
        rows += [(name, f"{value:.3f}") for name, value in info.measured.items()]
        rows.append(("build", "cached" if info.cached else f"{info.seconds:.0f} s"))
        for what, value in rows:
            table.add_row(task, what.replace("_", " "), value)
        table.add_section()
    return table
