"""`make claims`: each paper's claim in miniature, with the real engines.

    python -m tests.bench.claims [CLAIM ...] [--seeds 11 12 13] [--record] [--runs DIR]

Every run is `rayhf run` on a tiny preset with overrides, as a user would type it; the figures are
read from its metrics.jsonl. `--record` writes the tables into RESULTS.md. Runs that are finished in
the runs directory are read, not repeated. Presets were tuned on seeds 0, 1, 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.results import put_section

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (11, 12, 13)
LIMIT_S = 900
"""Limit for one run; 600 s are expected of an idle machine."""
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""

Lines = list[dict[str, Any]]
Figure = Callable[[Lines], float]


def last(name: str) -> Figure:
    """Return a metric's last value."""
    return lambda lines: float(next(line[name] for line in reversed(lines) if name in line))


def first(name: str) -> Figure:
    return lambda lines: float(next(line[name] for line in lines if name in line))


def change(name: str) -> Figure:
    return lambda lines: last(name)(lines) - first(name)(lines)


def at(name: str, nth: int) -> Figure:
    """Return the nth value of a metric that is not in every line."""
    return lambda lines: float([line[name] for line in lines if name in line][nth])


def total(name: str) -> Figure:
    return lambda lines: sum(line.get(name, 0.0) for line in lines)


def rate(*amounts: str, seconds: str) -> Figure:
    """Return a total per second, over the iterations after the first, which warms up."""
    return lambda lines: (
        float(sum(line[amount] for line in lines[2:] for amount in amounts))
        / float(sum(line[seconds] for line in lines[2:]))
    )


