"""Console output of a campaign: placement and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from launch.sanitize import print_plain
from rayhf.planning.placement import ActorSpec, NodeResources, amounts, bundles, members, pack

_SILENT = ("commit",)
_STYLES = {"fault": "red", "pause": "yellow", "warn": "yellow"}


class LiveView:
    """Observer that prints to a console."""

    def __init__(self, console: Console, *, iterations: int, task: str) -> None:
        self._console = console
        self._iterations = iterations
        self._task = task
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("iteration {task.fields[iteration]}/{task.fields[iterations]}"),
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._line: TaskID | None = None

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        if self._progress.disable:
            return
        if self._line is None:
            self._line = self._progress.add_task(
                name, total=total or None, iteration=iteration, iterations=self._iterations
            )
        self._progress.update(
            self._line,
            description=name,
            completed=done,
            total=total or None,
            iteration=iteration,
        )

    def metrics(self, metrics: Mapping[str, float]) -> None:
        print_plain(self._console, iteration_line(metrics, self._iterations, self._task))

    def event(self, kind: str, message: str) -> None:
        if kind not in _SILENT:
            print_plain(self._console, f"{kind}: {message}", style=_STYLES.get(kind))


def iteration_line(metrics: Mapping[str, float], iterations: int, task: str) -> str:
    """Return the most important metrics of one iteration in one line."""
    width = len(str(iterations))
    parts = [f"iteration {int(metrics['iteration']):>{width}}/{iterations}"]
    for label, name, form in (
        ("reward", "scorer/reward_mean", ".3f"),
        ("length", "rollout/length_mean", ".1f"),
        ("loss", "learner/loss", ".4f"),
        ("kl", "reference/kl", ".3f"),
        ("s", "time/iteration_s", ".1f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    evaluated = [
        f"{name} {metrics[f'eval/{task}/{name}']:.3f}"
        for name in ("sampled", "greedy")
        if f"eval/{task}/{name}" in metrics
    ]
    if unscored := metrics.get(f"eval/{task}/unscored"):
        evaluated.append(f"({unscored:.1%} without a score)")
    if evaluated:
        parts.append(f"| held-out {' '.join(evaluated)}")
    return "  ".join(parts)


def placement_table(specs: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> Table:
    """Return a table of actors per node, and of those without room; without nodes, per bundle."""
    requests = bundles(specs)
    groups = members(specs)
    if not nodes:
        table = Table("bundle", "requested", "actors", title="placement")
        for number, (bundle, group) in enumerate(zip(requests, groups, strict=True)):
            table.add_row(str(number), escape(amounts(bundle)), _names(group))
        return table
    resources = list(dict.fromkeys(name for bundle in requests for name in bundle))
    columns = [f"{escape(name)} free / all" for name in resources]
    table = Table("node", *columns, "actors", title="placement")
    homes = pack(requests, nodes)
    for node in nodes:
        here = [
            spec
            for home, group in zip(homes, groups, strict=True)
            if home == node.name
            for spec in group
        ]
        cells = [f"{node.free.get(r, 0.0):g} / {node.total.get(r, 0.0):g}" for r in resources]
        table.add_row(node.name, *cells, _names(here))
    for bundle, group, home in zip(requests, groups, homes, strict=True):
        if home is None:
            cells = [f"{bundle.get(name, 0.0):g}" for name in resources]
            table.add_row("no room for", *cells, _names(group), style="red")
    return table


def _names(group: Sequence[ActorSpec]) -> str:
    return ", ".join(
        f"{spec.name} ({spec.gpus:g} GPU)" if spec.gpus else spec.name for spec in group
    )
