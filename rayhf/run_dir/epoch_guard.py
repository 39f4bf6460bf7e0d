"""Write protection against actors of an earlier attempt.

A launcher that lost its node may leave actors behind, and these may continue after a later attempt
has opened the run directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayhf.errors import CheckpointError, FencedError
from rayhf.run_dir.state import FILE, read_state


@dataclass(frozen=True, slots=True)
class EpochGuard:
    """The attempt that an actor belongs to; passed to every actor that writes."""

    run: Path
    epoch: int

    def check(self) -> None:
        """Raise FencedError unless the run directory still belongs to this attempt."""
        try:
            state = read_state(self.run)
        except CheckpointError as error:
            raise FencedError(f"{error}; nothing was written") from None
        if state is None:
            raise FencedError(f"{self.run / FILE} cannot be read; nothing was written")
        if state.epoch != self.epoch:
            raise FencedError(
                f"{self.run} is at epoch {state.epoch}, this process belongs to epoch "
                f"{self.epoch}; nothing was written"
            )
