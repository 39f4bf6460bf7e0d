"""Check and start the scorers of a config.

In: `scorer.train` or `scorer.evaluate`, and `scorer.combine`. Out: their combination, with score(),
compare() and close(); every outcome carries its parts by name. `check_entries` refuses what can be
refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rayhf.config.registry import SCORERS
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.errors import ConfigError, UnreachableError, nearest
from rayhf.scorer.combine import Combined
from rayhf.scorer.parts import Part, judges
from rayhf.scorer.protocol import BaseScorer, ScorerSetup
from rayhf.scorer.tournament import check_anchors, with_comparisons
from rayhf.types import Prompt, quoted


def build_parts(entries: Sequence[ScorerEntryConfig], setup: ScorerSetup) -> list[Part]:
    """Start the scorers of all entries.

    Raises ConfigError as check_entries, and for a model whose weights do not fit.
    """
    with ExitStack() as started:
        parts = []
        for config in entries:
            engine = _scorer_class(config)(config, setup)
            started.callback(engine.close)
            parts.append(Part(config, with_comparisons(config, setup, engine)))
        started.pop_all()
    return parts


def build_scorer(
    entries: Sequence[ScorerEntryConfig],
    setup: ScorerSetup,
    *,
    combine: CombineConfig = WEIGHTED_SUM,
) -> Combined:
    """Start the scorers of all entries and combine them; raises as build_parts."""
    return Combined(build_parts(entries, setup), combine)


def check_entries(
    entries: Sequence[ScorerEntryConfig],
    base: Path,
    *,
    where: str = "scorer.train",
    prompts: Sequence[Prompt] = (),
) -> list[str]:
    """Check what each scorer can check without loading weights; return lines about them.

    Functions can be imported and called and can use what the prompts that they judge provide,
    models have the right files, services respond and serve what the entry says. Starts a
    short-lived child process or two per function and waits seconds for services. Raises ConfigError
    that begins with the entry's key, or UnreachableError where no service responds.
    """
    notes = []
    for index, config in enumerate(entries):
        try:
            judged = [prompt for prompt in prompts if judges(config, prompt)]
            note = _scorer_class(config).check_prompts(config, base, judged)
            check_anchors(config, judged)
        except (ConfigError, UnreachableError) as error:
            raise type(error)(f"{where}[{index}]: {error}") from None
        if note:
            notes.append(f"{where}[{index}]: {note}")
    return notes


def check_named_scorers(
    prompts: Sequence[Prompt],
    entries: Sequence[ScorerEntryConfig],
    others: Sequence[ScorerEntryConfig] = (),
    *,
    where: str,
) -> None:
    """Check that each prompt names scorers that there are, one of `entries` at least.

    It may name `others` as well. Raises ConfigError.
    """
    own = {entry.resolved_name for entry in entries}
    known = own | {entry.resolved_name for entry in others}
    for named, prompt in {prompt.scorers: prompt for prompt in prompts if prompt.scorers}.items():
        assert named is not None
        problem = ""
        for name in named:
            if name not in known:
                problem = f"no scorer is named {name!r}{nearest(name, sorted(known))}"
        if not problem and own.isdisjoint(named):
            problem = f"none of the scorers {', '.join(named)} is in {where}"
        if problem:
            raise ConfigError(f"{quoted(prompt)}: {problem}")


def check_heldout(entries: Sequence[ScorerEntryConfig], *, where: str) -> None:
    """Check that the scorers can score held-out completions.

    There is one per prompt, and every evaluation must measure the same. Raises ConfigError for a
    pairwise scorer, for a normalized one and for one with a curriculum.
    """
    for index, entry in enumerate(entries):
        name = entry.resolved_name
        if entry.is_pairwise:
            raise ConfigError(
                f"{where}[{index}]: {name} compares completions, and a held-out prompt has only "
                "one; let scorer.evaluate name scorers that give scores (rule, reward_model, or "
                "judge in mode yes_no or rating)"
            )
        if entry.is_normalized:
            raise ConfigError(
                f"{where}[{index}]: {name} is normalized by earlier scores, and held-out figures "
                "must not depend on them; let scorer.evaluate name it without `normalize`"
            )
        if entry.curriculum is not None:
            raise ConfigError(
                f"{where}[{index}]: {name} has a curriculum, whose weights follow the policy, and "
                "held-out figures must not depend on it; let scorer.evaluate name it without "
                "`curriculum`"
            )


def _scorer_class(config: ScorerEntryConfig) -> type[BaseScorer[ScorerEntryConfig]]:
    plugin = SCORERS.resolve(config.type)
    if not issubclass(plugin, BaseScorer):
        raise ConfigError(
            f"{config.type} is not a scorer: expected a subclass of PointwiseScorer or "
            "PairwiseScorer (rayhf/scorer/protocol.py)"
        )
    return plugin
