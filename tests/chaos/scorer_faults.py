"""Chaos cases of the scorer: one that raises, stalls and returns NaN, and one that is down."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pyarrow.parquet as pq

from tests.chaos.faults import SIGNALS, orphans
from tests.chaos.harness import Rows, check, make_campaign, verify_deep

FLAKY = """
import hashlib, math, os, time
from pathlib import Path
HERE = Path(__file__).parent
CALLS = 0

def _even(completion):
    return sum(ord(c) % 2 == 0 for c in completion) / max(len(completion), 1)

def flaky(completion, *, prompt, reference_answer, finish_reason):
    global CALLS
    CALLS += 1
    digest = hashlib.sha256(f"{completion}{CALLS}{os.getpid()}".encode()).hexdigest()
    luck = int(digest[:8], 16) / 2**32
    if luck < 0.30:
        raise ConnectionError("refused")
    if luck < 0.40:
        time.sleep(0.2)
        raise TimeoutError("stalled")
    if luck < 0.42:
        return math.nan
    return _even(completion)

def down(completion, *, prompt, reference_answer, finish_reason):
    if (HERE / "scorer-is-down").exists():
        raise ConnectionError("refused")
    return _even(completion)
"""


def even(text: str) -> float:
    return sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1)


def scorers(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    (world / "flaky_rules.py").write_text(FLAKY)
    return [flaky_scorer(world), unreachable_scorer(world)]


def flaky_scorer(world: Path) -> tuple[str, str]:
    scorer = {"train": [{"type": "rule", "function": "flaky_rules:flaky"}], "max_failed": 0.5}
    campaign = make_campaign(world, "flaky", "online_dpo", scorer=scorer, run={"iterations": 20})
    campaign.start()
    campaign.finish(600)
    samples = [
        row
        for file in sorted(campaign.run_dir.glob("samples/*"))
        for row in pq.read_table(file).to_pylist()
    ]
    scored = [row for row in samples if row["score"] is not None]
    invented = [row for row in scored if abs(row["score"] - even(row["text"])) > 1e-9]
    outcomes = {
        outcome: sum(row["outcome"] == outcome for row in samples)
        for outcome in ("Scored", "Invalid", "Failed")
    }
    verdict = verify_deep(campaign.run_dir)
    check(not invented and verdict == "clean", f"{len(invented)} invented scores, {verdict}")
    return (
        "scorer with 30 % refused, 10 % stalled, 2 % NaN",
        f"20 iterations, {outcomes}, scores invented: {len(invented)}",
    )


def unreachable_scorer(world: Path) -> tuple[str, str]:
    flag = world / "scorer-is-down"
    scorer = {"train": [{"type": "rule", "function": "flaky_rules:down"}]}
    campaign = make_campaign(world, "down", "online_dpo", scorer=scorer, run={"iterations": 400})
    campaign.start()
    campaign.wait_for_iterations(2, 400)
    flag.touch()
    started = time.monotonic()
    while not any(event["kind"] == "pause" for event in campaign.events()):
        check(
            time.monotonic() - started < 120,
            "a scorer that is down did not pause the campaign within two minutes",
        )
        time.sleep(0.1)
    paused_s = time.monotonic() - started
    before = campaign.iterations()
    time.sleep(5.0)  # long enough for several iterations
    check(
        campaign.iterations() == before and campaign.alive(),
        "the campaign continued without its scorer",
    )
    flag.unlink()
    back_s = campaign.wait_for_iterations(before + 1, 120)
    processes = campaign.processes()
    campaign.inject("controller", SIGNALS["kill"])
    check(orphans(processes) == [], "orphans")
    return (
        "scorer down",
        f"paused after {paused_s:.1f} s, resumed by itself {back_s:.1f} s after it was back",
    )
