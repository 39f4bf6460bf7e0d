"""Attacks by what a model writes and a rule returns, prints, starts or breaks."""

from __future__ import annotations

from tests.chaos.attacks.attack import Attack

ATTACKS: list[Attack] = []
