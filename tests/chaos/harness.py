"""Campaigns for chaos cases, and the guarantees that every case checks."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.chaos.faults import RAYHF, Campaign, committed, fingerprint
from tests.e2e.world import write_config

Rows = list[tuple[str, str]]
console = Console(width=160)

LOOPS: dict[str, dict[str, Any]] = {
    "online_dpo": {"type": "online_dpo", "samples": 4},
    "ppo": {"type": "ppo", "samples": 2},
    "mcts_dpo": {"type": "mcts_dpo", "iterations": 4, "parallel": 2, "width": [3, 2]},
}
ITERATIONS = 4000
"""More than a case lasts; the campaign is stopped after it."""


def make_campaign(world: Path, name: str, loop: str, **sections: Any) -> Campaign:
    """A campaign that is not started yet; slow enough for faults, with unlimited restarts."""
    scorer = {
        "train": [
            {"type": "rule", "function": "my_rules:slow"},
            {"type": "rule", "function": "my_rules:even", "name": "even"},
        ]
    }
    run = {
        "iterations": ITERATIONS,
        "eval_every": 0,
        "checkpoint_every": 2,
        "stall_s": 8,
        "restarts": 1000,
    }
    config: dict[str, Any] = {
        "algorithm": LOOPS[loop],
        "scorer": scorer,
        "prompts": {"heldout": None},
        # After many iterations all completions of this tiny policy score alike, which would pause.
        "guards": {"no_signal": {"pause": None}},
        **sections,
        "run": run | sections.get("run", {}),
    }
    return Campaign(world, write_config(world, name, **config))


def verify_deep(run: Path) -> str:
    """Return "clean", or what `rayhf verify --deep` complains about."""
    command = [str(RAYHF), "verify", "--deep", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return "clean" if done.returncode == 0 else done.stderr.strip()


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"chaos: VIOLATED: {what}")


def check_equal_to_undisturbed(campaign: Campaign, loop: str, lost: list[Any]) -> int:
    """Run the same iterations without faults; check that both runs agree in every bit.

    Returns how many iterations that were.
    """
    iterations = committed(campaign.run_dir)
    undisturbed = make_campaign(
        campaign.world, f"undisturbed-{loop}", loop, run={"iterations": iterations}
    )
    undisturbed.start()
    undisturbed.finish(900)
    same = fingerprint(campaign.run_dir) == fingerprint(undisturbed.run_dir)
    verdict = verify_deep(campaign.run_dir)
    check(
        same and verdict == "clean" and not lost,
        f"{campaign.run_dir.name}: equal bits {same}, verify {verdict}, orphans {lost}",
    )
    return iterations
