"""Intervals of a run's evaluations, and what changed between the first and the last one.

From the values by prompt in evaluations/: 95 % bootstrap intervals over prompts. Every evaluation
has the same prompts and seeds, so that differences are paired. A figure that is no mean over
prompts brings its interval as two more metrics, NAME_low and NAME_high; of these, a
length-controlled win rate has a difference, from the win probabilities and lengths by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rayhf.evaluation.statistics import Estimate, mean_estimate, mean_estimates
from rayhf.evaluation.values import PromptValues
from rayhf.evaluation.win_rates import Duels, length_controlled_difference
from rayhf.run_dir.tables import read_evaluations
from rayhf.view.run import Run

MAX_BANDS = 200
"""Evaluations of a curve with intervals; of more, every second, fourth ... has one."""
_CONTROLLED = "_length_controlled"
Measured = tuple[int, Path, int]
"""An evaluation: its iteration, its file, and the time of the file's last change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure of the first and of the last evaluation that has it."""

    metric: str
    iterations: tuple[int, int]
    before: Estimate | None
    """None where it was measured once."""
    after: Estimate
    difference: Estimate | None
    """Paired by prompt; None where values by prompt are not known."""


def intervals(run: Run) -> dict[str, list[tuple[int, float, float]]]:
    """Return (iteration, low, high) of every evaluated metric that has intervals, in order."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for line in run.metrics():
        for name, (low, high) in _given(line).items():
            found.setdefault(name, []).append((int(line["iteration"]), low, high))
    given = set(found)
    for iteration, file in _evenly(run.tables("evaluations")).items():
        for name, estimate in _estimates(file, _changed(file)).items():
            if name not in given and estimate.count > 1:
                found.setdefault(name, []).append((iteration, estimate.low, estimate.high))
    return found


def changes(run: Run) -> list[Change]:
    """Return the change of every evaluated metric, in the order of their names."""
    first: dict[str, Measured] = {}
    last: dict[str, Measured] = {}
    for iteration, file in run.tables("evaluations").items():
        changed = _changed(file)
        for name in _names(file, changed):
            first.setdefault(name, (iteration, file, changed))
            last[name] = (iteration, file, changed)
    compared = {name: _change(name, first[name], last[name]) for name in last}
    rows = {name: change for name, change in compared.items() if change is not None}
    measured: dict[str, list[tuple[int, Estimate]]] = {}
    for line in run.metrics():
        for name, (low, high) in _given(line).items():
            estimate = Estimate(value=line[name], low=low, high=high, count=0)
            measured.setdefault(name, []).append((int(line["iteration"]), estimate))
    for name, points in measured.items():
        if name not in rows:
            rows[name] = Change(
                metric=name,
                iterations=(points[0][0], points[-1][0]),
                before=points[0][1] if len(points) > 1 else None,
                after=points[-1][1],
                difference=_controlled_change(name, first, last),
            )
    return [rows[name] for name in sorted(rows, key=_place)]


def _controlled_change(
    metric: str, first: Mapping[str, Measured], last: Mapping[str, Measured]
) -> Estimate | None:
    """Return the change of a length-controlled win rate; None for another metric.

    None also where its win probabilities and lengths by prompt are not known, or were measured
    once.
    """
    rate = metric.removesuffix(_CONTROLLED)
    gap = f"{rate.rpartition('/')[0]}/length_gap"
    if rate == metric or not {rate, gap} <= first.keys() or first[rate] == last[rate]:
        return None
    return _controlled_difference(rate, gap, first[rate], last[rate])


@lru_cache(maxsize=100)
def _controlled_difference(rate: str, gap: str, first: Measured, last: Measured) -> Estimate | None:
    """Return the paired difference of two measurements, from the prompts that both have."""
    earlier = _by_prompt(first, rate, gap)
    later = _by_prompt(last, rate, gap)
    common = [prompt for prompt in later if prompt in earlier]
    if not common:
        return None
    before, after = (_duels([each[prompt] for prompt in common]) for each in (earlier, later))
    return length_controlled_difference(before, after)


def _by_prompt(measured: Measured, rate: str, gap: str) -> dict[str, tuple[float, float]]:
    """Return (win probability, length gap) by prompt."""
    values = _values(measured[1], measured[2])
    if rate not in values or gap not in values:
        return {}
    gaps = dict(zip(values[gap].prompt_ids, values[gap].values_P, strict=True))
    wins = zip(values[rate].prompt_ids, values[rate].values_P, strict=True)
    return {prompt: (win, gaps[prompt]) for prompt, win in wins if prompt in gaps}


def _duels(rows: Sequence[tuple[float, float]]) -> Duels:
    """Return one comparison per prompt."""
    columns = np.array(rows, dtype=np.float64)
    return Duels(win_D=columns[:, 0], length_gap_D=columns[:, 1], prompt_D=np.arange(len(rows)))


def _place(metric: str) -> tuple[int, str]:
    """Return the place of a metric in the table: what is trained for comes first."""
    kind = metric.rpartition("/")[2]
    order = ("sampled", "greedy")
    return (order.index(kind) if kind in order else len(order)), metric


@lru_cache(maxsize=4000)
def _change(metric: str, first: Measured, last: Measured) -> Change | None:
    """Return the change of a metric; None where one of the files has vanished meanwhile."""
    old = _values(first[1], first[2]).get(metric)
    new = _values(last[1], last[2]).get(metric)
    if old is None or new is None:
        return None
    places = {prompt: place for place, prompt in enumerate(old.prompt_ids)}
    common = [place for place, prompt in enumerate(new.prompt_ids) if prompt in places]
    earlier = [places[new.prompt_ids[place]] for place in common]
    difference = None
    if first[0] != last[0] and common:
        gains = new.values_P[common] - old.values_P[earlier]
        difference = mean_estimate(gains, new.weights_P[common])
    return Change(
        metric=metric,
        iterations=(first[0], last[0]),
        before=_estimate(old) if first[0] != last[0] else None,
        after=_estimate(new),
        difference=difference,
    )


def _estimate(values: PromptValues) -> Estimate:
    return mean_estimate(values.values_P, values.weights_P)


def _given(line: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the metrics of a line that bring their intervals: name -> (low, high)."""
    return {
        name: (line[f"{name}_low"], line[f"{name}_high"])
        for name in line
        if f"{name}_low" in line and f"{name}_high" in line
    }


