"""Base config of trackers; the config of each tracker is beside its code."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt, PositiveInt

from rayhf.config.base import PluginConfig


class TrackerConfig(PluginConfig):
    """Where metrics are sent in addition to metrics.jsonl, which is always written."""

    library: ClassVar[str | None] = None
    """Module that the tracker imports; `rayhf check` refuses the config where it is missing."""
    extra: ClassVar[str | None] = None
    """Optional extra of rayhf that installs the module."""

    samples: NonNegativeInt = 0
    """Completions, with prompt and score, that are also sent as a table; 0 sends no texts."""
    samples_every: PositiveInt = 10
    """Iterations between two such tables."""
