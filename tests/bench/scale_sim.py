"""How far one controller goes: `python -m tests.bench.scale_sim [--quick] [--record]`.

The real controller, exchange, journal, run directory, supervision and pool of engines, over
simulated roles (simulated.py) in virtual time (virtual.py), for a grid of engines and prompts. Each
case in a process of its own: processor time per prompt that is the controller's own, memory, the
virtual time of a round against the least that is possible, staleness, what was asked again. Quick
is a matter of minutes; the full grid, up to a million prompts a round, takes half an hour.
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
from rayhf.algorithms import build_algorithm
from rayhf.campaign.controller import CampaignData, Controller
from rayhf.campaign.gc_tuning import gc_tuned
from rayhf.config.load import validate
from rayhf.config.schema import CampaignConfig
from rayhf.data.prompts import PromptSet
from rayhf.roles import Roles
from rayhf.monitoring.event_log import EventLog
from rayhf.run_dir.store import RunDir
from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import Prompt
from tests.bench.results import put_section
from tests.bench.simulated import Meter, SimLearner, SimScorer, World, engines
from tests.bench.virtual import simulate

ROOT = Path(__file__).resolve().parents[2]
PER_STEP = 1024
"""Prompts per optimizer step."""
AGAIN = 3
"""How often a case of up to `SMALL` prompts is played; the run that took the least processor time
counts."""
SMALL = 16_384


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    engines: int
    prompts: int
    """Per round; a power of two."""
    rounds: int = 2
    samples: int = 2
    tokens: int = 32
    max_staleness: int = 1
    in_flight: int | None = None

    @property
    def kind(self) -> str:
        """What is unusual about it; the plain grid has none."""
        said = (
            [f"{self.samples} x {self.tokens} tokens"]
            if (self.samples, self.tokens) != (2, 32)
            else []
        )
        said += [f"staleness {self.max_staleness}"] if self.max_staleness != 1 else []
        said += ["in waves"] if self.max_staleness == 0 else []
        return ", ".join([*said, *([f"{self.in_flight:,} in flight"] if self.in_flight else [])])

    @property
    def per_step(self) -> int:
        return min(PER_STEP, self.prompts)

    def config(self, run: Path) -> CampaignConfig:
        run_section = {
            "dir": str(run),
            "iterations": self.rounds,
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
        return validate(data, source="scale_sim")


class Chat:
    """The campaign renders nothing of its own."""

    max_length = 1 << 20


class Watch:
    """An observer that notes when each round was done, in virtual seconds."""

    def __init__(self, inner: Any) -> None:
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
    case: Case, config: CampaignConfig, store: RunDir, watch: Watch, world: World, meter: Meter
) -> tuple[float, int]:
    """Play it; returns processor seconds of the whole, and bytes of memory before, once everybody
    was there."""
    pool = await engines(world, meter)
    learner = SimLearner(world, meter, rows_per_step=case.per_step * 2)
    scorer = RetryingScorer(
        SimScorer(world, meter),
        attempts=config.scorer.attempts,
        tolerated=config.scorer.max_failed,
        report=watch.event,
    )
    roles = Roles(
        rollouts={"policy": pool},
        learners={"policy": learner},
        scorer=scorer,
        evaluator=None,
        critic=None,
        reference=learner,
    )
    material: Any = CampaignData(
        chat=Chat(), prompts=PromptSet(prompts=make_prompts(case.prompts), duplicates=0)
    )
    controller = Controller(
        config,
        algorithm=build_algorithm(config.algorithm, max_tokens=config.rollout.max_tokens),
        roles=roles,
        data=material,
        store=store,
        observer=watch,
    )
    with gc_tuned():
        before, started = _memory("VmRSS"), time.process_time()
        await controller.run()
        return time.process_time() - started, before


def play(case: Case, run: Path, world: World | None = None) -> dict[str, Any]:
    """One case in this process."""
    world = world or World(engines=case.engines, tokens=case.tokens)
    config, meter = case.config(run), Meter()
    store = RunDir(config)
    view = LiveView(Console(file=io.StringIO()), iterations=case.rounds, task="none")
    watch = Watch(EventLog(store, view))
    meter.watch_collector()
    try:
        (cpu_s, before), loop = simulate(
            _campaign(case, config, store, watch, world, meter), meter.worked
        )
    finally:
        gc.callbacks.remove(meter._collector)
        store.close()
    prompts, own_s = case.prompts * case.rounds, cpu_s - meter.cpu_s - meter.measuring_s()
    ideal_s = _ideal(case, world, meter)
    virtual_s = loop.time() - world.restart_s
    return {
        "cpu_us": own_s / prompts * 1e6,
        "gc": meter.gc_s / own_s,
        "before_mib": before / 2**20,
        "peak_mib": _memory("VmHWM") / 2**20,
        "kib_per_prompt": (_memory("VmHWM") - before) / case.prompts / 2**10,
        "round_s": virtual_s / case.rounds,
        "over_ideal": virtual_s / ideal_s,
        "busy": meter.written_s / (world.engines * world.slots * virtual_s),
        "load": own_s / virtual_s,
        "longest_turn_s": loop.longest_turn_s,
        "staleness": max(line.get("staleness/max", 0.0) for line in watch.lines),
        "failures": meter.failures,
        "busy_at_update": meter.busy_at_update,
    }


def _ideal(case: Case, world: World, meter: Meter) -> float:
    """Virtual seconds that no schedule of this staleness can beat: full engines, a learner that
    never waits."""
    steps = case.prompts // case.per_step
    write = max(meter.written_s / (world.engines * world.slots), meter.longest_s)
    learn = steps * world.step_s * 1.5 + 2 * world.sync_s
    if case.max_staleness == 0:
        return write + case.rounds * learn
    return max(write + learn, write / case.rounds + case.rounds * learn)


def _memory(name: str) -> int:
    """Bytes, from /proc: VmRSS now, VmHWM at most so far."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) << 10


