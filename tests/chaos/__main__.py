"""`make chaos`: faults by the dozen against real campaigns. python -m tests.chaos [CASE ...]
[--seed N] [--record]

commits   200 kill -9 inside commits, 200 flipped bits and truncations over a real checkpoint
engines   kill -9 and SIGSTOP of rollout engines, kill -9 of learners and controllers: online DPO,
          PPO, tree search
nodes     kill -9 of a whole node of a two-node cluster
scorers   a scorer that errs, stalls and talks nonsense; one that is down
launches  ten launches of one campaign at the same time
soak      one campaign, a fault every minute (--minutes)

Every case prints what it found, and fails where a promise was broken. The same seed strikes the
same actors in the same order.
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

from rich.console import Console
from rich.table import Table

from tests.bench.results import put_section
from tests.chaos.nemesis import RAYHF, SIGNALS, Campaign, committed, fingerprint, orphans
from tests.e2e.world import make_world, teach_to_end, write_config

WRITER = Path(__file__).parents[1] / "unit" / "commit_writer.py"
Rows = list[tuple[str, str]]
console = Console(width=160)

LOOPS: dict[str, dict[str, Any]] = {
    "online_dpo": {"type": "online_dpo", "samples": 4},
    "ppo": {"type": "ppo", "samples": 2},
    "mcts_dpo": {"type": "mcts_dpo", "iterations": 4, "parallel": 2, "width": [3, 2]},
}
STRIKES = {"online_dpo": (8, 8, 4, 4), "ppo": (6, 6, 3, 3), "mcts_dpo": (6, 6, 3, 3)}
"""rollout killed, rollout stopped, learner killed, controller killed: 20, 20, 10 and 10 in all."""
ROUNDS = 4000
"""More than a storm lasts; the campaign is told to stop after it."""


def config_of(world: Path, name: str, algorithm: dict[str, Any], **more: Any) -> Path:
    scorer = {
        "train": [
            {"type": "rule", "function": "my_rules:slow"},
            {"type": "rule", "function": "my_rules:even", "name": "even"},
        ]
    }
    run = {
        "iterations": ROUNDS,
        "eval_every": 0,
        "checkpoint_every": 2,
        "stall_s": 8,
        "restarts": 1000,
    } | more.pop("run", {})
    # A toy that ran for long finds that all its answers score alike: here that is no reason to
    # stop.
    guards = {"no_signal": {"pause": None}}
    sections = {
        "algorithm": algorithm,
        "scorer": scorer,
        "run": run,
        "prompts": {"heldout": None},
        "guards": guards,
    } | more
    return write_config(world, name, **sections)


def verified(run: Path) -> str:
    done = subprocess.run(
        [RAYHF, "verify", "--deep", run], capture_output=True, text=True, timeout=300
    )
    return "clean" if done.returncode == 0 else done.stderr.strip()


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"chaos: BROKEN PROMISE: {what}")


# -------------------------------------------------------------------------------------------------------------- cases


def commits(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    from rayhf.errors import CheckpointError
    from rayhf.run_dir.files import verify

    done = subprocess.run(
        [sys.executable, WRITER, world / "commits", "200", str(seed)],
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    check(found["lost"] == found["corrupt"] == 0, str(found))
    campaign = Campaign(world, config_of(world, "flips", LOOPS["ppo"], run={"iterations": 2}))
    campaign.start()
    campaign.finish(400)
    folder = campaign.run_dir / "checkpoints/iteration-000002"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    rng, missed = random.Random(seed), 0
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
    check(missed == 0, f"{missed} of 400 damaged files were taken for sound")
    return [
        (
            "kill -9 while committing",
            f"{found['kills']}, of which {found['inside']} inside a commit; {found['commits']} commits",
        ),
        (
            "acknowledged commits lost / corrupt ones accepted",
            f"{found['lost']} / {found['corrupt']}",
        ),
        (
            f"flipped bits and truncations over {len(files)} files of a PPO checkpoint, found",
            "200 of 200, 200 of 200",
        ),
    ]


def engines(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    rows: Rows = []
    times: dict[str, list[float]] = {}
    for loop in options.loops or LOOPS:
        rows.append((loop, storm(world, loop, seed, times)))
        console.print(rows[-1], markup=False)
    for kind, seconds in times.items():
        p95 = sorted(seconds)[min(len(seconds) - 1, round(0.95 * len(seconds)))]
        rows.append(
            (
                f"{kind}: recovery, p50 / p95",
                f"{statistics.median(seconds):.1f} s / {p95:.1f} s ({len(seconds)} times)",
            )
        )
    return rows


def storm(world: Path, loop: str, seed: int, times: dict[str, list[float]]) -> str:
    """Strike one campaign again and again, then compare it with one that was left alone for as many
    rounds."""
    kills, stops, learners, controllers = STRIKES[loop]
    plan = [("rollout", "kill")] * kills + [("rollout", "stop")] * stops
    plan += [("learner", "kill")] * learners + [("controller", "kill")] * controllers
    rng = random.Random(seed)
    rng.shuffle(plan)
    if loop == "mcts_dpo":
        teach_to_end(world)  # or no leaf is ever scored, and nothing is learned
    campaign = Campaign(world, config_of(world, f"storm-{loop}", LOOPS[loop]))
    campaign.start()
    campaign.wait_for_rounds(1, 400)
    lost: list[Any] = []
    for turn, (role, blow) in enumerate(plan):
        time.sleep(rng.uniform(0.0, 1.5))
        family = campaign.family()
        took = campaign.strike_and_recover(role, SIGNALS[blow], timeout_s=300)
        check(
            campaign.alive(),
            f"{loop}, seed {seed}, strike {turn} ({role} {blow}): the campaign ended",
        )
        if role == "controller":
            lost += orphans(family)
        times.setdefault(f"{role} {blow}", []).append(took)
        console.print(
            f"{loop} {turn + 1}/{len(plan)}: {role} {blow}, {took:.1f} s, round {campaign.rounds()}",
            markup=False,
        )
    family = campaign.family()
    subprocess.run([RAYHF, "stop", campaign.run_dir], check=True, capture_output=True, timeout=60)
    assert campaign.process is not None
    campaign.process.communicate(timeout=300)
    check(
        campaign.process.returncode == 75,
        f"{loop}: rayhf stop ended with {campaign.process.returncode}",
    )
    lost += orphans(family)
    rounds = committed(campaign.run_dir)
    calm = Campaign(
        world, config_of(world, f"calm-{loop}", LOOPS[loop], run={"iterations": rounds})
    )
    calm.start()
    calm.finish(900)
    shutil.copytree(campaign.run_dir, world / f"copy-{loop}")
    same = fingerprint(campaign.run_dir) == fingerprint(calm.run_dir)
    found = verified(campaign.run_dir)
    check(
        same and found == "clean" and not lost,
        f"{loop}, seed {seed}: equal bits {same}, verify {found}, orphans {lost}",
    )
    return f"{len(plan)} strikes, {rounds} rounds; equal to the calm campaign in every bit; verify clean; orphans 0"


def launches(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    config = config_of(world, "launches", LOOPS["online_dpo"], run={"iterations": 2})
    started = time.monotonic()
    many = [
        subprocess.Popen(
            [RAYHF, "run", config], cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(10)
    ]
    ended: dict[int, float] = {}
    while len(ended) < 9 and time.monotonic() - started < 60:
        ended |= {
            i: time.monotonic() - started
            for i, one in enumerate(many)
            if i not in ended and one.poll() is not None
        }
        time.sleep(0.02)
    refused = [i for i in ended if many[i].returncode == 4]
    winner = next(one for i, one in enumerate(many) if i not in ended)
    winner.communicate(timeout=400)
    check(
        len(refused) == 9 and winner.returncode == 0,
        f"exit codes {[one.returncode for one in many]}",
    )
    found = verified(world / "launches")
    check(found == "clean", found)
    return [
        (
            "ten launches at once",
            f"1 ran, 9 were refused with exit code 4, the last after {max(ended.values()):.1f} s; verify clean",
        )
    ]


FLAKY = """
import hashlib, math, os, time
from pathlib import Path
HERE = Path(__file__).parent
CALLS = 0

