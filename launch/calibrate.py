"""`rayhf check --calibrate`: two rounds of the campaign in a directory of their own, without
evaluation, and their pace.

The first round warms everything up; the second is reported. It takes the actors' start, two rounds
and one checkpoint.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from launch.campaign import run_campaign
from rayhf.config.schema import CampaignConfig
from rayhf.run_dir.lock import RunLock

_ROUNDS = 2


def calibrate(config: CampaignConfig) -> list[tuple[str, str]]:
    """Rows for a table: seconds per phase, rounds per hour, the campaign's hours. Raises what the
    campaign raises."""
    beside = config.run.dir.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".calibration-{config.run.dir.name}-", dir=beside))
    try:
        run_campaign(_short(config, directory), Console(quiet=True), RunLock(directory))
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    last = json.loads(lines[-1])
    seconds = last["time/iteration_s"]
    rows = [
        (name.removeprefix("time/").removesuffix("_s"), f"{value:,.1f} s")
        for name, value in last.items()
        if name.startswith("time/")
    ]
    if last.get("time/rollout_s"):
        rate = last["rollout/tokens"] / last["time/rollout_s"] / config.rollout.engines
        rows.append(("one engine writes", f"{rate:,.0f} tokens per second"))
    rows.append(("rounds per hour", f"{3600 / seconds:,.1f}"))
    rows.append(
        (
            f"{config.run.iterations} rounds, without evaluations",
            f"{config.run.iterations * seconds / 3600:,.1f} h",
        )
    )
    return rows


def _short(config: CampaignConfig, directory: Path) -> CampaignConfig:
    run = config.run.model_copy(
        update={"dir": directory, "iterations": _ROUNDS, "eval_every": 0, "checkpoint_every": 0}
    )
    return config.model_copy(
        update={
            "run": run,
            "algorithm": config.algorithm.for_calibration(),
            "prompts": config.prompts.model_copy(update={"heldout": None}),
            "scorer": config.scorer.model_copy(update={"evaluate": None}),
            "evaluations": {},
            "trackers": (),
            "service": None,
        }
    )