def _evenly(files: Mapping[int, Path]) -> dict[int, Path]:
    """Return about MAX_BANDS files, the first and the last among them.

    They stay the same while a run goes on, so that their intervals are computed once.
    """
    numbers = list(files)
    step = 1
    while len(numbers) > MAX_BANDS * step:
        step *= 2
    return {number: files[number] for number in dict.fromkeys([*numbers[::step], *numbers[-1:]])}


def _changed(file: Path) -> int:
    """Return the time of a file's last change, 0 for one that vanished: the key of the caches."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4000)
def _estimates(file: Path, changed: int) -> dict[str, Estimate]:
    """Return every figure of an evaluation with its interval; those of as many prompts together."""
    by_count: dict[int, list[PromptValues]] = {}
    for values in _values(file, changed).values():
        by_count.setdefault(len(values.prompt_ids), []).append(values)
    return {
        values.metric: estimate for group in by_count.values() for values, estimate in _joint(group)
    }


def _joint(group: Sequence[PromptValues]) -> list[tuple[PromptValues, Estimate]]:
    values_MP = np.stack([values.values_P for values in group])
    weights_MP = np.stack([values.weights_P for values in group])
    return list(zip(group, mean_estimates(values_MP, weights_MP), strict=True))


@lru_cache(maxsize=20_000)
def _names(file: Path, _changed: int) -> tuple[str, ...]:
    """Return the metrics of an evaluation."""
    try:
        metrics = pq.read_table(file, columns=["metric"])["metric"]
    except (OSError, ValueError):
        return ()
    return tuple(metrics.unique().to_pylist())


@lru_cache(maxsize=4)
def _values(file: Path, _changed: int) -> dict[str, PromptValues]:
    """Return the figures of an evaluation by metric; the files of the last calls stay in memory."""
    try:
        return read_evaluations(file)
    except (OSError, ValueError):  # it vanished, or is damaged: `rayhf verify` names it
        return {}
