"""Attacks on how a campaign ends: signals, lost processes, full disks, closed pipes."""

from __future__ import annotations

from tests.chaos.attacks.attack import Attack

ATTACKS: list[Attack] = []
