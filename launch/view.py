"""Console output of a campaign: placement, progress, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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

from launch.sanitize import plain, print_plain
from rayhf.planning.placement import ActorSpec, NodeResources, amounts, bundles, members, pack
from rayhf.run_dir.records import read_metrics

_SILENT = ("commit",)
_STYLES = {"fault": "red", "pause": "yellow", "warn": "yellow"}
PHASES = ("rollout", "scorer", "reference", "learner", "sync", "evaluate")


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
    if evaluated:
        parts.append(f"| held-out {' '.join(evaluated)}")
    return "  ".join(parts)


def summary(run: Path, task: str) -> Table:
    """Return a table of metrics before and after, and of time per phase, from metrics.jsonl."""
    lines = read_metrics(run)
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    iterations = [line for line in lines if line["iteration"] > 0]
    title = f"{escape(plain(run.name))}: before and after {len(iterations)} iterations"
    table = Table(title=title)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    if evaluated:
        for label, name in (
            ("held-out, temperature 1", "sampled"),
            ("held-out, greedy", "greedy"),
            ("held-out, training reward", "reward"),
            ("KL to the reference, nats per response", "reference_kl"),
            ("length, tokens", "length"),
            ("truncated", "truncated"),
        ):
            key = f"eval/{task}/{name}"
            _add_row(table, label, evaluated[0].get(key), evaluated[-1].get(key))
        for key in sorted(evaluated[-1]):
            if key.endswith(("/nll", "/pair_accuracy")):
                _add_row(table, escape(plain(key)), evaluated[0].get(key), evaluated[-1][key])
    if iterations:
        _add_row(
            table,
            "training reward per iteration",
            iterations[0].get("scorer/reward_mean"),
            _mean(iterations[-5:], "scorer/reward_mean"),
        )
        table.add_section()
        for phase in PHASES:
            seconds = sum(line.get(f"time/{phase}_s", 0.0) for line in iterations)
            if seconds:
                table.add_row(f"{phase}, total seconds", "", f"{seconds:.1f}")
        seconds = sum(line["time/iteration_s"] for line in iterations)
        table.add_row("iterations, total seconds", "", f"{seconds:.1f}")
    return table


def _add_row(table: Table, label: str, *values: float | None) -> None:
    if any(value is not None for value in values):
        table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))


def _mean(lines: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [float(line[name]) for line in lines if name in line]
    return sum(values) / len(values) if values else None


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
