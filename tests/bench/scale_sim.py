"""Scale of a single controller.

    python -m tests.bench.scale_sim [--quick] [--record]

The real controller, scheduler, journal, run directory, supervision and rollout pool, over simulated
roles (simulated.py) in virtual time (virtual.py), for a grid of engines and prompts. Each case runs
in a process of its own and measures the controller's CPU time per prompt, memory, the virtual time
of an iteration against its lower bound, staleness, and lost engines. Quick takes minutes; the full
grid, up to a million prompts per iteration, half an hour.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.view import LiveView
from rayhf.campaign.controller import Controller
from rayhf.campaign.data import CampaignData
from rayhf.campaign.gc_tuning import gc_tuned
from rayhf.config.load import load_config
from rayhf.config.registry import ALGORITHMS
from rayhf.config.schema import CampaignConfig
from rayhf.data.chat import Chat
from rayhf.data.prompts import PromptSet
from rayhf.monitoring.event_log import EventLog
from rayhf.monitoring.observer import Observer
from rayhf.roles import Roles
from rayhf.run_dir.store import RunDir
from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import Prompt
from tests.bench.results import put_section
from tests.bench.simulated import Meter, SimLearner, SimScorer, World, engines
from tests.bench.virtual import simulate

ROOT = Path(__file__).resolve().parents[2]
PER_STEP = 1024
"""Prompts per optimizer step."""
REPEATS = 3
"""Runs of a case of up to `SMALL` prompts; the one with the least CPU time counts."""
SMALL = 16_384
TURN_PROMPTS = 131_072
"""Prompts per iteration at which the event loop's longest turn has a target."""
LONG = 512
"""Tokens per completion of the cases whose memory has a target."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    engines: int
    prompts: int
    """Per iteration; a power of two."""
    iterations: int = 2
    samples: int = 2
    tokens: int = 32
    max_staleness: int = 1
    in_flight: int | None = None

    @property
    def setting(self) -> str:
        """How it differs from the plain grid; empty for a case of the grid."""
        parts = []
        if (self.samples, self.tokens) != (2, 32):
            parts.append(f"{self.samples} x {self.tokens} tokens")
        if self.max_staleness != 1:
            parts.append(f"staleness {self.max_staleness}")
        if self.max_staleness == 0:
            parts.append("in waves")
        if self.in_flight:
            parts.append(f"{self.in_flight:,} in flight")
        return ", ".join(parts)

    @property
    def per_step(self) -> int:
        return min(PER_STEP, self.prompts)

    def config(self, run: Path) -> CampaignConfig:
        run_section = {
            "dir": str(run),
            "iterations": self.iterations,
            "eval_every": 0,
            "max_staleness": self.max_staleness,
        }
        data = {
            "run": {**run_section, "max_in_flight": self.in_flight},
            "policy": {"model": "none"},
            "prompts": {"train": "none", "batch": self.prompts},
            "algorithm": {"type": "online_dpo", "samples": self.samples},
            "rollout": {"engines": self.engines, "max_num_seqs": World(engines=1).slots},
            "scorer": {"train": [{"type": "rule", "function": "none:none"}]},
            "learner": {"prompts_per_step": self.per_step},
        }
        return load_config(data)


class NoChat(Chat):
    """A chat template that the campaign never uses."""

    def __init__(self) -> None:
        self.max_length = 1 << 20


class MetricsObserver:
    """An observer that collects metrics and passes everything on."""

    def __init__(self, inner: Observer) -> None:
        self._inner = inner
        self.lines: list[dict[str, float]] = []

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        self._inner.phase(iteration, name, done, total)

    def event(self, kind: str, message: str) -> None:
        self._inner.event(kind, message)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self.lines.append(dict(metrics))
        self._inner.metrics(metrics)


def make_prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            prompt_id=f"{i:016x}",
            messages=({"role": "user", "content": f"question {i} of a few more words"},),
            token_ids=tuple(range(1000 + i, 1016 + i)),
        )
        for i in range(count)
    )


async def _campaign(
    case: Case,
    config: CampaignConfig,
    prompts: PromptSet,
    store: RunDir,
    observer: MetricsObserver,
    world: World,
    meter: Meter,
) -> tuple[float, int]:
    """Run the campaign; return its CPU seconds, and the bytes of memory before its first
    iteration."""
    pool = await engines(world, meter)
    learner = SimLearner(world, meter, rows_per_step=case.per_step * 2)
    scorer = RetryingScorer(
        SimScorer(world, meter),
        attempts=config.scorer.attempts,
        tolerated=config.scorer.max_failed,
        report=observer.event,
    )
    roles = Roles(
        rollouts={"policy": pool},
        learners={"policy": learner},
        scorer=scorer,
        evaluator=None,
        critic=None,
        reference=learner,
    )
    controller = Controller(
        config,
        algorithm=ALGORITHMS.build(config.algorithm),
        roles=roles,
        data=CampaignData(chat=NoChat(), prompts=prompts),
        store=store,
        observer=observer,
    )
    with gc_tuned():
        before = _memory("VmRSS")
        started = time.process_time()
        await controller.run()
        return time.process_time() - started, before


def measure(case: Case, run: Path, world: World | None = None) -> dict[str, Any]:
    """Run one case in this process; return its figures."""
    world = world or World(engines=case.engines, tokens=case.tokens)
    config = case.config(run)
    meter = Meter()
    store = RunDir(config)
    view = LiveView(Console(file=io.StringIO()), iterations=case.iterations, task="none")
    observer = MetricsObserver(EventLog(store, view))
    prompts = PromptSet(prompts=make_prompts(case.prompts), duplicates=0, label="scale_sim")
    meter.watch_collector()
    try:
        (cpu_s, before), loop = simulate(
            _campaign(case, config, prompts, store, observer, world, meter), meter.worked
        )
    finally:
        gc.callbacks.remove(meter._collector)
        store.close()
    own_s = cpu_s - meter.cpu_s - meter.measuring_s()
    virtual_s = loop.time() - world.restart_s
    return {
        "cpu_us": own_s / (case.prompts * case.iterations) * 1e6,
        "gc": meter.gc_s / own_s,
        "before_mib": before / 2**20,
        "peak_mib": _memory("VmHWM") / 2**20,
        "kib_per_prompt": (_memory("VmHWM") - before) / case.prompts / 2**10,
        "iteration_s": virtual_s / case.iterations,
        "over_ideal": virtual_s / _ideal_s(case, world, meter),
        "busy": meter.generated_s / (world.engines * world.slots * virtual_s),
        "load": own_s / virtual_s,
        "longest_turn_s": loop.longest_turn_s,
        "staleness": max(line.get("staleness/max", 0.0) for line in observer.lines),
        "failures": meter.failures,
        "busy_at_update": meter.busy_at_update,
    }


def _ideal_s(case: Case, world: World, meter: Meter) -> float:
    """Return the lower bound of virtual seconds: full engines and a learner that never waits."""
    steps = case.prompts // case.per_step
    generate = max(meter.generated_s / (world.engines * world.slots), meter.longest_s)
    learn = steps * world.step_s * 1.5 + 2 * world.sync_s
    if case.max_staleness == 0:
        return generate + case.iterations * learn
    return max(generate + learn, generate / case.iterations + case.iterations * learn)


def _memory(name: str) -> int:
    """Return bytes of memory from /proc: VmRSS is the current size, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) << 10


