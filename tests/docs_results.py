"""Measured figures in docs/: tables and curves, taken from tests/bench/RESULTS.md and curves/.

In a page, the rows between `<!-- results: HEADING | CASES -->` and `<!-- end -->` are those of the
first table below HEADING whose first cell is one of CASES (all where it is empty). Between
`<!-- curve: NAME METRIC ... -->` and `<!-- end -->` is the picture of curves/NAME.csv, or the
command that makes it from a run.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path

BENCH = Path(__file__).parent / "bench"
RESULTS = BENCH / "RESULTS.md"
MARK = re.compile(r"(<!-- results: ([^|\n]+?) \|([^\n]*)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
CURVE_MARK = re.compile(r"(<!-- curve: (\w+)([ \w/]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Points = Sequence[tuple[float, float]]

STYLE = """\
  <style>
    .card { fill: #ffffff; stroke: #c9ced6 }
    .grid { stroke: #dfe3e8 }
    text { fill: #24292f; font: 13px sans-serif }
    .line { fill: none; stroke-width: 2.5 }
    .s0 { stroke: #0b62d6 } .s1 { stroke: #c4530a } .s2 { stroke: #1a7f4b }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1c2128; stroke: #444c56 }
      .grid { stroke: #373e47 }
      text { fill: #dfe4ea }
      .s0 { stroke: #6cb0ff } .s1 { stroke: #ffa463 } .s2 { stroke: #62d196 }
    }
  </style>
"""


def table(heading: str) -> list[str]:
    """Return the lines of the first table below a heading that begins with `heading`."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}.*?\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    if found is None:
        raise ValueError(f"tests/bench/RESULTS.md has no heading {heading!r}")
    lines = found[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(line)
    return rows


def cells(row: str) -> list[str]:
    """Return the cells of a table's row."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def with_results(page: str) -> str:
    """Return the page with the current figures between its marks."""

    def rows(match: re.Match[str]) -> str:
        head, heading, cases, _, end = match.groups()
        wanted = [case.strip() for case in cases.split(",") if case.strip()]
        names, rule, *body = table(heading)
        kept = [row for row in body if not wanted or cells(row)[0] in wanted]
        if not kept:
            raise ValueError(f"no row of {heading!r} is one of {wanted}")
        return "\n".join([head, names, rule, *kept, "", end])

    def picture(match: re.Match[str]) -> str:
        head, name, metrics, _, end = match.groups()
        shown = f"![{name}, by iteration](../img/curve_{name}.svg)"
        if not (BENCH / "curves" / f"{name}.csv").exists():
            shown = (
                "No curve yet. After the run, this and `python -m tests.docs` draw it here:\n\n"
                f"```sh\npython -m tests.bench.curve runs/{name}{metrics}\n```"
            )
        return f"{head}\n{shown}\n\n{end}"

    return CURVE_MARK.sub(picture, MARK.sub(rows, page))


def curve(
    title: str, x_label: str, series: Sequence[tuple[str, Points]], *, low: float, high: float
) -> str:
    """Return an SVG picture of curves that share an axis from `low` to `high`."""
    right = max(x for _, points in series for x, _ in points)

    def place(x: float, y: float) -> str:
        return f"{60 + 560 * x / right:.1f},{290 - 230 * (y - low) / (high - low):.1f}"

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 370" role="img">',
        f"  <title>{escape(title)}</title>",
        STYLE.rstrip("\n"),
        '  <rect class="card" x="1" y="1" width="658" height="368" rx="8"/>',
        f'  <text x="60" y="28" font-weight="bold">{escape(title)}</text>',
    ]
    for step in range(6):
        value = low + (high - low) * step / 5
        height = 290 - 46 * step
        lines.append(f'  <line class="grid" x1="60" x2="620" y1="{height}" y2="{height}"/>')
        lines.append(f'  <text x="52" y="{height + 4}" text-anchor="end">{value:.2f}</text>')
    step_x = next(
        n * 10**power for power in range(9) for n in (1, 2, 5) if right / n <= 6 * 10**power
    )
    for x in range(0, int(right) + 1, step_x):
        left = 60 + 560 * x / right
        lines.append(f'  <text x="{left:.0f}" y="310" text-anchor="middle">{x}</text>')
    lines.append(f'  <text x="340" y="328" text-anchor="middle">{escape(x_label)}</text>')
    start = 60
    for number, (name, points) in enumerate(series):
        path = " ".join(place(x, y) for x, y in points)
        lines.append(f'  <polyline class="line s{number}" points="{path}"/>')
        lines.append(
            f'  <line class="line s{number}" x1="{start}" x2="{start + 24}" y1="350" y2="350"/>'
        )
        lines.append(f'  <text x="{start + 30}" y="354">{escape(name)}</text>')
        start += 46 + 7 * len(name)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _kept(file: Path) -> dict[str, Points]:
    """Return the series of a CSV file by the names of its columns."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {
        name: [(float(row["iteration"]), float(row[name])) for row in rows if row[name]]
        for name in rows[0]
        if name != "iteration"
    }


def kept_curve(file: Path) -> str:
    """Return a picture of the curves that tests/bench/curve.py kept of a run."""
    series = _kept(file)
    values = [y for points in series.values() for _, y in points]
    # Steps of the axis have two digits after the point.
    low = math.floor(min(values) * 10) / 10
    high = max(math.ceil(max(values) * 10) / 10, low + 0.1)
    title = f"{file.stem} (2 CPU cores)"
    return curve(title, "iteration", list(series.items()), low=low, high=high)


def _demo() -> str:
    kept = _kept(BENCH / "curves" / "demo.csv")
    series = [
        ("held-out, temperature 1", kept["sampled"]),
        ("held-out, greedy", kept["greedy"]),
        ("training reward", kept["reward"]),
    ]
    title = "make demo: online DPO on arithmetic, accuracy (2 CPU cores)"
    return curve(title, "iteration", series, low=0.2, high=1.0)


def _by_iteration(heading: str, title: str, column: str, low: float, high: float) -> str:
    """Return a curve for every row, over the columns that are called `column` and a number."""
    names, _, *body = table(heading)
    columns = [
        (number, float(name.rpartition(" ")[2]))
        for number, name in enumerate(cells(names))
        if name.startswith(column)
    ]
    series = []
    for row in body:
        values = cells(row)
        points = [(x, float(values[number].split(" ")[0])) for number, x in columns]
        series.append((values[0], points))
    return curve(title, "iteration", series, low=low, high=high)


CURVES: dict[str, Callable[[], str]] = {
    "curve_demo.svg": _demo,
    "curve_spar.svg": lambda: _by_iteration(
        "SPaR: the actor's",
        "SPaR: held-out instructions that the actor satisfies, mean of three seeds",
        "satisfied, iteration",
        0.4,
        0.9,
    ),
    "curve_iterative_dpo.svg": lambda: _by_iteration(
        "iterative DPO:",
        "Iterative DPO on words: true preference, mean of three seeds",
        "true preference, iteration",
        1.8,
        2.4,
    ),
} | {
    f"curve_{file.stem}.svg": partial(kept_curve, file)
    for file in sorted((BENCH / "curves").glob("*.csv"))
    if file.stem != "demo"
}
