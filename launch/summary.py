"""The table at a campaign's end: figures before and after with 95 % intervals, and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table

from launch.sanitize import plain
from rayhf.evaluation.statistics import Estimate, difference_of_means, mean_estimate
from rayhf.evaluation.values import PromptValues, prompt_values
from rayhf.monitoring.catalog import describe
from rayhf.view.evaluations import Change, changes
from rayhf.view.run import Run

PHASES = ("rollout", "scorer", "reference", "learner", "sync", "evaluate")
_HELDOUT = {
    "sampled": "held-out, temperature 1",
    "greedy": "held-out, greedy",
    "refined": "held-out, refined",
    "reward": "held-out, training reward",
    "reference_kl": "held-out, KL to reference (nats)",
    "length": "length, tokens",
    "truncated": "truncated",
    "unscored": "without a score",
}
"""Figures of prompts.heldout in their order."""
_HIDDEN = ("length", "truncated", "pair_margin")
"""Figures of further evaluations that the table leaves out."""
_LAST = 5
"""Iterations whose training reward is the one after training."""


def summary(path: Path, task: str) -> Table:
    """Return a table of what changed in a run, with intervals, and of its seconds by phase.

    Args:
        path: run directory.
        task: prompts.task of its config.
    """
    run = Run(path, path.name)
    iterations = [line for line in run.metrics() if line["iteration"] > 0]
    title = f"{escape(plain(path.name))}: before and after {len(iterations)} iterations"
    table = Table(title=title)
    table.add_column("95 % intervals over prompts", overflow="fold", min_width=18)
    for name in ("before", "after", "difference"):
        table.add_column(name, justify="right")
    figures = list(_figures(changes(run), task))
    for label, change in figures:
        table.add_row(
            escape(plain(label)), *map(_cell, (change.before, change.after)), _gain(change)
        )
    reward = _training_reward(run)
    if reward is not None:
        table.add_row(*reward)
    named = [label for label, change in figures if label == change.metric]
    table.caption = escape(plain("\n".join(f"{each}: {describe(each)}" for each in named))) or None
    table.caption_justify = "left"
    table.add_section()
    seconds = {
        name: sum(line.get(f"time/{name}_s", 0.0) for line in iterations)
        for name in (*PHASES, "iteration")
    }
    for name, total in seconds.items():
        if total:
            label = "seconds, all iterations" if name == "iteration" else f"seconds, {name}"
            table.add_row(label, "", f"{total:.1f}", "")
    return table


def _figures(found: Sequence[Change], task: str) -> Iterator[tuple[str, Change]]:
    """Yield (label, change) of what is shown: prompts.heldout first, without its sources."""
    by_name = {change.metric: change for change in found}
    for name, label in _HELDOUT.items():
        if change := by_name.get(f"eval/{task}/{name}"):
            yield label, change
    for change in found:
        kind, *names = change.metric.split("/")
        further = kind != "eval" or (len(names) == 2 and names[0] != task)
        if further and names[-1] not in _HIDDEN and "share" not in names:
            yield change.metric, change


def _training_reward(run: Run) -> tuple[str, str, str, str] | None:
    """Return the row of the training reward: different prompts before and after."""
    files = list(run.tables("samples").values())
    before = _scores(files[:1])
    after = _scores(files[-_LAST:])
    if before is None or after is None:
        return None
    first, last = ((each.values_P, each.weights_P) for each in (before, after))
    gain = difference_of_means(first, last) if min(len(first[0]), len(last[0])) > 1 else None
    label = f"training reward, first iteration and last {len(files[-_LAST:])}"
    before_cell, after_cell = (_cell(mean_estimate(*each)) for each in (first, last))
    return label, before_cell, after_cell, _cell(gain, "+")


def _scores(files: Sequence[Path]) -> PromptValues | None:
    """Return the scores of samples by prompt; None where there are none."""
    prompts: list[str] = []
    scores: list[float | None] = []
    for file in files:
        try:
            table = pq.read_table(file, columns=["prompt_id", "score"])
        except (OSError, ValueError):  # damaged: `rayhf verify` names it
            return None
        prompts += table["prompt_id"].to_pylist()
        scores += table["score"].to_pylist()
    values = prompt_values("scorer/reward_mean", prompts, scores)
    return values if values.prompt_ids else None


def _cell(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    bounds = (estimate.low, estimate.high)
    interval = "unknown" if math.isnan(estimate.low) else " to ".join(map(short_number, bounds))
    return f"{short_number(estimate.value, sign)}\n{interval}"


def short_number(value: float, sign: str = "") -> str:
    """Return a number with three digits after the point, or fewer where it is large."""
    # Three columns of intervals fit into 80 characters.
    digits = max(0, 3 - max(0, len(str(int(abs(value)))) - 1))
    return f"{value:{sign}.{digits}f}"


def _gain(change: Change) -> str:
    if change.difference is None:
        return "" if change.before is None else "unknown"
    return _cell(change.difference, "+")
