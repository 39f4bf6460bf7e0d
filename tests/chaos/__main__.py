"""`make chaos`: many faults against real campaigns.

    python -m tests.chaos [CASE ...] [--seed N] [--record]

commits   200 kill -9 inside commits, 200 flipped bits and truncations over a real checkpoint
engines   kill -9 and SIGSTOP of rollout engines, kill -9 of learners and controllers: online DPO,
          PPO, tree search
nodes     kill -9 of a whole node of a two-node cluster
scorers   a scorer that raises, stalls and returns NaN; one that is down
launches  ten launches of one campaign at the same time
attack    every attack of tests/chaos/attacks: damaged files, hostile rules and completions, floods,
          signals
soak      one campaign, a fault every minute (--minutes)

Every case prints its figures and fails where a guarantee was violated. The same seed injects the
same faults in the same order.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from rayhf.errors import CheckpointError
from rayhf.run_dir.files import verify
from tests.bench.results import put_section
from tests.chaos.attacks import doors, ends, rules, storage
from tests.chaos.cluster import TwoNodes
from tests.chaos.faults import RAYHF, SIGNALS, orphans
from tests.chaos.harness import (
    LOOPS,
    Rows,
    check,
    check_equal_to_undisturbed,
    console,
    make_campaign,
    verify_deep,
)
from tests.chaos.scorer_faults import scorers
from tests.chaos.soak import soak
from tests.e2e.world import make_world, teach_to_end

FAULTS = {"online_dpo": (8, 8, 4, 4), "ppo": (6, 6, 3, 3), "mcts_dpo": (6, 6, 3, 3)}
"""rollout killed, rollout stopped, learner killed, controller killed: 20, 20, 10 and 10 in all."""
WRITER = Path(__file__).parents[1] / "unit" / "commit_writer.py"
# -------------------------------------------------------------------------------------------- cases


def commits(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    done = subprocess.run(
        [sys.executable, WRITER, world / "commits", "200", str(seed)],
        capture_output=True,
        text=True,
    )
    killed = json.loads(done.stdout)
    check(killed["lost"] == killed["corrupt"] == 0, str(killed))
    campaign = make_campaign(world, "flips", "ppo", run={"iterations": 2})
    campaign.start()
    campaign.finish(400)
    folder = campaign.run_dir / "checkpoints/iteration-000002"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    missed = damage_and_verify(folder, files, random.Random(seed))
    check(missed == 0, f"{missed} of 400 damaged files were accepted")
    return [
        (
            "kill -9 while committing",
            f"{killed['kills']}, of which {killed['inside']} inside a commit; "
            f"{killed['commits']} commits",
        ),
        (
            "acknowledged commits lost / corrupt ones accepted",
            f"{killed['lost']} / {killed['corrupt']}",
        ),
        (
            f"flipped bits and truncations over {len(files)} files of a PPO checkpoint, detected",
            "200 of 200, 200 of 200",
        ),
    ]


def damage_and_verify(folder: Path, files: list[Path], rng: random.Random) -> int:
    """Damage and restore a file, 400 times; return how often `verify` accepted the damage."""
    missed = 0
    for turn in range(400):
        file = rng.choice(files)
        whole = file.read_bytes()
        if turn % 2:
            damaged = bytearray(whole)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
        else:
            file.write_bytes(whole[: rng.randrange(len(whole))])
        try:
            verify(folder)
            missed += 1
        except CheckpointError:
            pass
        file.write_bytes(whole)
    verify(folder)
    return missed


def engines(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    rows: Rows = []
    times: dict[str, list[float]] = {}
    for loop in options.loops or LOOPS:
        rows.append((loop, inject_many(world, loop, seed, times)))
        console.print(rows[-1], markup=False)
    for fault, seconds in times.items():
        p95 = sorted(seconds)[min(len(seconds) - 1, round(0.95 * len(seconds)))]
        p50 = statistics.median(seconds)
        figures = f"{p50:.1f} s / {p95:.1f} s ({len(seconds)} times)"
        rows.append((f"{fault}: recovery, p50 / p95", figures))
    return rows


def inject_many(world: Path, loop: str, seed: int, times: dict[str, list[float]]) -> str:
    """Inject all faults of a loop, then compare with an undisturbed run of as many iterations.

    Recovery times are added to `times` by fault.
    """
    kills, stops, learners, controllers = FAULTS[loop]
    plan = [("rollout", "kill")] * kills + [("rollout", "stop")] * stops
    plan += [("learner", "kill")] * learners + [("controller", "kill")] * controllers
    rng = random.Random(seed)
    rng.shuffle(plan)
    if loop == "mcts_dpo":
        teach_to_end(world)  # otherwise no leaf is ever scored, and nothing is learned
    campaign = make_campaign(world, f"faults-{loop}", loop)
    campaign.start()
    campaign.wait_for_iterations(1, 400)
    lost: list[Any] = []
    for turn, (role, fault) in enumerate(plan):
        time.sleep(rng.uniform(0.0, 1.5))  # faults hit every phase of an iteration
        processes = campaign.processes()
        took = campaign.inject_and_recover(role, SIGNALS[fault], timeout_s=300)
        check(
            campaign.alive(),
            f"{loop}, seed {seed}, fault {turn} ({role} {fault}): the campaign ended",
        )
        if role == "controller":
            lost += orphans(processes)
        times.setdefault(f"{role} {fault}", []).append(took)
        console.print(
            f"{loop} {turn + 1}/{len(plan)}: {role} {fault}, {took:.1f} s, "
            f"iteration {campaign.iterations()}",
            markup=False,
        )
    processes = campaign.processes()
    campaign.stop(300)
    lost += orphans(processes)
    iterations = check_equal_to_undisturbed(campaign, loop, lost)
    return (
        f"{len(plan)} faults, {iterations} iterations; equal to the undisturbed campaign in every "
        "bit; verify clean; orphans 0"
    )


def launches(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    config = make_campaign(world, "launches", "online_dpo", run={"iterations": 2}).config
    started = time.monotonic()
    many = [
        subprocess.Popen(
            [RAYHF, "run", config], cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(10)
    ]
    ended: dict[int, float] = {}
    while len(ended) < 9 and time.monotonic() - started < 60:
        for i, process in enumerate(many):
            if i not in ended and process.poll() is not None:
                ended[i] = time.monotonic() - started
        time.sleep(0.02)
    refused = [i for i in ended if many[i].returncode == 4]
    winner = next(process for i, process in enumerate(many) if i not in ended)
    winner.communicate(timeout=400)
    check(
        len(refused) == 9 and winner.returncode == 0,
        f"exit codes {[process.returncode for process in many]}",
    )
    verdict = verify_deep(world / "launches")
    check(verdict == "clean", verdict)
    return [
        (
            "ten launches at once",
            "1 ran, 9 were refused with exit code 4, the last after "
            f"{max(ended.values()):.1f} s; verify clean",
        )
    ]


def nodes(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    """All actors run on a second node, which is killed as a whole; another one joins."""
    took: list[float] = []
    with TwoNodes() as cluster:
        campaign = make_campaign(
            world,
            "nodes",
            "online_dpo",
            cluster={"address": cluster.address},
            run={"start_timeout_s": 120, "timeout_s": 60},
        )
        campaign.start()
        campaign.wait_for_iterations(2, 400)
        for turn in range(5):
            before = campaign.iterations()
            started = time.monotonic()
            cluster.kill_worker()
            cluster.add_worker()
            campaign.wait_for_iterations(before + 2, 400)
            check(campaign.alive(), f"node loss {turn}: the campaign ended")
            took.append(time.monotonic() - started)
            console.print(f"node {turn + 1}/5: {took[-1]:.1f} s, iteration {campaign.iterations()}")
        campaign.stop(300)
    iterations = check_equal_to_undisturbed(campaign, "online_dpo", [])
    return [
        (
            "5 nodes lost",
            f"{iterations} iterations, equal in every bit; recovery p50 "
            f"{statistics.median(took):.0f} s, worst {max(took):.0f} s",
        )
    ]


def attack(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    """Play every attack; one that does not hold is a row, and fails at the end."""
    rows: Rows = []
    failed: list[str] = []
    for number, one in enumerate(a for part in (storage, doors, rules, ends) for a in part.ATTACKS):
        folder = world / f"attack-{number}"
        folder.mkdir()
        try:
            tried, held, figures = one.play(folder, seed)
        except SystemExit as violated:
            tried, held, figures = 1, 0, str(violated)
        if held < tried:
            failed.append(one.name)
        rows.append((one.name, f"{held} of {tried} held; {figures} (before: {one.before})"))
        console.print(rows[-1], markup=False)
    check(not failed, f"attacks that did not hold: {', '.join(failed)}")
    return rows


CASES: dict[str, Callable[[Path, int, argparse.Namespace], Rows]] = {
    "commits": commits,
    "launches": launches,
    "attack": attack,
    "scorers": scorers,
    "engines": engines,
    "nodes": nodes,
    "soak": soak,
}


def record(case: str, rows: Rows, seed: int, seconds: float) -> None:
    """Write the case's table into RESULTS.md."""
    command = f"`python -m tests.chaos {case} --seed {seed}`"
    head = f"{command}, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes."
    table = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    put_section(f"### Chaos: {case}", "\n".join([head, "", *table]), under="## Chaos")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all but soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loops", nargs="*", choices=list(LOOPS))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    for case in options.cases or [name for name in CASES if name != "soak"]:
        world = make_world(Path(tempfile.mkdtemp(prefix=f"chaos-{case}-")))
        console.print(f"chaos {case}, seed {options.seed}, in {world}", markup=False)
        started = time.monotonic()
        rows = CASES[case](world, options.seed, options)
        table = Table(title=f"chaos {case}, seed {options.seed}", show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if options.record:
            record(case, rows, options.seed, time.monotonic() - started)
        shutil.rmtree(world, ignore_errors=True)


if __name__ == "__main__":
    main()
