"""What a run was and how it went: facts, curves, differences of configs, timeline; as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayhf.errors import RayhfError
from rayhf.evaluation.statistics import Estimate
from rayhf.monitoring.catalog import describe
from rayhf.view.evaluations import Change, changes, intervals
from rayhf.view.run import Run, TimedEvent, scorer_names

MAX_POINTS = 1000
"""Iterations of a curve; longer runs are thinned out evenly."""
MAX_EVENTS = 2000
"""Newest events of the timeline."""
_ALARMS = ("warn", "pause", "fault")
_GUARD = re.compile(r"guard (\w+): ")
"""How the message of a guard's alarm begins."""
_HIDDEN = ("run.dir",)
"""Config keys in which two runs always differ."""


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page Overview shows of `runs`."""
    views = [run_overview(run) for run in runs]
    intact = [run for run, view in zip(runs, views, strict=True) if "error" not in view]
    return {"runs": views, "differences": config_differences(intact)}


def run_overview(run: Run) -> dict[str, Any]:
    """Return facts and curves of one run; `error` where its files are damaged."""
    try:
        status = run.status()
    except RayhfError as error:
        return {"id": run.run_id, "error": str(error)}
    metrics = run.metrics()
    shown = _thinned(metrics)
    names = sorted({name for line in shown for name in line} - {"iteration"})
    events = run.events()
    return {
        "id": run.run_id,
        "facts": _facts(run),
        "state": status.state,
        "reason": status.reason,
        "advice": status.advice,
        "iteration": status.iteration,
        "iterations": status.iterations,
        "phase": status.phase,
        "eta_s": status.eta_s,
        "task": run.config.get("prompts", {}).get("task") or "",
        "thinned": len(metrics) if len(shown) < len(metrics) else None,
        "x": [int(line["iteration"]) for line in shown],
        "curves": {name: [_number(line.get(name)) for line in shown] for name in names},
        "intervals": {
            name: [(i, _number(low), _number(high)) for i, low, high in rows]
            for name, rows in intervals(run).items()
        },
        "changes": [_change(each) for each in changes(run)],
        "alarms": [_alarm(e) for e in events if e.event.kind in _ALARMS][-200:],
        "criteria": _criteria(run.config),
        "config": dict(flat(run.config)),
    }


def config_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the config keys in which runs differ, with each run's value; None: not set."""
    configs = [dict(flat(run.config)) for run in runs]
    keys = sorted({key for config in configs for key in config} - set(_HIDDEN))
    return [
        {"key": key, "values": values}
        for key in keys
        if len(set(values := [config.get(key) for config in configs])) > 1
    ]


def timeline(run: Run) -> dict[str, Any]:
    """Return what the page Timeline shows: phases, events, waits and checkpoints of a run."""
    events = run.events()
    noted = [e for e in events if e.event.kind != "phase"]
    metrics = run.metrics()
    return {
        "id": run.run_id,
        "phases": list(_phases(events))[-MAX_EVENTS:],
        "events": [
            {
                "time": e.event.time,
                "attempt": e.event.epoch,
                "iteration": e.iteration,
                "kind": e.event.kind,
                "message": e.event.message,
                "code": e.event.code,
            }
            for e in noted[-MAX_EVENTS:]
        ],
        "left_out": max(0, len(noted) - MAX_EVENTS),
        "waits": _waits(metrics),
        "rewound": len(_rewound(run)),
        "checkpoints": run.checkpoints(),
        "best": run.state.best.iteration if run.state.best else None,
        "committed": run.state.checkpoint,
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as text) of a config."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                nested = item if isinstance(item, Mapping) else {"": item}
                yield from flat(nested, f"{name}.{index}.")
        else:
            yield name, "" if value is None else str(value)


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return (label, text) of what the run was."""
    config = run.config
    state = run.state
    algorithm = config.get("algorithm", {})
    loss = algorithm.get("loss")
    named = algorithm.get("type", "?") + (f", loss {loss['type']}" if _has_type(loss) else "")
    sources = config.get("prompts", {}).get("train") or []
    sources = [sources] if isinstance(sources, Mapping) else sources
    packages = run.packages()
    facts = [
        ("algorithm", named),
        ("policy", str(config.get("policy", {}).get("model", "?"))),
        ("training data", ", ".join(_source(source) for source in sources)),
        ("scorers", ", ".join(scorer_names(config))),
        ("seed", str(config.get("seed", "?"))),
        ("models at", "\n".join(f"{name} {commit[:12]}" for name, commit in state.models.items())),
        ("data at", "\n".join(f"{name} {at[:12]}" for name, at in state.datasets.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("attempts", str(state.epoch)),
        ("time", _time(run.metrics())),
    ]
    return [(label, text) for label, text in facts if text]


def _time(metrics: Sequence[Mapping[str, float]]) -> str:
    """Return how long the iterations took; start-ups are not among it."""
    lines = [line for line in metrics if line.get("iteration", 0) > 0]
    total = round(sum(line.get("time/iteration_s", 0.0) for line in lines))
    hours, seconds = divmod(total, 3600)
    parts = [(hours, "h"), (seconds // 60, "min"), (seconds % 60, "s")]
    text = " ".join(f"{count} {unit}" for count, unit in parts if count)
    return f"{text} of iterations, without start-ups" if text else ""


def _has_type(value: object) -> bool:
    return isinstance(value, Mapping) and "type" in value


def _source(source: object) -> str:
    if not isinstance(source, Mapping):
        return str(source)
    return str(source.get("dataset") or source.get("path") or source.get("type", "?"))


def _criteria(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the words of rubrics: the name of a part of a score -> the criterion."""
    words = {}
    scorer = config.get("scorer", {})
    for entry in [*(scorer.get("train") or []), *(scorer.get("evaluate") or [])]:
        rubric = entry.get("rubric") if isinstance(entry, Mapping) else None
        criteria = rubric.get("criteria") if isinstance(rubric, Mapping) else None
        name = entry.get("name") or entry.get("type") if isinstance(entry, Mapping) else ""
        for number, criterion in enumerate(criteria or [], 1):
            if isinstance(criterion, Mapping):
                part = criterion.get("name") or number
                words[f"{name}/{part}"] = str(criterion.get("criterion", ""))
    return words


