"""What the tiny presets learn.

    python -m tests.bench.learning [PRESET ...] [--seeds 0,1,2]

Each run is a process of its own, as a user starts it. Prints a table, which RESULTS.md keeps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
PRESETS = [
    f"{algorithm}_{task}"
    for task in ("arithmetic", "words")
    for algorithm in ("online_dpo", "ppo", "grpo")
]


def measure(preset: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """Run one campaign; return its figures before and after."""
    run = ROOT / "runs" / "learning" / f"{preset}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    rayhf = str(Path(sys.executable).with_name("rayhf"))
    config = f"configs/tiny/{preset}.yaml"
    command = [rayhf, "run", config, f"seed={seed}", f"run.dir={run}", *overrides]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{preset} seed {seed}: exit {done.returncode}: {done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    task = preset.rsplit("_", 1)[1]
    first = lines[0]
    last = lines[-1]
    figures = {"seconds": seconds, "iterations": last["iteration"]}
    for name in ("sampled", "greedy", "reward", "reference_kl", "length"):
        key = f"eval/{task}/{name}"
        if key in last:
            figures |= {f"{name} before": first.get(key, 0.0), f"{name} after": last[key]}
    return figures


def table(rows: list[tuple[str, int, dict[str, float]]]) -> str:
    """Return the table in Markdown."""
    heads = ["preset", "seed", "iterations", "seconds", "sampled", "greedy", "reward model"]
    heads += ["KL, nats", "length"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for preset, seed, figures in rows:
        cells = [preset, str(seed), f"{figures['iterations']:.0f}", f"{figures['seconds']:.0f}"]
        for name in ("sampled", "greedy", "reward"):
            before = figures.get(f"{name} before")
            after = figures.get(f"{name} after")
            cells.append("" if before is None else f"{before:.3f} -> {after:.3f}")
        kl = figures.get("reference_kl after")
        cells += ["" if kl is None else f"{kl:.2f}", f"{figures['length after']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every run")
    arguments = parser.parse_args()
    rows: list[tuple[str, int, dict[str, float]]] = []
    console = Console()
    for preset in arguments.presets:
        for seed in map(int, arguments.seeds.split(",")):
            rows.append((preset, seed, measure(preset, seed, arguments.set)))
            console.print(table(rows[-1:]).splitlines()[-1], markup=False, soft_wrap=True)
    console.print(table(rows), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
