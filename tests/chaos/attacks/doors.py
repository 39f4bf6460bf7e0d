"""Attacks through what is handed in: the service, inbox, labels, prompts, templates, secrets."""

from __future__ import annotations

from tests.chaos.attacks.attack import Attack

ATTACKS: list[Attack] = []
