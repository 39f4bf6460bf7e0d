"""One attack and what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Result = tuple[int, int, str]
"""Tried, held, and figures for the table."""


@dataclass(frozen=True, slots=True)
class Attack:
    """A named attack.

    Args:
        name: what is attacked, and how.
        before: figures of the first attack on 2026-11-29, for comparison.
        play: plays it in an empty folder; gets the seed.
    """

    name: str
    before: str
    play: Callable[[Path, int], Result]
