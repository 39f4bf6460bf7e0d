"""Does each tiny preset learn? `python -m tests.bench.learning [PRESET ...] [--seeds 0,1,2]` runs
them and prints a table.

Each run is a process of its own, as a user starts it. The figures kept in RESULTS.md come from
here.
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
    """One campaign from its start to its end."""
    run = ROOT / "runs" / "learning" / f"{preset}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    rayhf = Path(sys.executable).with_name("rayhf")
    command = [
        rayhf,
        "run",
        f"configs/tiny/{preset}.yaml",
        f"seed={seed}",
        f"run.dir={run}",
        *overrides,
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{preset} seed {seed}: exit {done.returncode}: {done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    task = preset.rsplit("_", 1)[1]
    first, last = lines[0], lines[-1]
    found = {"seconds": seconds, "rounds": last["iteration"]}
    for name in ("sampled", "greedy", "reward", "reference_kl", "length"):
        key = f"eval/{task}/{name}"
        if key in last:
            found |= {f"{name} before": first.get(key, 0.0), f"{name} after": last[key]}
    return found


def table(rows: list[tuple[str, int, dict[str, float]]]) -> str:
    """Markdown."""
    out = [
        "| preset | seed | rounds | seconds | sampled | greedy | reward model | KL, nats | length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset, seed, found in rows:
        cells = [preset, str(seed), f"{found['rounds']:.0f}", f"{found['seconds']:.0f}"]
        for name in ("sampled", "greedy", "reward"):
            known = f"{name} after" in found
            cells.append(
                f"{found[f'{name} before']:.3f} -> {found[f'{name} after']:.3f}" if known else ""
            )
        cells += [
            f"{found['reference_kl after']:.2f}" if "reference_kl after" in found else "",
            f"{found['length after']:.1f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


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
