"""Attacks on a run directory: flipped bits, links, locks, foreign and stray files."""

from __future__ import annotations

from tests.chaos.attacks.attack import Attack

ATTACKS: list[Attack] = []
