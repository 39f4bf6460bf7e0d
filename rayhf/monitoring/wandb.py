"""Weights & Biases as a tracker. Offline needs no account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import TrackedRun


class WandbConfig(TrackerConfig):
    """Where the run appears in wandb."""

    type: str = "wandb"
    mode: Literal["offline", "online"] = "online"
    """offline: files in the run directory, for `wandb sync` later."""
    project: str = "rayhf"
    name: str | None = None
    """Default: the run directory's name."""


class WandbTracker:
    """Weights & Biases: one run per campaign, its steps are iterations."""

    Config = WandbConfig

    def __init__(self, config: WandbConfig, run: TrackedRun) -> None:
        import wandb

        options = wandb.Settings(
            console="off", disable_code=True, disable_git=True, init_timeout=60
        )
        self._run = wandb.init(
            project=config.project,
            name=config.name or run.name,
            mode=config.mode,
            dir=run.directory,
            config=dict(run.config),
            settings=options,
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics."""
        self._run.log(dict(metrics), step=int(metrics["iteration"]))

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()
