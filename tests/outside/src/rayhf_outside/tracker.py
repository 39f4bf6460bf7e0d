"""A tracker: one line of CSV per iteration."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import rayhf


class CsvConfig(rayhf.TrackerConfig):
    """Which metrics, in which file."""

    type: str = "rayhf_outside.tracker:CsvTracker"
    file: str = "metrics.csv"
    """In the run directory."""
    columns: tuple[str, ...] = ("iteration", "scorer/reward_mean")


class CsvTracker:
    """CSV file of some metrics."""

    Config = CsvConfig

    def __init__(self, config: CsvConfig, run: rayhf.TrackedRun) -> None:
        self._columns = config.columns
        self._file = (Path(run.directory) / config.file).open("a", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file)

    def log(self, metrics: Mapping[str, float]) -> None:
        self._rows.writerow([metrics.get(name, "") for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()
