"""Mistakes of a config that this machine alone knows, found before a model is downloaded.

In: a valid config. Out: nothing, or one ConfigError with all of them: settings, trackers, model
directories, data files and the user's functions. `prepare` checks the rest, which needs the
policy's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rayhf.algorithms.base import TakesOfflinePairs
from rayhf.config.models import ModelName, map_models
from rayhf.config.registry import ALGORITHMS, SCORERS
from rayhf.config.schema import CampaignConfig
from rayhf.config.sources import SourceConfig
from rayhf.data.files import FileSourceConfig, data_files
from rayhf.errors import ConfigError, listed
from rayhf.models.source import read_model_config
from rayhf.monitoring.tracking import check_trackers
from rayhf.planning.inputs import scorer_entries
from rayhf.planning.preflight import check_settings

Check = Callable[[], object]
"""Raises ConfigError for a mistake."""


def check_local(config: CampaignConfig, *, base: Path) -> None:
    """Raise ConfigError with every mistake that needs neither a download nor a tokenizer.

    The user's functions are imported, each in a process of its own, where something else is wrong
    or a download comes first; otherwise `prepare` does so.

    Args:
        config: of the campaign.
        base: where relative paths start.
    """
    problems = _problems(_quick_checks(config, base))
    if problems or _downloads(config, base):
        problems += _problems(_function_checks(config, base))
    if problems:
        raise ConfigError(listed(problems))


def _problems(checks: Iterator[tuple[str, Check]]) -> list[str]:
    """Return what the checks found, each problem once; a key begins those that do not name it."""
    problems: dict[str, None] = {}
    for key, check in checks:
        try:
            check()
        except ConfigError as error:
            problems[f"{key}: {error}" if key else str(error)] = None
    return list(problems)


def _quick_checks(config: CampaignConfig, base: Path) -> Iterator[tuple[str, Check]]:
    yield "", partial(check_settings, config)
    yield "", partial(check_trackers, config.trackers)
    for key, path in _model_paths(config, base):
        yield "", partial(read_model_config, path, key=key)
    for key, path in _data_paths(config, base):
        yield key, partial(data_files, path)


def _function_checks(config: CampaignConfig, base: Path) -> Iterator[tuple[str, Check]]:
    from rayhf.scorer.rule_config import FunctionEntryConfig

    for key, entry in scorer_entries(config):
        if isinstance(entry, FunctionEntryConfig):
            yield key, partial(SCORERS.resolve(entry.type).check, entry, base)


def _names(config: CampaignConfig) -> list[tuple[str, ModelName]]:
    """Return every model of the config, after its key."""
    names: list[tuple[str, ModelName]] = []

    def note(key: str, name: ModelName) -> ModelName:
        names.append((key, name))
        return name

    map_models(config, note)
    return names


def _model_paths(config: CampaignConfig, base: Path) -> Iterator[tuple[str, Path]]:
    """Yield the models that can only be paths, where nothing is there."""
    for key, name in _names(config):
        if name.repository is None and not (base / name.text).exists():
            yield key, base / name.text


def _downloads(config: CampaignConfig, base: Path) -> bool:
    """Return whether a model of the config is looked up on the hub."""
    names = (name for _, name in _names(config))
    return any(name.repository and not (base / name.text).is_dir() for name in names)


def _data_paths(config: CampaignConfig, base: Path) -> Iterator[tuple[str, Path]]:
    """Yield every data file of the config, after its key."""
    sources: dict[str, tuple[SourceConfig, ...] | None] = {
        "prompts.train": config.prompts.train,
        "prompts.heldout": config.prompts.heldout,
    }
    for task, evaluation in config.evaluations.items():
        sources[f"evaluations.{task}.prompts"] = getattr(evaluation, "prompts", None)
    for key, given in sources.items():
        for number, source in enumerate(given or ()):
            if isinstance(source, FileSourceConfig):
                yield f"{key}[{number}]" if len(given or ()) > 1 else key, base / source.path
    try:
        algorithm = ALGORITHMS.build(config.algorithm)
    except ConfigError:  # which check_settings reports
        return
    if isinstance(algorithm, TakesOfflinePairs) and algorithm.pair_file is not None:
        yield "algorithm.offline.path", base / algorithm.pair_file
