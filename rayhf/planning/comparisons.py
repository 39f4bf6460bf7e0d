"""Comparisons of an iteration: how many a pairwise scorer is asked for, and those that cannot work.

In: a config and its algorithm. Out: rows for `rayhf check`, or a refusal.
"""

from __future__ import annotations

from rayhf.algorithms.base import Algorithm, generates
from rayhf.config.comparisons import RoundRobin, Swiss
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError


def check_comparisons(config: CampaignConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError for a scorer whose comparisons the completions of a prompt do not allow."""
    if not generates(algorithm):
        return
    samples = algorithm.samples
    for index, entry in enumerate(config.scorer.train):
        where = f"scorer.train[{index}]"
        if entry.is_pairwise and samples == 1:
            raise ConfigError(
                f"{where}: {entry.resolved_name} compares the completions of a prompt, and "
                "algorithm.samples is 1; expected at least 2, or comparisons: {type: anchors}"
            )
        swiss = entry.comparisons
        if isinstance(swiss, Swiss) and (swiss.rounds or 0) > swiss.rounds_of(samples):
            raise ConfigError(
                f"{where}.comparisons.rounds is {swiss.rounds}, and a prompt has {samples} "
                f"completions; expected at most {swiss.rounds_of(samples)}, or round_robin, which "
                f"compares all {RoundRobin().asked(samples)} pairs"
            )


def comparisons_table(
    config: CampaignConfig, algorithm: Algorithm, responses: int
) -> list[tuple[str, str]]:
    """Return a row (name, value) for each scorer that compares.

    Args:
        config: the campaign.
        algorithm: its algorithm.
        responses: largest number of completions of an iteration.
    """
    if not generates(algorithm):
        return []
    rows = []
    samples = algorithm.samples
    prompts = responses // samples
    for entry in config.scorer.train:
        if not entry.compares:
            continue
        comparisons = entry.comparisons or RoundRobin()
        asked = comparisons.asked(samples)
        value = (
            f"at most {prompts * asked:,}: {comparisons.type}, {asked:,} for the {samples} "
            "completions of a prompt"
        )
        if entry.calls_per_comparison > 1:
            value += f"; {prompts * asked * entry.calls_per_comparison:,} calls of the judge"
        rows.append((f"comparisons per iteration, {entry.resolved_name}", value))
    return rows
