"""Whoever watches a campaign: the live view, wandb, a test. Watching never changes or stops the
run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        """The controller is in this phase of this round; `done` of `total` prompts where it counts
        them."""
        ...

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """A finished round's line, as in metrics.jsonl."""
        ...

    def event(self, kind: str, message: str) -> None:
        """Something worth a line: a fault, a recovery, a warning, a pause, a commit."""
        ...
