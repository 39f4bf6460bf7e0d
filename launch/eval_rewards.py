"""`rayhf eval REWARD_MODEL` on preference pairs: accuracy, calibration, length and format bias."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.eval_scores import check_judge, compare_all
from launch.eval_target import Target
from launch.models import pin_models
from launch.sanitize import plain, print_plain
from rayhf.config.evaluate import EvalConfig
from rayhf.config.scorers import ScorerEntries, ScorerEntryConfig
from rayhf.data.prompts import prompt_id
from rayhf.data.readers import named_rows, open_source
from rayhf.errors import ConfigError, ScorerError
from rayhf.evaluation.duels import Contest
from rayhf.evaluation.reward_quality import (
    Bin,
    JudgedPair,
    accuracy,
    annotator_accuracy,
    by_category,
    calibration_error,
    format_bias,
    ideal_accuracy,
    length_bias,
    reliability,
    section_scores,
)
from rayhf.evaluation.statistics import Estimate
from rayhf.evaluation.suites.preferences import AnnotatedPair, Preferences
from rayhf.models.hub import local_directory
from rayhf.run_dir.files import write_atomic
from rayhf.scorer.classifier import SCORER_FILE
from rayhf.types import Prompt


def evaluate_rewards(
    config: EvalConfig, target: Target, name: str, suite: Preferences, console: Console
) -> dict[str, Any]:
    """Judge the pairs of a suite; print, write and return the figures.

    Raises ConfigError for what cannot work, ScorerError for too many pairs without a verdict.
    """
    base = Path.cwd()
    key = f"suites.{name}"
    entries = config.scorer or _model_entry(config, base, console)
    check_judge(entries, "scorer")
    sources = suite.sources(key)
    source = open_source(*sources, base=base, key=f"{key}.prompts")
    pairs = [suite.parse(row, where) for where, row in named_rows(source, key=f"{key}.prompts")]
    if not pairs:
        raise ConfigError(f"{key}.prompts: {source.label} is empty")
    judged = _judge(config, entries, pairs)
    figures = _figures(judged, suite)
    table = reliability(judged)
    _print(name, target, judged, figures, table, console)
    results = {
        "model": target.text,
        "suite": name,
        "pairs": len(judged),
        "without_verdict": len(pairs) - len(judged),
        "tied": sum(pair.win == 0.5 for pair in judged),
        "metrics": {
            group: {key: estimate.to_json() for key, estimate in own.items()}
            for group, own in figures.items()
        },
        "reliability": [{**asdict(row), "accuracy": row.accuracy.to_json()} for row in table],
        "config": config.model_dump(mode="json"),
    }
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        file = config.out / f"{target.label}-{name}.json"
        write_atomic(file, json.dumps(results, indent=2).encode())
    except OSError as error:
        raise ConfigError(f"out: {config.out} cannot be written ({error.strerror})") from None
    print_plain(console, f"results: {file}")
    return results


def _model_entry(config: EvalConfig, base: Path, console: Console) -> tuple[ScorerEntryConfig, ...]:
    """Return MODEL as a scorer: of the kind that `rayhf fit-scorer` noted, or a reward model."""
    policy, _ = pin_models(config.policy, base, console)
    facts = local_directory(policy.model, base) / SCORER_FILE
    kind = "pointwise"
    if facts.is_file():
        kind = json.loads(facts.read_text(encoding="utf-8")).get("kind", kind)
    entry: dict[str, Any] = {
        "type": "reward_model" if kind == "pointwise" else "preference_model",
        "model": str(policy.model),
    }
    # A classifier has no float16; its own default is the entry's.
    if "dtype" in config.policy.model_fields_set and config.policy.dtype != "float16":
        entry["dtype"] = config.policy.dtype
    return TypeAdapter(ScorerEntries).validate_python([entry])


def _judge(
    config: EvalConfig, entries: Sequence[ScorerEntryConfig], pairs: Sequence[AnnotatedPair]
) -> list[JudgedPair]:
    contests = [
        Contest(
            prompt=Prompt(
                prompt_id=prompt_id(pair.messages, None), messages=pair.messages, token_ids=()
            ),
            texts=(pair.chosen, pair.rejected),
        )
        for pair in pairs
    ]
    wins = compare_all(entries, contests, device=config.device)
    judged = [
        JudgedPair(
            win=float(win[0, 1]),
            chosen=pair.chosen,
            rejected=pair.rejected,
            category=pair.category,
            agreement=pair.agreement,
        )
        for pair, win in zip(pairs, wins, strict=True)
        if win is not None and np.isfinite(win[0, 1])
    ]
    missing = len(pairs) - len(judged)
    if missing > config.max_failed * len(pairs):
        raise ScorerError(
            f"{missing} of {len(pairs)} pairs have no verdict (max_failed allows "
            f"{config.max_failed:g}); texts that are too long for the model are not truncated"
        )
    return judged


def _figures(
    judged: Sequence[JudgedPair], suite: Preferences
) -> Mapping[str, Mapping[str, Estimate]]:
    total = {"accuracy": accuracy(judged), "calibration_error": calibration_error(judged)}
    for name, estimate in (
        ("accuracy_against_annotators", annotator_accuracy(judged)),
        ("ideal_accuracy", ideal_accuracy(judged)),
    ):
        if estimate is not None:
            total[name] = estimate
    return {
        "total": total,
        "section": section_scores(judged, suite.sections, suite.counts),
        "category": by_category(judged),
        "length": length_bias(judged),
        "format": format_bias(judged),
    }


def _print(
    name: str,
    target: Target,
    judged: Sequence[JudgedPair],
    figures: Mapping[str, Mapping[str, Estimate]],
    bins: Sequence[Bin],
    console: Console,
) -> None:
    title = escape(plain(f"{name}: {len(judged)} pairs, {target.text}"))
    table = Table("", "figure", "pairs", "value", "95 % interval", title=title)
    for group, own in figures.items():
        for index, (key, estimate) in enumerate(own.items()):
            table.add_row(
                "" if index else group,
                escape(plain(key if group == "category" else key.replace("_", " "))),
                str(estimate.count),
                f"{estimate.value:.3f}",
                estimate.interval,
            )
    console.print(table)
    table = Table("confidence", "pairs", "mean", "accuracy", "95 % interval", title="reliability")
    for row in bins:
        table.add_row(
            f"{row.low:.2f} to {row.high:.2f}",
            str(row.count),
            f"{row.confidence:.3f}",
            f"{row.accuracy.value:.3f}",
            row.accuracy.interval,
        )
    console.print(table)