def in_child(case: Case) -> dict[str, Any]:
    """One case in a process of its own, after a small campaign that gets every import and cache out
    of the way."""
    command = [sys.executable, "-m", "tests.bench.scale_sim", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(case: Case) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        play(Case(engines=2, prompts=8, max_staleness=case.max_staleness), Path(scratch) / "first")
        print(json.dumps(play(case, Path(scratch) / "run")))


COLUMNS: Mapping[str, tuple[str, str]] = {
    "CPU us per prompt": ("cpu_us", ".0f"),
    "of it GC": ("gc", ".0%"),
    "MiB before": ("before_mib", ".0f"),
    "MiB at most": ("peak_mib", ".0f"),
    "KiB per prompt": ("kib_per_prompt", ".1f"),
    "s per round": ("round_s", ",.0f"),
    "over the least possible": ("over_ideal", ".2f"),
    "engines busy": ("busy", ".0%"),
    "controller busy": ("load", ".1%"),
    "longest turn s": ("longest_turn_s", ".2f"),
    "staleness seen": ("staleness", ".0f"),
    "engines lost": ("failures", "d"),
}


def table(results: list[tuple[Case, dict[str, Any]]]) -> str:
    heads = ["engines", "prompts a round", "rounds", "", *COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * 3 + "---|" + "--:|" * len(COLUMNS)]
    for case, found in results:
        cells = [f"{case.engines:,}", f"{case.prompts:,}", str(case.rounds), case.kind]
        cells += [format(found[key], form) for key, form in COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(results: list[tuple[Case, dict[str, Any]]]) -> str:
    plain = [(case, found) for case, found in results if not case.kind]
    worst = max(found["cpu_us"] for _, found in plain)
    sizes = {case.prompts for case, _ in plain}
    spreads = []
    for size in sizes:
        same = [found["cpu_us"] for case, found in plain if case.prompts == size]
        spreads.append(max(same) / min(same))
    late = all(found["staleness"] <= case.max_staleness for case, found in results)
    busy = sum(found["busy_at_update"] for _, found in results)
    return "\n".join(
        [
            "| target | measured | wanted | met |",
            "|---|--:|--:|---|",
            f"| CPU per prompt, the worst of the grid | {worst:.0f} us | at most 300 | {_yes(worst <= 300)} |",
            f"| the same over engines, most / least at one number of prompts | {max(spreads):.2f} | flat | |",
            f"| staleness never above what is allowed | {_yes(late)} | yes | {_yes(late)} |",
            f"| weights changed under an engine that was writing | {busy} | 0 | {_yes(busy == 0)} |",
        ]
    )


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(engines=e, prompts=p, rounds=3) for p in (512, 4096) for e in (8, 512)] + [
            Case(engines=64, prompts=2048, rounds=3, max_staleness=0)
        ]
    grid = [
        Case(engines=engines, prompts=prompts, rounds=rounds)
        for prompts, rounds in ((4096, 4), (16_384, 3))
        for engines in (8, 64, 512, 4096)
    ]
    return [
        *grid,
        Case(engines=64, prompts=131_072, rounds=2),
        Case(engines=4096, prompts=131_072, rounds=2),
        Case(engines=4096, prompts=1 << 20, rounds=1),
        Case(engines=64, prompts=16_384, rounds=3, max_staleness=0),
        Case(engines=64, prompts=16_384, rounds=3, max_staleness=2),
        Case(engines=64, prompts=131_072, rounds=1, in_flight=8192),
        Case(engines=64, prompts=4096, rounds=3, samples=8, tokens=512),
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
        runs = [in_child(case) for _ in range(AGAIN if case.prompts <= SMALL else 1)]
        results.append((case, min(runs, key=lambda found: found["cpu_us"])))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    text = f"{_introduction()}\n\n{table(results)}\n\n{verdicts(results)}"
    print(text)
    if options.record:
        put_section("## Scale", text)


def _introduction() -> str:
    world = World(engines=1)
    return (
        f"`python -m tests.bench.scale_sim`, {time.strftime('%Y-%m-%d', time.gmtime())}, {platform.machine()}, Python "
        f"{platform.python_version()}. The real controller over simulated roles in virtual time, on which its own processor time "
        f"passes too. Engines of {world.slots} sequences, {world.sequence_s:g} s a sequence (lognormal, {world.stragglers:.1%} "
        f"take {world.slower:g} times as long), 2 answers of {world.tokens} tokens, each engine lost every "
        f"{world.life_s / 3600:g} h, {world.unreachable:.1%} of the scores asked for twice; staleness 1 unless said otherwise. "
        f"Cases of up to {SMALL:,} prompts were played {AGAIN} times, and the run of least processor time counts: the same work "
        f"takes up to half as long again when the machine's other tenants are busy."
    )


if __name__ == "__main__":
    main()
