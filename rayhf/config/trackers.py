"""What the configs of trackers share; the config of one tracker stands beside its code."""

from __future__ import annotations

from rayhf.config.base import PluginConfig


class TrackerConfig(PluginConfig):
    """A mirror of metrics.jsonl elsewhere; the file stays the record."""
