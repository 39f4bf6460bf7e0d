"""MLflow as a tracker: a server, or a database file in the run directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rayhf.config.trackers import TrackerConfig
from rayhf.monitoring.tracking import SampleRow, TrackedRun

_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in the name of a metric."""


class MlflowConfig(TrackerConfig):
    """Server, experiment and name of the run."""

    library: ClassVar[str | None] = "mlflow"
    extra: ClassVar[str | None] = "mlflow"

    type: str = "mlflow"
    uri: str | None = None
    """Tracking URI of MLflow. Default: MLFLOW_TRACKING_URI, or the directory mlflow in the run
    directory, which needs no server."""
    experiment: str = "rayhf"
    """Name of the experiment."""
    name: str | None = None
    """Name of the run. Default: the run directory's name."""


class MlflowTracker:
    """MLflow, with one run per campaign: a continued campaign continues its run."""

    Config = MlflowConfig

    def __init__(self, config: MlflowConfig, run: TrackedRun) -> None:
        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow 3 refuses its file store without this consent; its other offline store needs a
            # database library.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (Path(run.directory) / "mlflow").as_uri()
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        name = config.name or run.name
        experiment = self._experiment(config.experiment)
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.`rayhf.directory` = '{_quoted(run.directory)}'"
        )
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"rayhf.directory": run.directory}
        self._run = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        self._client.log_dict(self._run, dict(run.config), "config.json")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics in one request."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        step = int(metrics["iteration"])
        self._client.log_batch(
            self._run,
            metrics=[
                Metric(_NOT_ALLOWED.sub("_", name), value, now, step)
                for name, value in metrics.items()
            ],
        )

    def log_samples(self, iteration: int, rows: Sequence[SampleRow]) -> None:
        """Log completions as a JSON table, which MLflow shows under the run's artifacts."""
        columns = list(rows[0])
        table = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
        text = json.dumps(table, ensure_ascii=False)
        self._client.log_text(self._run, text, f"samples/iteration-{iteration:06d}.json")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")
