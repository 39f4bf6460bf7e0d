"""Weights & Biases as a tracker; offline mode needs no account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import TrackedRun


class WandbConfig(TrackerConfig):
    """Project and name of the run in wandb."""

    type: str = "wandb"
    mode: Literal["offline", "online"] = "online"
    """Upload mode. offline: files in the run directory, for a later `wandb sync`."""
    project: str = "rayhf"
    """Project name."""
    name: str | None = None
    """Name of the run. Default: the run directory's name."""


class WandbTracker:
    """Weights & Biases, with one run per campaign and one step per iteration."""

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
