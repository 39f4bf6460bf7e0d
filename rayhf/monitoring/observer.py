"""What the controller reports to: the live view, wandb, the event log, a test.

An observer never changes or stops the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """Receives everything worth showing, in the order in which it happens."""

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None:
        """Report a phase of an iteration; `done` of `total` prompts where it counts them."""
        ...

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Report the metrics of a finished iteration, as in metrics.jsonl."""
        ...

    def event(self, kind: str, message: str) -> None:
        """Report an event: a fault, a recovery, a warning, a pause, a commit."""
        ...
