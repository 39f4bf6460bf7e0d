"""Base config of trackers; the config of each tracker is beside its code."""

from __future__ import annotations

from rayhf.config.base import PluginConfig


class TrackerConfig(PluginConfig):
    """Where metrics are sent in addition to metrics.jsonl, which is always written."""