def at_equal(quality: str, cost: str, level: float) -> Figure:
    """Return `cost` at the point where `quality` first reached `level`; NaN where it never did.

    Values are interpolated between evaluations.
    """

    def figure(lines: Lines) -> float:
        points = [(line[quality], line[cost]) for line in lines if quality in line]
        for (low, before), (high, after) in itertools.pairwise([(-math.inf, 0.0), *points]):
            if high >= level:
                share = 0.0 if low == -math.inf else (level - low) / (high - low)
                return float(before + share * (after - before))
        return math.nan

    return figure


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a claim's table: a preset, overrides, and the figures read from its runs."""

    label: str
    preset: str
    overrides: tuple[str, ...] = ()
    figures: dict[str, Figure]
    twice: bool = False
    """Run it twice and read the figures from a comparison of the two."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    title: str
    bar: str
    cases: tuple[Case, ...]
    fits: tuple[str, ...] = ()
    """Scorers to fit once per seed; the word SCORERS in an override stands for their directory."""


GAME = {
    "exploitability at start": first("game/exploitability"),
    "of the average": last("game/exploitability_average"),
    "of the last": last("game/exploitability"),
    "probability on moves": last("game/mass"),
}
ARITHMETIC = {
    "sampled before": first("eval/arithmetic/sampled"),
    "sampled after": last("eval/arithmetic/sampled"),
    "greedy before": first("eval/arithmetic/greedy"),
    "greedy after": last("eval/arithmetic/greedy"),
    "tokens generated": total("rollout/tokens"),
}
WORDS = {f"true preference, iteration {i}": at("eval/words/sampled", i) for i in range(4)} | {
    "greedy before": first("eval/words/greedy"),
    "greedy after": last("eval/words/greedy"),
}
HYBRID = {
    "true preference before": first("eval/words/sampled"),
    "after": last("eval/words/sampled"),
    "reverse KL after, nats per completion": last("eval/words/reference_kl"),
    "reverse KL at true preference 2.05": at_equal(
        "eval/words/sampled", "eval/words/reference_kl", 2.05
    ),
}
SHORT = ("run.iterations=4", "run.eval_every=0", "run.eval_prompts=8")
PLAIN_INSTRUCTIONS = (
    "algorithm={type: online_dpo, samples: 8}",
    "evaluations={}",
)
INSTRUCTIONS = {
    f"satisfied, iteration {i}": at("eval/instructions/sampled", i) for i in range(4)
} | {
    "judging before": first("eval/judging/sampled"),
    "judging after": last("eval/judging/sampled"),
}

ENGINE = {
    "tokens generated per iteration": lambda lines: statistics.mean(
        line["rollout/tokens"] for line in lines[2:]
    ),
    "generated per second of exploration": rate("rollout/tokens", seconds="time/explore_s"),
    "context read and generated per second": rate(
        "rollout/tokens", "rollout/context_tokens", seconds="time/explore_s"
    ),
}
SAME = {"figures compared": last("compared"), "different": last("different")}
SCORER = {
    "held-out accuracy": last("accuracy"),
    "calibration error": last("calibration_error"),
}
CLAIMS = {
    "sppo": Claim(
        title=(
            "SPPO finds the equilibrium of the cyclic game on average; a Bradley-Terry reward "
            "cannot"
        ),
        fits=("bradley_terry_game",),
        bar=(
            "exploitability of the average from >= 0.2 to <= 0.05 in 100 iterations; "
            "online DPO with Bradley-Terry stays above 0.15"
        ),
        cases=(
            Case(label="SPPO", preset="sppo_game", figures=GAME),
            Case(label="INPO", preset="inpo_game", figures=GAME),
            Case(
                label="online DPO, fitted Bradley-Terry",
                preset="sppo_game",
                overrides=(
                    # The fitted model has only seen moves: a rule must say that anything else
                    # loses, as SPPO's rule does.
                    "scorer.train=[{type: reward_model, model: SCORERS/bradley_terry_game}, "
                    "{type: rule, function: 'rayhf.tiny.game:legal', weight: 10.0}]",
                    "algorithm={type: online_dpo, samples: 8}",
                    # With SPPO's learning rate DPO stops playing moves within two iterations.
                    "learner.lr=3e-4",
                    "learner.epochs=2",
                    "guards.no_signal.pause=null",  # it converges to a single move
                ),
                figures=GAME,
            ),
        ),
    ),
    "same": Claim(
        title="Two runs with the same seed agree in every bit (float32, staleness 0)",
        bar="no figure differs, for every loop",
        cases=tuple(
            Case(
                label=name,
                preset=name,
                overrides=("run.iterations=2", "run.eval_prompts=64"),
                figures=SAME,
                twice=True,
            )
            for name in (
                "online_dpo_arithmetic",
                "ppo_arithmetic",
                "grpo_arithmetic",
                "iterative_dpo_words",
                "sppo_game",
                "inpo_game",
                "spar_instructions",
                "mcts_dpo_arithmetic",
                "hypo_words",
            )
        ),
    ),
    "scorers": Claim(
        title="Pairwise and general preference models hold the game's cycle; Bradley-Terry cannot",
        bar="pairwise and general preference >= 90 % on held-out pairs, Bradley-Terry <= 65 %",
        cases=tuple(
            Case(label=name.replace("_", " "), preset=f"fit_{name}_game", figures=SCORER)
            for name in ("bradley_terry", "pairwise", "general_preference")
        ),
    ),
    "mcts": Claim(
        title="MCTS-DPO improves arithmetic; against online DPO at equal generated tokens",
        bar="at least +15 points",
        cases=(
            Case(label="MCTS-DPO", preset="mcts_dpo_arithmetic", figures=ARITHMETIC),
            Case(label="online DPO", preset="online_dpo_arithmetic", figures=ARITHMETIC),
        ),
    ),
    "spar": Claim(
        title=(
            "SPaR: the actor's held-out constraint satisfaction rises each iteration, and so does "
            "the refiner's judging"
        ),
        bar=(
            "at least +15 points in 3 iterations, rising each; judging accuracy up; ablation "
            "without tree search reported"
        ),
        cases=(
            Case(label="SPaR", preset="spar_instructions", figures=INSTRUCTIONS),
            Case(
                label="without tree search",
                preset="spar_instructions",
                overrides=("algorithm.search=none",),
                figures=INSTRUCTIONS,
            ),
        ),
    ),
    "hypo": Claim(
        title="HyPO keeps closer to the reference than offline DPO at the same quality",
        bar="at equal true preference at least 20 % lower reverse KL",
        cases=(
            Case(
                label="HyPO", preset="hypo_words", overrides=("run.eval_every=10",), figures=HYBRID
            ),
            Case(
                label="offline DPO",
                preset="hypo_words",
                overrides=("algorithm.kl_coef=0", "run.eval_every=10"),
                figures=HYBRID,
            ),
        ),
    ),
    "utilization": Claim(
        title="Search keeps the engine busy: tokens per second against plain sampling",
        bar="at least 60 % of plain sampling of as many tokens",
        cases=(
            Case(
                label="plain sampling, 64 prompts",
                preset="online_dpo_arithmetic",
                overrides=("algorithm.samples=8", *SHORT),
                figures=ENGINE,
            ),
            Case(
                label="MCTS, 64 trees",
                preset="mcts_dpo_arithmetic",
                overrides=SHORT,
                figures=ENGINE,
            ),
            Case(
                label="plain sampling, 256 prompts",
                preset="online_dpo_arithmetic",
                overrides=("algorithm.samples=8", "prompts.batch=256", *SHORT),
                figures=ENGINE,
            ),
            Case(
                label="MCTS, 256 trees",
                preset="mcts_dpo_arithmetic",
                overrides=("prompts.batch=256", *SHORT),
                figures=ENGINE,
            ),
            Case(
                label="plain sampling, instructions",
                preset="spar_instructions",
                overrides=(*PLAIN_INSTRUCTIONS, *SHORT),
                figures=ENGINE,
            ),
            Case(
                label="SPaR, instructions",
                preset="spar_instructions",
                overrides=SHORT,
                figures=ENGINE,
            ),
        ),
    ),
    "iterative": Claim(
        title="iterative DPO: the true preference rises in each of three iterations",
        bar="rises in each iteration with at least one reference choice",
        cases=tuple(
            Case(
                label=f"reference {name}",
                preset="iterative_dpo_words",
                overrides=(f"algorithm.reference={{type: {name}{extra}}}",),
                figures=WORDS,
            )
            for name, extra in (
                ("initial", ""),
                ("previous", ""),
                ("ema", ", alpha: 0.5, every: 1"),
            )
        ),
    ),
}


def run(claim: Claim, case: Case, seed: int, runs: Path) -> tuple[Lines, float]:
    """Run one case, unless it is finished; return its metrics and its seconds."""
    fitted = runs / f"scorers-seed{seed}"
    for name in claim.fits:
        fit(name, seed, fitted)
    if case.preset.startswith("fit_"):
        return fit(case.preset.removeprefix("fit_"), seed, fitted)
    name = re.sub(r"[^a-z0-9]+", "-", f"{case.preset} {case.label}".lower()).strip("-")
    directory = runs / f"{name}-seed{seed}"
    overrides = [override.replace("SCORERS", str(fitted)) for override in case.overrides]
    command = ["run", f"configs/tiny/{case.preset}.yaml", f"seed={seed}", *overrides]
    seconds = timed([*command, f"run.dir={directory}"], directory)
    if not case.twice:
        return read(directory), seconds
    again = directory.with_name(f"{directory.name}-again")
    seconds += timed([*command, f"run.dir={again}"], again)
    return [compare(read(directory), read(again))], seconds


def read(directory: Path) -> Lines:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def compare(one: Lines, other: Lines) -> dict[str, float]:
    """Count the figures of two runs, seconds aside, and those that differ in any bit."""
    pairs = [
        (a.get(name), b.get(name))
        for a, b in zip(one, other, strict=True)
        for name in a.keys() | b.keys()
        if "time/" not in name
    ]
    return {"compared": float(len(pairs)), "different": float(sum(a != b for a, b in pairs))}


def fit(name: str, seed: int, fitted: Path) -> tuple[Lines, float]:
    """Fit a scorer, unless it is finished; return its metrics and its seconds."""
    directory = fitted / name
    seconds = timed(
        ["fit-scorer", f"configs/tiny/fit_{name}.yaml", f"output={directory}", f"seed={seed}"],
        directory,
    )
    return [json.loads((directory / "metrics.json").read_text())], seconds


def timed(arguments: Sequence[str], directory: Path) -> float:
    """Run the command that fills `directory`, unless it was timed before; return its seconds."""
    clock = directory.with_suffix(".seconds")
    if not clock.exists():
        started = time.monotonic()
        rayhf(arguments, log=directory.with_suffix(".log"))
        clock.write_text(f"{time.monotonic() - started:.1f}")
    return float(clock.read_text())


def rayhf(arguments: Sequence[str], *, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("rayhf")), *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}; see {log}")


def table_of(claim: Claim, seeds: Sequence[int], runs: Path, console: Console) -> list[list[str]]:
    """Return header and rows: means with their intervals over the seeds."""
    names = list(dict.fromkeys(name for case in claim.cases for name in case.figures))
    rows = [["", *names, "s"]]
    for case in claim.cases:
        results = []
        for seed in seeds:
            console.print(f"{case.label}, seed {seed}", markup=False)
            results.append(run(claim, case, seed, runs))
        cells = []
        for name in names:
            values = [float(case.figures[name](lines)) for lines, _ in results]
            mean = statistics.mean(values)
            whole = abs(mean) > 1000 or all(value.is_integer() for value in values)
            cells.append(f"{mean:,.0f}" if whole else f"{mean:.3f}{interval(values)}")
        rows.append([case.label, *cells, f"{statistics.mean(s for _, s in results):.0f}"])
    return rows


def interval(values: Sequence[float]) -> str:
    """Return the 95 % interval of the mean of a figure over seeds; "" for one seed."""
    if len(values) == 1:
        return ""
    quantile = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f" ({mean - half:.3f} to {mean + half:.3f})"


def show(claim: Claim, rows: list[list[str]], console: Console) -> None:
    table = Table(*rows[0], title=claim.title, caption=f"bar: {claim.bar}")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def record(key: str, claim: Claim, rows: list[list[str]], seeds: Sequence[int]) -> None:
    """Write the claim's section into RESULTS.md."""
    meaning = "; mean (95 % interval over seeds, Student's t)" if len(seeds) > 1 else ""
    numbers = " ".join(map(str, seeds))
    command = f"`python -m tests.bench.claims {key} --seeds {numbers}`"
    body = [f"Bar: {claim.bar}. {command}{meaning}.\n"]
    body += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    body += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    put_section(f"### {claim.title}", "\n".join(body), under="## Claims")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims")
    options = parser.parse_args()
    console = Console()
    for key in options.claims or CLAIMS:
        claim = CLAIMS[key]
        rows = table_of(claim, options.seeds, options.runs, console)
        show(claim, rows, console)
        if options.record:
            record(key, claim, rows, options.seeds)


if __name__ == "__main__":
    main()
