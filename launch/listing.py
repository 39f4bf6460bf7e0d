"""`rayhf list`: the tables of what a config's `type` can name, and of the metrics."""

from __future__ import annotations

import difflib

from rich.console import Console
from rich.table import Table

from rayhf.config.registry import REGISTRIES, Registry, summary
from rayhf.errors import ConfigError
from rayhf.monitoring.catalog import METRICS

KINDS = (*REGISTRIES, "metrics")


def show(kind: str, console: Console) -> None:
    """Print one table. Raises ConfigError for a kind that does not exist."""
    if kind == "metrics":
        console.print(_metrics())
    elif kind in REGISTRIES:
        console.print(_plugins(kind, REGISTRIES[kind]))
    else:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(KINDS)}"
        raise ConfigError(f"rayhf list: {kind!r} is not a table; {hint}")


def _plugins(kind: str, registry: Registry) -> Table:
    table = Table(title=kind, caption=f"or package.module:Class; entry points: {registry.group}")
    table.add_column("type", no_wrap=True)
    table.add_column("what it is")
    table.add_column("from")
    for entry in registry.entries():
        table.add_row(entry.name, summary(registry.resolve(entry.name)), entry.package)
    return table


def _metrics() -> Table:
    table = Table(title="metrics", caption="<...> stands for a name; trackers receive all of them")
    for column in ("name", "unit", "meaning", "written by"):
        table.add_column(column, no_wrap=column == "name")
    for metric in METRICS:
        table.add_row(metric.name, metric.unit, metric.meaning, metric.writer)
    return table
