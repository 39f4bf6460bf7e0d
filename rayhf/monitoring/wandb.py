"""Weights & Biases as a tracker; offline mode needs no account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import SAMPLE_COLUMNS, SampleRow, TrackedRun


class WandbConfig(TrackerConfig):
    """Project and name of the run in wandb."""

    library: ClassVar[str | None] = "wandb"

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

    def log_samples(self, iteration: int, rows: Sequence[SampleRow]) -> None:
        """Log a table of completions."""
        import wandb

        data = [[row[column] for column in SAMPLE_COLUMNS] for row in rows]
        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=data)
        self._run.log({"samples": table}, step=iteration)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()
