"""Trackio as a tracker: a local database, and optionally a Space of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import SAMPLE_COLUMNS, SampleRow, TrackedRun


class TrackioConfig(TrackerConfig):
    """Project and name of the run in Trackio."""

    library: ClassVar[str | None] = "trackio"
    extra: ClassVar[str | None] = "trackio"

    type: str = "trackio"
    project: str = "rayhf"
    """Project name."""
    name: str | None = None
    """Name of the run. Default: the run directory's name."""
    space: str | None = None
    """Space on the hub that shows the run, org/name. Default: local only, in TRACKIO_DIR or the
    directory trackio in the run directory; `trackio show` displays it."""


class TrackioTracker:
    """Trackio, with one run per campaign: a continued campaign continues its run."""

    Config = TrackioConfig

    def __init__(self, config: TrackioConfig, run: TrackedRun) -> None:
        if config.space is None:
            os.environ.setdefault("TRACKIO_DIR", os.path.join(run.directory, "trackio"))
        import trackio

        self._trackio: Any = trackio
        self._run = trackio.init(
            project=config.project,
            name=config.name or run.name,
            config=dict(run.config),
            space_id=config.space,
            resume="allow",
            embed=False,
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics."""
        self._run.log(dict(metrics), step=int(metrics["iteration"]))

    def log_samples(self, iteration: int, rows: Sequence[SampleRow]) -> None:
        """Log a table of completions."""
        data = [[row[column] for column in SAMPLE_COLUMNS] for row in rows]
        table = self._trackio.Table(columns=list(SAMPLE_COLUMNS), data=data)
        self._run.log({"samples": table}, step=iteration)

    def close(self) -> None:
        """Write what is queued and end the run."""
        self._trackio.finish()
