"""TensorBoard as a tracker: event files, always offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import SAMPLE_COLUMNS, SampleRow, TrackedRun


class TensorboardConfig(TrackerConfig):
    """Directory of the event files."""

    library: ClassVar[str | None] = "tensorboard"
    extra: ClassVar[str | None] = "tensorboard"

    type: str = "tensorboard"
    dir: Path = Path("tensorboard")
    """Relative to the run directory; `tensorboard --logdir runs` shows all runs below it."""


class TensorboardTracker:
    """TensorBoard, with one scalar per metric and samples as text."""

    Config = TensorboardConfig

    def __init__(self, config: TensorboardConfig, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run.directory) / config.dir))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics["iteration"]))
        self._writer.flush()

    def log_samples(self, iteration: int, rows: Sequence[SampleRow]) -> None:
        """Log a table of completions as Markdown."""
        lines = [SAMPLE_COLUMNS, ("---",) * len(SAMPLE_COLUMNS)]
        lines += [tuple(_cell(row[column]) for column in SAMPLE_COLUMNS) for row in rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._writer.add_text("samples", table, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _cell(value: object) -> str:
    """Return a value as a cell of a Markdown table, in one line."""
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
