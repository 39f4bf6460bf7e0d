"""Keep the curves of a finished run for the documentation.

    python -m tests.bench.curve RUN [METRIC ...] [--name NAME]

Writes the metrics of metrics.jsonl by iteration into curves/NAME.csv, where NAME is that of the
run directory unless it is given. Default: the training reward and the held-out scores. `python -m
tests.docs` draws them into the pages with a mark `<!-- curve: NAME -->`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

CURVES = Path(__file__).with_name("curves")
_HELDOUT = re.compile(r"eval/[^/]+/(sampled|greedy)")


def keep(run: Path, metrics: Sequence[str], file: Path) -> list[str]:
    """Write the metrics of a run into a CSV file; return their names.

    Raises SystemExit for a run without one of them.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    known = dict.fromkeys(name for line in lines for name in line)
    names = list(metrics) or [
        name for name in known if name == "scorer/reward_mean" or _HELDOUT.fullmatch(name)
    ]
    if missing := [name for name in names if name not in known]:
        raise SystemExit(f"{run} has no metric {', '.join(missing)}")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["iteration", *names])
        for line in lines:
            values = [f"{line[name]:.4g}" if name in line else "" for name in names]
            if any(values):
                writer.writerow([f"{line['iteration']:g}", *values])
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("metrics", nargs="*")
    parser.add_argument("--name")
    given = parser.parse_args()
    file = CURVES / f"{given.name or given.run.resolve().name}.csv"
    print(f"{file}: {', '.join(keep(given.run, given.metrics, file))}")


if __name__ == "__main__":
    main()
