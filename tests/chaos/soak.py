"""The soak: a fault every minute; memory, file descriptors, processes and disk must stay flat."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.faults import SIGNALS, Campaign, orphans
from tests.chaos.harness import Rows, check, console, make_campaign, verify_deep

MIB = 2**20


@dataclass(frozen=True)
class Usage:
    """Resources of a campaign at one moment."""

    minutes: float
    memory_mib: float
    """Of the controller."""
    descriptors: float
    """File descriptors of the controller."""
    processes: float
    checkpoints_mib: float
    iterations: int


def measure_usage(campaign: Campaign, minutes: float) -> Usage:
    processes = campaign.processes()
    controller = psutil.Process(processes[0].pid)
    files = [f for f in (campaign.run_dir / "checkpoints").rglob("*") if f.is_file()]
    return Usage(
        minutes=minutes,
        memory_mib=controller.memory_info().rss / MIB,
        descriptors=controller.num_fds(),
        processes=len(processes),
        checkpoints_mib=sum(f.stat().st_size for f in files) / MIB,
        iterations=campaign.iterations(),
    )


def slope_per_hour(usages: list[Usage], name: str) -> float:
    if len(usages) < 2:
        return 0.0
    hours = [usage.minutes / 60 for usage in usages]
    values = [float(getattr(usage, name)) for usage in usages]
    return statistics.linear_regression(hours, values).slope


def soak(world: Path, seed: int, options: argparse.Namespace) -> Rows:
    rng = random.Random(seed)
    run = {"iterations": 10**6, "checkpoint_every": 20}
    campaign = make_campaign(world, "soak", "online_dpo", run=run)
    campaign.start()
    campaign.wait_for_iterations(1, 400)
    started = time.monotonic()
    usages: list[Usage] = []
    faults = 0
    while (minutes := (time.monotonic() - started) / 60) < options.minutes:
        role, fault = rng.choice(
            [("rollout", "kill"), ("rollout", "stop"), ("scorer", "kill"), ("learner", "kill")]
        )
        campaign.inject_and_recover(role, SIGNALS[fault], timeout_s=300)
        faults += 1
        time.sleep(max(0.0, 60.0 - (time.monotonic() - started) % 60.0))
        usages.append(measure_usage(campaign, minutes))
        console.print(usages[-1])
    processes = campaign.processes()
    campaign.stop(300)
    check(orphans(processes) == [], "orphans")
    verdict = verify_deep(campaign.run_dir)
    check(verdict == "clean", verdict)
    warm = usages[len(usages) // 4 :]
    return [
        (
            f"soak of {options.minutes:g} minutes",
            f"{faults} faults, {usages[-1].iterations} iterations, verify clean, orphans 0",
        ),
        (
            "slopes per hour",
            f"controller's memory {slope_per_hour(warm, 'memory_mib'):+.1f} MiB, "
            f"its descriptors {slope_per_hour(warm, 'descriptors'):+.1f}, "
            f"processes {slope_per_hour(warm, 'processes'):+.1f}, "
            f"checkpoints {slope_per_hour(warm, 'checkpoints_mib'):+.2f} MiB",
        ),
    ]
