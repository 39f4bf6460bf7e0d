"""From the config's scorer entries to one engine.

In: `scorer.train` or `scorer.evaluate`. Out: their weighted sum with score() and close(); every outcome carries its
parts by name. `check_entries` refuses what can be refused before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rayhf.config.schema import RewardModelScorer, ScorerEntry
from rayhf.errors import ConfigError
from rayhf.scorer.combine import Combined, Engine, Part, check_names
from rayhf.scorer.reward_model import RewardModel, check_directory
from rayhf.scorer.rule import Rule, check_function, parse_function

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def build_scorer(entries: Sequence[ScorerEntry], *, device: str, threads: int | None, base: Path) -> Combined:
    """The engines of all entries, started.

    Args:
        device: torch device of the reward models.
        threads: torch CPU threads of this process; None leaves them.
        base: directory of the campaign: relative model paths and rule modules are found from here.

    Raises ConfigError as check_entries, and for a reward model that turns out wrong when it is loaded.
    """
    check_names([entry_name(entry) for entry in entries])
    with ExitStack() as started:
        parts = []
        for entry in entries:
            engine = _build(entry, device=device, threads=threads, base=base)
            started.callback(engine.close)
            parts.append(Part(name=entry_name(entry), weight=entry.weight, engine=engine))
        combined = Combined(parts)
        started.pop_all()
    return combined


def check_entries(entries: Sequence[ScorerEntry], base: Path, *, where: str = "scorer.train") -> None:
    """Names are unique, rules can be imported and called, reward models have the right files.

    Starts one short-lived child per rule and loads no weights. Raises ConfigError that begins with the entry's key.
    """
    names = [entry_name(entry) for entry in entries]
    check_names(names, where=where)
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}[{index}].name is {name!r}; letters, digits, '_', '.' and '-' are allowed")
        try:
            if isinstance(entry, RewardModelScorer):
                check_directory(base / entry.model)
            else:
                check_function(entry.function, base=base)
        except ConfigError as error:
            raise ConfigError(f"{where}[{index}]: {error}") from None


def entry_name(entry: ScorerEntry) -> str:
    """The entry's name in metrics and samples: its own, else the function's, else "reward_model"."""
    if entry.name is not None:
        return entry.name
    return entry.type if isinstance(entry, RewardModelScorer) else parse_function(entry.function)[1]


def _build(entry: ScorerEntry, *, device: str, threads: int | None, base: Path) -> Engine:
    if isinstance(entry, RewardModelScorer):
        return RewardModel(
            base / entry.model,
            dtype=entry.dtype,
            token_budget=entry.token_budget,
            max_length=entry.max_length,
            device=device,
            threads=threads,
        )
    return Rule(entry.function, base=base, timeout_s=entry.timeout_s)
