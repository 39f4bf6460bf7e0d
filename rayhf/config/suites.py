"""Base config of suites of `rayhf eval`; the config of each suite is beside its code."""

from __future__ import annotations

from pydantic import PositiveInt

from rayhf.config.base import PluginConfig
from rayhf.config.sources import PromptSources


class SuiteConfig(PluginConfig):
    """What every suite has."""

    prompts: PromptSources | None = None
    """Rows in the format of the suite's public data set: a file, or another source. Default: that
    data set on the hub."""
    limit: PositiveInt | None = None
    """Number of rows, the first ones. Default: all."""