def in_child(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own, after a small campaign that loads all modules."""
    command = [sys.executable, "-m", "tests.bench.scale_sim", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def child(case: Case) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        small = Case(engines=2, prompts=8, max_staleness=case.max_staleness)
        measure(small, Path(scratch) / "first")
        print(json.dumps(measure(case, Path(scratch) / "run")))


COLUMNS: Mapping[str, tuple[str, str]] = {
    "CPU us per prompt": ("cpu_us", ".0f"),
    "of it GC": ("gc", ".0%"),
    "MiB before": ("before_mib", ".0f"),
    "peak MiB": ("peak_mib", ".0f"),
    "KiB per prompt": ("kib_per_prompt", ".1f"),
    "s per iteration": ("iteration_s", ",.0f"),
    "over the lower bound": ("over_ideal", ".2f"),
    "engines busy": ("busy", ".0%"),
    "controller busy": ("load", ".1%"),
    "longest turn s": ("longest_turn_s", ".2f"),
    "largest staleness": ("staleness", ".0f"),
    "engines lost": ("failures", "d"),
}


def table(results: list[tuple[Case, dict[str, Any]]]) -> str:
    heads = ["engines", "prompts per iteration", "iterations", "", *COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * 3 + "---|" + "--:|" * len(COLUMNS)]
    for case, figures in results:
        cells = [f"{case.engines:,}", f"{case.prompts:,}", str(case.iterations), case.setting]
        cells += [format(figures[key], form) for key, form in COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(results: list[tuple[Case, dict[str, Any]]]) -> str:
    grid = [(case, figures) for case, figures in results if not case.setting]
    worst = max(figures["cpu_us"] for _, figures in grid)
    spreads = []
    for size in {case.prompts for case, _ in grid}:
        same = [figures["cpu_us"] for case, figures in grid if case.prompts == size]
        spreads.append(max(same) / min(same))
    within = _yes(all(figures["staleness"] <= case.max_staleness for case, figures in results))
    turns = [f["longest_turn_s"] for case, f in results if case.prompts == TURN_PROMPTS]
    memory = [figures["kib_per_prompt"] for case, figures in results if case.tokens == LONG]
    busy = sum(figures["busy_at_update"] for _, figures in results)
    rows = [
        ("target", "measured", "expected", "met"),
        ("---", "--:", "--:", "---"),
        ("CPU per prompt, worst of the grid", f"{worst:.0f} us", "at most 200", _yes(worst <= 200)),
        (
            "its ratio, most / least, over engines for the same prompts",
            f"{max(spreads):.2f}",
            "at most 1.3",
            _yes(max(spreads) <= 1.3),
        ),
        ("staleness within its limit", within, "yes", within),
        ("weight updates of an engine that was generating", str(busy), "0", _yes(busy == 0)),
    ]
    if turns:
        name = f"longest turn of the event loop, {TURN_PROMPTS:,} prompts"
        rows.append((name, f"{max(turns):.2f} s", "at most 0.5", _yes(max(turns) <= 0.5)))
    if memory:
        name = f"memory per prompt of an iteration, 8 x {LONG} tokens"
        rows.append((name, f"{max(memory):.0f} KiB", "at most 120", _yes(max(memory) <= 120)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            *(Case(engines=e, prompts=p, iterations=3) for p in (512, 4096) for e in (8, 512)),
            Case(engines=64, prompts=2048, iterations=3, max_staleness=0),
        ]
    grid = [
        Case(engines=engines, prompts=prompts, iterations=iterations)
        for prompts, iterations in ((4096, 4), (16_384, 3))
        for engines in (8, 64, 512, 4096)
    ]
    return [
        *grid,
        Case(engines=64, prompts=131_072, iterations=2),
        Case(engines=4096, prompts=131_072, iterations=2),
        Case(engines=4096, prompts=1 << 20, iterations=1),
        Case(engines=64, prompts=16_384, iterations=3, max_staleness=0),
        Case(engines=64, prompts=16_384, iterations=3, max_staleness=2),
        Case(engines=64, prompts=131_072, iterations=1, in_flight=8192),
        Case(engines=64, prompts=4096, iterations=3, samples=8, tokens=LONG),
        Case(engines=64, prompts=4096, iterations=3, samples=8, tokens=LONG, max_staleness=0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument(
        "--record", action="store_true", help="write the tables into tests/bench/RESULTS.md"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(Case(**json.loads(options.case)))
        return
    results = []
    for case in cases(options.quick):
        runs = [in_child(case) for _ in range(REPEATS if case.prompts <= SMALL else 1)]
        results.append((case, min(runs, key=lambda figures: float(figures["cpu_us"]))))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    text = f"{_introduction()}\n\n{table(results)}\n\n{targets(results)}"
    print(text)
    if options.record:
        put_section("## Scale", text)


def _introduction() -> str:
    world = World(engines=1)
    return (
        f"`python -m tests.bench.scale_sim`, {time.strftime('%Y-%m-%d', time.gmtime())}, "
        f"{platform.machine()}, Python {platform.python_version()}. The real controller over "
        f"simulated roles in virtual time, which includes its own CPU time. Engines of "
        f"{world.slots} sequences, {world.sequence_s:g} s per sequence (lognormal, "
        f"{world.stragglers:.1%} take {world.slower:g} times as long), 2 completions of "
        f"{world.tokens} tokens, each engine lost every {world.life_s / 3600:g} h, "
        f"{world.unreachable:.1%} of the scores requested twice; staleness 1 unless stated "
        f"otherwise. Cases of up to {SMALL:,} prompts ran {REPEATS} times, and the run with the "
        "least CPU time counts: on a busy machine the same work takes up to 1.5 times as long."
    )


if __name__ == "__main__":
    main()