def _even(completion):
    return sum(ord(c) % 2 == 0 for c in completion) / max(len(completion), 1)

def flaky(completion, *, prompt, answer, finish_reason):
    global CALLS
    CALLS += 1
    luck = int(hashlib.sha256(f"{completion}{CALLS}{os.getpid()}".encode()).hexdigest()[:8], 16) / 2**32
    if luck < 0.30:
        raise ConnectionError("refused")
    if luck < 0.40:
        time.sleep(0.2)
        raise TimeoutError("stalled")
    if luck < 0.42:
        return math.nan
    return _even(completion)

def down(completion, *, prompt, answer, finish_reason):
    if (HERE / "scorer-is-down").exists():
        raise ConnectionError("refused")
    return _even(completion)
"""


def scorers(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    import pyarrow.parquet as pq

    (world / "flaky_rules.py").write_text(FLAKY)
    scorer = {"train": [{"type": "rule", "function": "flaky_rules:flaky"}], "max_failed": 0.5}
    flaky = Campaign(
        world, config_of(world, "flaky", LOOPS["online_dpo"], scorer=scorer, run={"iterations": 20})
    )
    flaky.start()
    flaky.finish(600)
    samples = [
        row
        for file in sorted(flaky.run_dir.glob("samples/*"))
        for row in pq.read_table(file).to_pylist()
    ]
    invented = [
        row
        for row in samples
        if row["score"] is not None and abs(row["score"] - even(row["text"])) > 1e-9
    ]
    outcomes = {
        kind: sum(row["outcome"] == kind for row in samples)
        for kind in ("Scored", "Invalid", "Failed")
    }
    check(not invented and verified(flaky.run_dir) == "clean", f"{len(invented)} invented scores")

    flag = world / "scorer-is-down"
    scorer = {"train": [{"type": "rule", "function": "flaky_rules:down"}]}
    away = Campaign(
        world, config_of(world, "away", LOOPS["online_dpo"], scorer=scorer, run={"iterations": 400})
    )
    away.start()
    away.wait_for_rounds(2, 400)
    flag.touch()
    started = time.monotonic()
    while not any(event["kind"] == "pause" for event in away.events()):
        check(
            time.monotonic() - started < 120,
            "a scorer that is down did not pause the campaign within two minutes",
        )
        time.sleep(0.1)
    paused_s, before = time.monotonic() - started, away.rounds()
    time.sleep(5.0)
    check(away.rounds() == before and away.alive(), "the campaign went on without its scorer")
    flag.unlink()
    back_s = away.wait_for_rounds(before + 1, 120)
    family = away.family()
    away.strike("controller", SIGNALS["kill"])
    check(orphans(family) == [], "orphans")
    return [
        (
            "scorer with 30 % refused, 10 % stalled, 2 % NaN",
            f"20 rounds, {outcomes}, scores invented: {len(invented)}",
        ),
        (
            "scorer down",
            f"paused after {paused_s:.1f} s, went on by itself {back_s:.1f} s after it was back",
        ),
    ]


def even(text: str) -> float:
    return sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1)


def soak(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    """A fault every minute; memory, file descriptors, processes and disk must stay flat."""
    import psutil

    rng = random.Random(seed)
    campaign = Campaign(
        world,
        config_of(
            world, "soak", LOOPS["online_dpo"], run={"iterations": 10**6, "checkpoint_every": 20}
        ),
    )
    campaign.start()
    campaign.wait_for_rounds(1, 400)
    started, looks, strikes = time.monotonic(), [], 0
    while (minutes := (time.monotonic() - started) / 60) < options.minutes:
        role, blow = rng.choice(
            [("rollout", "kill"), ("rollout", "stop"), ("scorer", "kill"), ("learner", "kill")]
        )
        campaign.strike_and_recover(role, SIGNALS[blow], timeout_s=300)
        strikes += 1
        time.sleep(max(0.0, 60.0 - (time.monotonic() - started) % 60.0))
        top = psutil.Process(campaign.family()[0].pid)
        disk = sum(
            f.stat().st_size for f in (campaign.run_dir / "checkpoints").rglob("*") if f.is_file()
        )
        looks.append(
            (
                minutes,
                top.memory_info().rss / 2**20,
                top.num_fds(),
                len(campaign.family()),
                disk / 2**20,
                campaign.rounds(),
            )
        )
        console.print(
            "minute {:.1f}: rss {:.0f} MiB, fds {}, processes {}, checkpoints {:.1f} MiB, round {}".format(
                *looks[-1]
            )
        )
    family = campaign.family()
    subprocess.run([RAYHF, "stop", campaign.run_dir], check=True, capture_output=True, timeout=60)
    assert campaign.process is not None
    campaign.process.communicate(timeout=300)
    check(orphans(family) == [], "orphans")
    found = verified(campaign.run_dir)
    check(found == "clean", found)
    half = looks[len(looks) // 4 :]  # the first quarter warms up
    slopes = [
        slope([look[0] / 60 for look in half], [look[i] for look in half]) for i in range(1, 5)
    ]
    return [
        (
            f"soak of {options.minutes:g} minutes",
            f"{strikes} faults, {looks[-1][5]} rounds, verify clean, orphans 0",
        ),
        (
            "slopes per hour",
            f"controller's memory {slopes[0]:+.1f} MiB, its descriptors {slopes[1]:+.1f}, processes {slopes[2]:+.1f}, "
            f"checkpoints {slopes[3]:+.2f} MiB",
        ),
    ]


def slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression(x, y).slope if len(x) > 1 else 0.0


def nodes(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    """All actors live on a second node, which is killed as a whole; another one joins."""
    from tests.chaos.cluster import TwoNodes

    took: list[float] = []
    with TwoNodes() as cluster:
        config = config_of(
            world,
            "nodes",
            LOOPS["online_dpo"],
            cluster={"address": cluster.address},
            run={"start_timeout_s": 120, "timeout_s": 60},
        )
        campaign = Campaign(world, config)
        campaign.start()
        campaign.wait_for_rounds(2, 400)
        for turn in range(5):
            before, started = campaign.rounds(), time.monotonic()
            cluster.kill_worker()
            cluster.add_worker()
            campaign.wait_for_rounds(before + 2, 400)
            check(campaign.alive(), f"node loss {turn}: the campaign ended")
            took.append(time.monotonic() - started)
            console.print(f"node {turn + 1}/5: {took[-1]:.1f} s, round {campaign.rounds()}")
        subprocess.run(
            [RAYHF, "stop", campaign.run_dir], check=True, capture_output=True, timeout=60
        )
        assert campaign.process is not None
        _, said = campaign.process.communicate(timeout=300)
        check(campaign.process.returncode == 75, said)
    rounds = committed(campaign.run_dir)
    calm = Campaign(
        world, config_of(world, "calm-nodes", LOOPS["online_dpo"], run={"iterations": rounds})
    )
    calm.start()
    calm.finish(900)
    same, found = (
        fingerprint(campaign.run_dir) == fingerprint(calm.run_dir),
        verified(campaign.run_dir),
    )
    check(same and found == "clean", f"equal bits {same}, verify {found}")
    return [
        (
            "5 nodes lost",
            f"{rounds} rounds, equal in every bit; recovery p50 {statistics.median(took):.0f} s, worst {max(took):.0f} s",
        )
    ]


CASES: dict[str, Callable[[Path, int, argparse.Namespace], Rows]] = {
    "commits": commits,
    "launches": launches,
    "scorers": scorers,
    "engines": engines,
    "nodes": nodes,
    "soak": soak,
}


def record(case: str, rows: Rows, seed: int, seconds: float) -> None:
    """The case's table in RESULTS.md."""
    command = f"`python -m tests.chaos {case} --seed {seed}`"
    body = (
        f"{command}, {time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes.\n\n| | |\n|---|---|\n"
    )
    put_section(
        f"### Chaos: {case}",
        body + "\n".join(f"| {label} | {value} |" for label, value in rows),
        under="## Chaos",
    )


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
