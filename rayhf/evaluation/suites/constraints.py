"""Constraints that a program can verify: rows of rayhf/scorer/constraints.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayhf.config.suites import SuiteConfig
from rayhf.evaluation.suites.base import Suite


class ConstraintsConfig(SuiteConfig):
    """Rows with `prompt` and, in `answer`, a JSON list of constraints."""

    type: str = "constraints"


class Constraints(Suite):
    """Constraints of your own rows: share of completions that keep to all, and share kept."""

    Config = ConstraintsConfig
    functions: ClassVar[Mapping[str, str]] = {
        "all_constraints": "rayhf.scorer.constraints:all_constraints",
        "share_of_constraints": "rayhf.scorer.constraints:share_of_constraints",
    }