def _thinned(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return at most MAX_POINTS lines, the first and the last one among them."""
    if len(metrics) <= MAX_POINTS:
        return metrics
    step = (len(metrics) - 1) / (MAX_POINTS - 1)
    return [metrics[round(i * step)] for i in range(MAX_POINTS)]


def _phases(events: Sequence[TimedEvent]) -> Iterator[dict[str, Any]]:
    """Yield every phase with its start and end.

    It ends with the next phase of its attempt, the last one with the attempt's last event.
    """
    open_phase: TimedEvent | None = None
    last: TimedEvent | None = None
    for timed in events:
        is_new_attempt = last is not None and timed.event.epoch != last.event.epoch
        if open_phase is not None and (timed.event.kind == "phase" or is_new_attempt):
            yield _phase(open_phase, last if is_new_attempt and last else timed)
            open_phase = None
        if timed.event.kind == "phase":
            open_phase = timed
        last = timed
    if open_phase is not None and last is not None:
        yield _phase(open_phase, last)


def _phase(start: TimedEvent, end: TimedEvent) -> dict[str, Any]:
    return {
        "name": start.event.message,
        "iteration": start.iteration,
        "attempt": start.event.epoch,
        "start": start.event.time,
        "end": end.event.time,
    }


def _waits(metrics: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the seconds of each kind of work, and of waiting, over all iterations.

    Exploration is busy while at least one generation is under way; the rest of it waits for
    scorers. What an iteration took beyond its own phases is overhead: tables, checkpoints.
    """
    lines = [line for line in metrics if line.get("iteration", 0) > 0]
    total = sum(line.get("time/iteration_s", 0.0) for line in lines)
    if not total:
        return []

    def seconds(name: str) -> float:
        return sum(line.get(f"time/{name}_s", 0.0) for line in lines)

    explore = seconds("explore")
    idle = max(0.0, explore - seconds("rollout"))
    outside = sum(seconds(name) for name in ("reference", "learner", "sync", "evaluate"))
    rows = [
        ("engines generate", seconds("rollout")),
        ("engines wait for scorers or for coroutines, within exploration", idle),
        ("scorers score, also beside generation", seconds("scorer")),
        (
            "reference and critic compute; engines idle unless exploration runs ahead",
            seconds("reference"),
        ),
        ("learner trains; engines idle unless exploration runs ahead", seconds("learner")),
        ("weights are sent; engines and learner wait", seconds("sync")),
        ("held-out evaluation; learner waits", seconds("evaluate")),
        ("tables, checkpoints and the rest", max(0.0, total - explore - outside)),
    ]
    rows.append(("all iterations", total))
    return [{"what": what, "seconds": s, "share": s / total} for what, s in rows]


def _rewound(run: Run) -> list[str]:
    """Return the metric lines of iterations that were repeated."""
    try:
        text = (run.path / "metrics.rewound.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return text.splitlines()


def _alarm(timed: TimedEvent) -> dict[str, Any]:
    """Return a warning, pause or fault; `guard` is the guard that gave it, or empty."""
    event = timed.event
    guard = _GUARD.match(event.message)
    return {
        "iteration": timed.iteration,
        "kind": event.kind,
        "guard": guard[1] if guard else "",
        "message": event.message,
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "metric": change.metric,
        "meaning": describe(change.metric),
        "iterations": change.iterations,
        "prompts": change.after.count or None,
        "before": _bounds(change.before),
        "after": _bounds(change.after),
        "difference": _bounds(change.difference),
    }


def _bounds(estimate: Estimate | None) -> list[float | None] | None:
    if estimate is None:
        return None
    return [_number(value) for value in (estimate.value, estimate.low, estimate.high)]


def _number(value: float | None) -> float | None:
    """Return a finite number with six significant digits, or None."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
