"""Keeps actors of an earlier attempt from writing into a run directory that a later attempt has
opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rayhf.errors import FencedError


@dataclass(frozen=True, slots=True)
class EpochGuard:
    """Travels with every actor that writes. A launcher that lost its node may leave actors behind,
    and they may wake up."""

    run: Path
    epoch: int

    def check(self) -> None:
        """Raises FencedError where the run directory belongs to a later epoch, or to nobody any
        more."""
        try:
            current = int(
                json.loads((self.run / "campaign.json").read_text(encoding="utf-8"))["epoch"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FencedError(
                f"{self.run}: its epoch cannot be read ({error}); nothing was written"
            ) from None
        if current != self.epoch:
            raise FencedError(
                f"{self.run} is at epoch {current}, this actor belongs to epoch {self.epoch}; nothing was written"
            )
