"""What a person sees of a campaign: who sits where, a live line in a terminal, plain lines
elsewhere, a table at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

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

from launch.sanitize import plain
from rayhf.planning.placement import ActorSpec, NodeResources, amounts, bundles, members, pack

_SILENT = ("commit",)
_STYLES = {"fault": "red", "pause": "yellow", "warn": "yellow"}
PHASES = ("rollout", "scorer", "reference", "learner", "sync", "evaluate")


class LiveView:
    """An Observer on a rich console."""

    def __init__(self, console: Console, *, iterations: int, task: str) -> None:
        self._console, self._iterations, self._task = console, iterations, task
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("round {task.fields[round]}/{task.fields[rounds]}"),
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
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        if self._progress.disable:
            return
        fields: dict[str, Any] = {"round": iteration, "rounds": self._iterations}
        if self._line is None:
            self._line = self._progress.add_task(name, total=total or None, **fields)
        self._progress.update(
            self._line, description=name, completed=done, total=total or None, **fields
        )

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._console.print(
            round_line(metrics, self._iterations, self._task),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def event(self, kind: str, message: str) -> None:
        if kind not in _SILENT:
            line = plain(f"{kind}: {message}")
            self._console.print(
                line, style=_STYLES.get(kind), markup=False, highlight=False, soft_wrap=True
            )


def round_line(metrics: Mapping[str, float], iterations: int, task: str) -> str:
    """One round in one line."""
    parts = [f"round {int(metrics['iteration']):>{len(str(iterations))}}/{iterations}"]
    for label, name, form in (
        ("reward", "scorer/reward_mean", ".3f"),
        ("length", "rollout/length_mean", ".1f"),
        ("loss", "learner/loss", ".4f"),
        ("kl", "reference/kl", ".3f"),
        ("s", "time/iteration_s", ".1f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    evaluated = {
        name: metrics[f"eval/{task}/{name}"]
        for name in ("sampled", "greedy")
        if f"eval/{task}/{name}" in metrics
    }
    if evaluated:
        parts.append(
            "| held-out " + " ".join(f"{name} {value:.3f}" for name, value in evaluated.items())
        )
    return "  ".join(parts)


def summary(run: Path, task: str) -> Table:
    """Before and after, and where the time went, from metrics.jsonl alone."""
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    rounds = [line for line in lines if line["iteration"] > 0]
    table = Table(title=f"{escape(plain(run.name))}: before and after {len(rounds)} rounds")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify="left" if justify == "left" else "right")
    for label, name in (
        ("held-out, temperature 1", "sampled"),
        ("held-out, greedy", "greedy"),
        ("held-out, training reward", "reward"),
        ("KL to the reference, nats per response", "reference_kl"),
        ("length, tokens", "length"),
        ("truncated", "truncated"),
    ):
        if evaluated:
            _row(
                table,
                label,
                *(line.get(f"eval/{task}/{name}") for line in (evaluated[0], evaluated[-1])),
            )
    if rounds:
        _row(
            table,
            "training reward per round",
            rounds[0].get("scorer/reward_mean"),
            _mean(rounds[-5:], "scorer/reward_mean"),
        )
        table.add_section()
        for phase in PHASES:
            total = sum(line.get(f"time/{phase}_s", 0.0) for line in rounds)
            if total:
                table.add_row(f"{phase}, seconds in all", "", f"{total:.1f}")
        table.add_row(
            "rounds, seconds in all", "", f"{sum(line['time/iteration_s'] for line in rounds):.1f}"
        )
    return table


def _row(table: Table, label: str, *values: float | None) -> None:
    if any(value is not None for value in values):
        table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(line[name]) for line in lines if name in line]
    return sum(values) / len(values) if values else None


def placement_table(found: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> Table:
    """Who would sit on which node, and who has no place; without nodes, who sits in which
    bundle."""
    wanted, groups = bundles(found), members(found)
    kinds = list(dict.fromkeys(kind for bundle in wanted for kind in bundle))
    if not nodes:
        table = Table("bundle", "requested", "actors", title="placement")
        for number, (bundle, group) in enumerate(zip(wanted, groups, strict=True)):
            table.add_row(str(number), escape(amounts(bundle)), _who(group))
        return table
    table = Table(
        "node", *(f"{escape(kind)} free / all" for kind in kinds), "actors", title="placement"
    )
    homes = pack(wanted, nodes)
    for node in nodes:
        here = [
            spec
            for home, group in zip(homes, groups, strict=True)
            if home == node.name
            for spec in group
        ]
        room = [f"{node.free.get(kind, 0.0):g} / {node.total.get(kind, 0.0):g}" for kind in kinds]
        table.add_row(node.name, *room, _who(here))
    for bundle, group, home in zip(wanted, groups, homes, strict=True):
        if home is None:
            table.add_row(
                "no place for",
                *(f"{bundle.get(kind, 0.0):g}" for kind in kinds),
                _who(group),
                style="red",
            )
    return table


def _who(group: Sequence[ActorSpec]) -> str:
    return ", ".join(
        f"{spec.name} ({spec.gpus:g} GPU)" if spec.gpus else spec.name for spec in group
    )
