"""`rayhf check --calibrate`: run two iterations of a campaign and report their pace.

They run in a directory of their own, without evaluation. The first iteration warms everything up,
the second is reported. Takes the start of all actors, two iterations and one checkpoint.
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

_ITERATIONS = 2


def calibrate(config: CampaignConfig) -> list[tuple[str, str]]:
    """Return rows for a table: seconds per phase, iterations per hour, hours of the campaign.

    Raises as the campaign.
    """
    parent = config.run.dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".calibration-{config.run.dir.name}-", dir=parent))
    try:
        run_campaign(_short(config, directory), Console(quiet=True), RunLock(directory))
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    metrics = json.loads(lines[-1])
    seconds = metrics["time/iteration_s"]
    rows = [
        (name.removeprefix("time/").removesuffix("_s"), f"{value:,.1f} s")
        for name, value in metrics.items()
        if name.startswith("time/")
    ]
    if metrics.get("time/rollout_s"):
        rate = metrics["rollout/tokens"] / metrics["time/rollout_s"] / config.rollout.engines
        rows.append(("one engine generates", f"{rate:,.0f} tokens per second"))
    rows.append(("iterations per hour", f"{3600 / seconds:,.1f}"))
    hours = config.run.iterations * seconds / 3600
    rows.append((f"{config.run.iterations} iterations, without evaluations", f"{hours:,.1f} h"))
    return rows


def _short(config: CampaignConfig, directory: Path) -> CampaignConfig:
    """Return the config of two iterations with no evaluation, tracking or service."""
    run = config.run.model_copy(
        update={"dir": directory, "iterations": _ITERATIONS, "eval_every": 0, "checkpoint_every": 0}
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
