"""Size and speed of reports and the dashboard, and its cost beside a campaign.

    python -m tests.bench.view [--samples 1000 100000 1000000] [--record]
    python -m tests.bench.view dashboard-cost [--turns 6] [--iterations 10] [--record]

The first writes runs of that many samples (40 words each, 8 per prompt, with log-probs, references
and advantages per token), measures the report's size and the time to write it, and opens report and
dashboard in Chromium: first paint, and until the page is complete. Then a page stays open for a
minute while lines are appended to the run's metrics, and the CPU time of the server is measured.
About ten minutes on two cores, and 2 GB of disk. The second compares a campaign's pace with and
without an open dashboard (dashboard_cost.py): about ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.run_dir.names import iteration_name
from tests.bench import dashboard_cost
from tests.bench.browser import chromium, dashboard
from tests.bench.results import put_section

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from view_runs import write_run

PROMPTS = 1250
"""Prompts of an iteration of the larger runs; 8 samples each."""
WATCHED_S = 60.0
ITERATION_S = 10.0
"""Seconds between two lines of metrics while the page is open."""
TABLES = ("samples", "examples", "credit", "evaluations")


def make_run(directory: Path, samples: int) -> Path:
    """Write a run of `samples` samples: one iteration, copied under further numbers."""
    prompts = min(PROMPTS, samples // 8)
    run = write_run(directory, iterations=1, prompts=prompts, samples=8, words=40)
    per_iteration = pq.read_metadata(run / "samples/iteration-000001.parquet").num_rows
    iterations = max(1, round(samples / per_iteration))
    for folder in TABLES:
        table = pq.read_table(run / folder / "iteration-000001.parquet")
        for number in range(2, iterations + 1):
            column = pa.array([number] * len(table), pa.int32())
            copied = table.set_column(0, "iteration", column)
            target = run / folder / f"{iteration_name(number)}.parquet"
            pq.write_table(copied, target, compression="zstd", use_dictionary=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    with (run / "metrics.jsonl").open("a") as file:
        for number in range(2, iterations + 1):
            file.write(json.dumps(json.loads(lines[-1]) | {"iteration": number}) + "\n")
    return run


def measure(run: Path, browser: Any) -> dict[str, float]:
    """Return sizes in MB and times in seconds of one run."""
    out = run.parent / "report.html"
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "launch.main", "report", run, "--out", out], check=True)
    seconds = time.monotonic() - started
    files = sum(file.stat().st_size for file in run.rglob("*.parquet"))
    rows = sum(pq.read_metadata(f).num_rows for f in (run / "samples").iterdir())
    measured = {
        "samples": float(rows),
        "run, MB": files / 1e6,
        "report, MB": out.stat().st_size / 1e6,
        "report written, s": seconds,
    }
    measured |= {f"report {k}": v for k, v in _open(browser, out.as_uri()).items()}
    with dashboard(run) as (url, _process):
        measured |= {f"dashboard {k}": v for k, v in _open(browser, url).items()}
        for name, address in (
            ("samples", "samples"),
            ("filter by outcome", "samples?outcome=Failed"),
            ("search of a rare text", "samples?text=nowhere+to+be+found"),
        ):
            measured[f"dashboard {name}"] = _show(browser, url, address)
    return measured


def cost(run: Path, browser: Any) -> float:
    """Return the CPU seconds per second that a server takes while a page is open on a live run."""
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    with dashboard(run) as (url, process):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("body[data-shown]")
        time.sleep(2.0)
        before = sum(process.cpu_times()[:2])
        started = time.monotonic()
        while time.monotonic() - started < WATCHED_S:
            line["iteration"] += 1
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(ITERATION_S)
        used = sum(process.cpu_times()[:2]) - before
        page.close()
        return float(used / (time.monotonic() - started))


def _open(browser: Any, url: str) -> dict[str, float]:
    """Return seconds to the first paint and to the complete page."""
    page = browser.new_page()
    started = time.monotonic()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("body[data-shown]", timeout=120_000)
    complete = time.monotonic() - started
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
    )
    page.close()
    return {"first paint, s": float(paint), "complete, s": complete}


def _show(browser: Any, url: str, address: str) -> float:
    """Return seconds from the request of a page to its first rows."""
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("body[data-shown]")
    before = page.get_attribute("body", "data-shown")
    started = time.monotonic()
    page.evaluate("address => { location.hash = address }", address)
    page.wait_for_function("old => document.body.dataset.shown !== old", arg=before)
    seconds = time.monotonic() - started
    page.close()
    return seconds


def main() -> None:
    """Measure, print a table, and record it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", choices=["pages", "dashboard-cost"], default="pages")
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    if given.case == "pages":
        heading, text = "## Report and dashboard", pages(given.samples)
    else:
        heading = "## Dashboard beside a campaign"
        text = dashboard_cost.measure(given.turns, given.iterations)
    print(text)
    if given.record:
        put_section(heading, text)


def pages(samples: Sequence[int]) -> str:
    """Return the table of sizes and times for runs of so many samples."""
    with tempfile.TemporaryDirectory(prefix="rayhf-view-") as folder:
        runs = [make_run(Path(folder) / str(count), count) for count in samples]
        with chromium() as browser:
            results = [measure(run, browser) for run in runs]
            return _table(results, cost(runs[-1], browser))


def _table(results: list[dict[str, float]], share: float) -> str:
    rows = ["| | " + " | ".join(f"{r['samples']:,.0f} samples" for r in results) + " |"]
    rows.append("|---" + "|---:" * len(results) + "|")
    for name in results[0]:
        if name != "samples":
            label = name if name.endswith(("s", "MB")) and "," in name else f"{name}, s"
            rows.append(f"| {label} | " + " | ".join(f"{r[name]:.2f}" for r in results) + " |")
    notes = (
        "Completions of 40 words (about 250 tokens: the tokenizer has one per byte), with a "
        'log-prob, a reference and an advantage per token; headless Chromium. "complete": all '
        "curves of the overview are drawn. A search reads files for at most 1.5 s, shows what it "
        "found and continues on demand.\n\n"
        f"Beside a campaign: with the overview of the largest run open and a new iteration every "
        f"{ITERATION_S:.0f} s, the server takes {100 * share:.1f} % of one core, at nice 10. "
    )
    return "\n".join(rows) + "\n\n" + notes


if __name__ == "__main__":
    main()
