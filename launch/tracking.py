"""wandb, when configured: a mirror of metrics.jsonl, which stays the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rayhf.campaign.observer import Observer
from rayhf.config.schema import CampaignConfig


class Tracked:
    """Passes everything on to another observer, and metrics to wandb too."""

    def __init__(self, inner: Observer, run: Any) -> None:
        self._inner, self._run = inner, run

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        self._inner.phase(iteration, name, done, total)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._inner.metrics(metrics)
        self._run.log(dict(metrics), step=int(metrics["iteration"]))


@contextmanager
def tracked(observer: Observer, config: CampaignConfig) -> Iterator[Observer]:
    """The observer, mirrored to wandb where tracking.wandb asks for it. Offline needs no account."""
    tracking = config.tracking
    if tracking.wandb == "off":
        yield observer
        return
    import wandb

    run = wandb.init(
        project=tracking.project,
        name=tracking.name or config.run.dir.name,
        mode=tracking.wandb,
        dir=str(config.run.dir),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", disable_code=True, disable_git=True, init_timeout=60),
    )
    try:
        yield Tracked(observer, run)
    finally:
        run.finish()
