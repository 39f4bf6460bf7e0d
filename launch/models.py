"""Pin the hub names of a config to commits, and download their models with progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from launch.sanitize import print_plain
from rayhf.config.models import ModelName, map_models
from rayhf.models.hub import HubModel, download, resolve

C = TypeVar("C", bound=BaseModel)
_LINE_S = 10.0
"""Seconds between two lines about a download where there is no terminal."""


def pin_models(
    config: C,
    base: Path,
    console: Console,
    *,
    commits: Mapping[str, str] | None = None,
    weights: bool = True,
) -> tuple[C, dict[str, str]]:
    """Return the config with hub names pinned to commits, and the commit of each hub name.

    Args:
        config: any section.
        base: where relative paths start; a name that is a directory there is one.
        console: for a line about each model, and the download's progress.
        commits: commits that names were pinned to before; they do not move.
        weights: download the weights too; otherwise only configs and tokenizers.

    Raises ConfigError for a name that is neither a directory nor on the hub, and for what else
    keeps a model from being loaded.
    """
    known = dict(commits or {})
    used: dict[str, str] = {}

    def pin(key: str, name: ModelName) -> ModelName:
        text = str(name)
        if name.repository is None or (text not in known and (base / text).is_dir()):
            return name
        if text not in used:
            pinned = name.at(known[text]) if text in known else name
            model = resolve(pinned, key=key, weights=weights)
            print_plain(console, f"{key}: {_line(name, model)}")
            _download(model, key, console, weights=weights)
            used[text] = model.commit
        return name.at(used[text])

    return map_models(config, pin), used


def _line(name: ModelName, model: HubModel) -> str:
    missing = f", {_size(model.missing)} to download" if model.missing else ", cached"
    return f"{name} is commit {model.commit[:12]} ({_size(model.size)}{missing})"


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"


def _download(model: HubModel, key: str, console: Console, *, weights: bool) -> None:
    if not model.missing:
        # Also records in the cache which files belong to the commit.
        download(model, key=key, weights=weights)
        return
    with _progress(model, console) as report:
        download(model, key=key, weights=weights, progress=report)


@contextmanager
def _progress(model: HubModel, console: Console) -> Iterator[Callable[[int], None]]:
    """Yield what to call with received bytes: it updates a bar, or prints lines off a terminal."""
    received = 0
    shown = time.monotonic()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(model.repository, total=model.missing)

        def report(count: int) -> None:
            nonlocal received, shown
            received += count
            bar.update(task, completed=received)
            if not console.is_terminal and time.monotonic() - shown > _LINE_S:
                shown = time.monotonic()
                amount = f"{_size(received)} of {_size(model.missing)}"
                print_plain(console, f"{model.repository}: {amount}")

        yield report
    print_plain(console, f"{model.repository}: downloaded {_size(received)}")
