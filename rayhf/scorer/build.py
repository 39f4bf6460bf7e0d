"""From the config's scorer entries to one engine.

In: `scorer.train` or `scorer.evaluate`, and `scorer.combine`. Out: their combination with score(),
compare() and close(); every outcome carries its parts by name. `check_entries` refuses what can be
refused before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rayhf.config.scorers import (
    WEIGHTED_SUM,
    CombineConfig,
    GrpcScorerConfig,
    JudgeConfig,
    PairwiseRuleConfig,
    PointwiseEntry,
    PreferenceModelConfig,
    RewardModelConfig,
    RuleConfig,
    ScorerEntry,
    is_pairwise,
)
from rayhf.errors import ConfigError, UnreachableError
from rayhf.scorer.combine import Combined, Part, ScorerEngine, check_names, check_weights
from rayhf.scorer.judge_text import check_texts
from rayhf.scorer.rule import PairwiseRule, Rule, check_function
from rayhf.scorer.rule_process import ONE, TWO, ProcessLimits, parse_function

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def build_scorer(
    entries: Sequence[ScorerEntry],
    *,
    combine: CombineConfig = WEIGHTED_SUM,
    device: str,
    threads: int | None,
    base: Path,
) -> Combined:
    """The engines of all entries, started.

    Args:
        device: torch device of the models.
        threads: torch CPU threads of this process; None leaves them.
        base: directory of the campaign: relative model paths and rule modules are found from here.

    Raises ConfigError as check_entries, and for a model that turns out wrong when it is loaded.
    """
    check_names([entry_name(entry) for entry in entries])
    with ExitStack() as started:
        parts = []
        for entry in entries:
            engine = _build(entry, device=device, threads=threads, base=base)
            started.callback(engine.close)
            parts.append(_part(entry, engine))
        combined = Combined(parts, combine)
        started.pop_all()
    return combined


def check_entries(
    entries: Sequence[ScorerEntry],
    base: Path,
    *,
    where: str = "scorer.train",
    combine: CombineConfig = WEIGHTED_SUM,
) -> None:
    """Names are unique, weights fit the combination, functions can be imported and called, models
    have the right files, templates and verdicts can be read, services answer and serve what the
    entry says.

    Starts one short-lived child per function, waits seconds for services and loads no weights.
    Raises ConfigError that begins with the entry's key, or UnreachableError for services none of
    which answers.
    """
    names = [entry_name(entry) for entry in entries]
    check_names(names, where=where)
    check_weights(
        [entry.weight for entry in entries],
        combine,
        pairwise=any(map(is_pairwise, entries)),
        where=where,
    )
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where}[{index}].name is {name!r}; letters, digits, '_', '.' and '-' are allowed"
            )
        try:
            _check(entry, base)
        except (ConfigError, UnreachableError) as error:
            raise type(error)(f"{where}[{index}]: {error}") from None


def check_heldout(entries: Sequence[ScorerEntry], *, where: str) -> None:
    """For scorers that judge held-out answers, which stand alone and are measured the same way
    every time.

    Raises ConfigError for a pairwise scorer, and for one that is normalized by what was scored
    before.
    """
    for index, entry in enumerate(entries):
        if is_pairwise(entry):
            raise ConfigError(
                f"{where}[{index}]: {entry_name(entry)} compares answers, and a held-out answer stands alone; let "
                "scorer.evaluate name scorers that give scores (rule, reward_model, or judge in mode yes_no or rating)"
            )
        if isinstance(entry, PointwiseEntry) and entry.normalize:
            raise ConfigError(
                f"{where}[{index}]: {entry_name(entry)} is normalized by what was scored before, and held-out figures must not "
                "depend on that; let scorer.evaluate name it without `normalize`"
            )


def entry_name(entry: ScorerEntry) -> str:
    """The entry's name in metrics and samples: its own, else the function's, else its type."""
    if entry.name is not None:
        return entry.name
    return (
        parse_function(entry.function)[1]
        if isinstance(entry, RuleConfig | PairwiseRuleConfig)
        else entry.type
    )


def _part(entry: ScorerEntry, engine: ScorerEngine) -> Part:
    scores = entry if isinstance(entry, PointwiseEntry) else None
    return Part(
        name=entry_name(entry),
        weight=entry.weight,
        engine=engine,
        pairwise=is_pairwise(entry),
        reference=scores.transform.reference
        if scores is not None and scores.transform is not None
        else None,
        normalize=scores is not None and scores.normalize,
    )


def _check(entry: ScorerEntry, base: Path) -> None:
    if isinstance(entry, RuleConfig):
        check_function(entry.function, base=base, signature=ONE)
    elif isinstance(entry, PairwiseRuleConfig):
        check_function(entry.function, base=base, signature=TWO)
    elif isinstance(entry, RewardModelConfig):
        from rayhf.scorer import reward_model

        reward_model.check_directory(base / entry.model)
    elif isinstance(entry, PreferenceModelConfig):
        from rayhf.scorer import preference_model

        preference_model.check_directory(base / entry.model)
    elif isinstance(entry, GrpcScorerConfig):
        from rayhf.scorer.grpc.client import check_endpoints

        check_endpoints(entry, base=base)
    else:
        from rayhf.scorer.judge_model import check_judge_directory

        check_texts(entry.mode, template=entry.template, verdict=entry.verdict)
        check_judge_directory(
            base / entry.model, max_length=entry.max_length, max_tokens=entry.max_tokens
        )


def _build(entry: ScorerEntry, *, device: str, threads: int | None, base: Path) -> ScorerEngine:
    if isinstance(entry, RuleConfig):
        return Rule(
            entry.function,
            base=base,
            limits=ProcessLimits(timeout_s=entry.timeout_s, network=entry.network),
        )
    if isinstance(entry, PairwiseRuleConfig):
        return PairwiseRule(
            entry.function,
            base=base,
            limits=ProcessLimits(timeout_s=entry.timeout_s, network=entry.network),
        )
    if isinstance(entry, JudgeConfig):
        return _build_judge(entry, device=device, base=base)
    if isinstance(entry, GrpcScorerConfig):
        from rayhf.scorer.grpc.client import GrpcScorer

        return GrpcScorer(entry, base=base)
    from rayhf.scorer.preference_model import PreferenceModel
    from rayhf.scorer.reward_model import RewardModel

    model = RewardModel if isinstance(entry, RewardModelConfig) else PreferenceModel
    return model(
        base / entry.model,
        dtype=entry.dtype,
        token_budget=entry.token_budget,
        max_length=entry.max_length,
        device=device,
        threads=threads,
    )


def _build_judge(entry: JudgeConfig, *, device: str, base: Path) -> ScorerEngine:
    from rayhf.scorer.judge import Judge
    from rayhf.scorer.judge_model import JudgeModel

    generator = JudgeModel(
        base / entry.model,
        dtype=entry.dtype,
        max_length=entry.max_length,
        max_tokens=entry.max_tokens,
        kv_cache_gib=entry.kv_cache_gib,
        device=device,
    )
    return Judge(
        generator,
        mode=entry.mode,
        votes=entry.votes,
        temperature=entry.temperature,
        max_tokens=entry.max_tokens,
        template=entry.template,
        verdict=entry.verdict,
    )
