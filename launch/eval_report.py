"""What `rayhf eval` makes of a suite's completions: figures, tables, and files.

Figures are means over prompts with bootstrap intervals over prompts; differences from a baseline
are paired by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.eval_scores import compare_all, score_combined, score_each
from launch.eval_target import Target
from launch.sanitize import plain, print_plain
from rayhf.config.evaluate import EvalConfig, powers_of_two
from rayhf.config.scorers import ScorerEntryConfig
from rayhf.errors import ConfigError
from rayhf.evaluation.best_of_n import BestOfN, best_of_n_curve
from rayhf.evaluation.duels import Contest, duels_of
from rayhf.evaluation.series import prompt_figures
from rayhf.evaluation.statistics import Array, Estimate, mean_estimate
from rayhf.evaluation.suites.base import Suite
from rayhf.evaluation.win_rates import ties, win_summary
from rayhf.run_dir.files import write_atomic
from rayhf.types import Completion, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A suite, ready to be run."""

    name: str
    suite: Suite
    entries: tuple[ScorerEntryConfig, ...]
    prompts: tuple[Prompt, ...]


# ----------------------------------------------------------------------------------------- figures


def figures_of(
    config: EvalConfig, each: Loaded, scores: Mapping[str, Array], texts: Sequence[Sequence[str]]
) -> dict[str, tuple[Array, Array]]:
    """Return each figure by name: its value per prompt and the prompts' weights, (P,) both."""
    answers = None
    if each.suite.votes:
        answers = [[each.suite.answer(text) for text in row] for row in texts]
    smallest = min(map(len, texts))
    sizes = [k for k in config.sizes if k <= smallest]
    figures = {}
    for metric, scores_PN in scores.items():
        weights = np.array([each.suite.weight(metric, prompt) for prompt in each.prompts])
        votes = answers if metric == next(iter(scores)) else None
        for name, values in prompt_figures(scores_PN, votes, sizes).items():
            # A baseline may have another number of samples; its mean is of the same thing.
            shown = f"mean@{config.completions}" if name == "mean" else name
            single = name == "mean" and config.completions == 1
            figures[metric if single else f"{metric}/{shown}"] = (values, weights)
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure of the model, and of the baseline where it has the same one."""

    name: str
    value: Estimate
    baseline: Estimate | None = None
    difference: Estimate | None = None


def report(
    config: EvalConfig,
    target: Target,
    each: Loaded,
    own: Sequence[tuple[Completion, ...]],
    baseline: Sequence[tuple[Completion, ...]] | None,
    console: Console,
) -> dict[str, Any]:
    """Score, print and write one suite; return its results."""
    scores = _scores(config, each, own)
    figures = figures_of(config, each, scores, _texts(own))
    others = {}
    if baseline is not None:
        others = figures_of(config, each, _scores(config, each, baseline), _texts(baseline))
    rows = [*_measured(figures, others), *_shape(own)]
    title = f"{each.name}: {len(each.prompts)} prompts x {len(own[0])} of {target.text}"
    console.print(_table(title, rows, compared=baseline is not None))
    results: dict[str, Any] = {"metrics": {row.name: row.value.to_json() for row in rows}}
    if baseline is not None:
        results["baseline"] = {
            "name": config.baseline,
            "metrics": {row.name: row.baseline.to_json() for row in rows if row.baseline},
            "differences": {row.name: row.difference.to_json() for row in rows if row.difference},
        }
        if config.judge is not None:
            results["win_rate"] = _win_rates(config, each, own, baseline, console)
    if config.best_of is not None:
        results["best_of"] = _best_of(config, each, own, console)
    results |= _facts(config, target, each, scores)
    _write(config.out, f"{target.label}-{each.name}", results, each, own, scores, console)
    return results


def _measured(
    figures: Mapping[str, tuple[Array, Array]], others: Mapping[str, tuple[Array, Array]]
) -> Iterator[Measured]:
    """Yield the figures that are known, with those of the baseline and paired differences."""
    for name, (values, weights) in figures.items():
        value = _estimate(values, weights)
        if value is None:
            continue
        baseline = difference = None
        if name in others:
            baseline = _estimate(*others[name])
            difference = _estimate(values - others[name][0], weights)
        if baseline is None or difference is None:
            yield Measured(name=name, value=value)
        else:
            yield Measured(name=name, value=value, baseline=baseline, difference=difference)


def _estimate(values: Array, weights: Array) -> Estimate | None:
    known = np.isfinite(values)
    return mean_estimate(values[known], weights[known]) if known.any() else None


def _shape(own: Sequence[tuple[Completion, ...]]) -> Iterator[Measured]:
    """Yield the mean length and the share of truncated completions."""
    lengths = [np.mean([len(c.token_ids) for c in row]) for row in own]
    truncated = [np.mean([c.finish_reason == "length" for c in row]) for row in own]
    yield Measured(name="length", value=mean_estimate(lengths))
    yield Measured(name="truncated", value=mean_estimate(truncated))


def _table(title: str, rows: Sequence[Measured], *, compared: bool) -> Table:
    table = Table(title=escape(plain(title)))
    columns = ["figure", "value", "95 % interval"]
    columns += ["baseline", "difference", "95 % interval"] if compared else []
    for column in columns:
        table.add_column(column)
    for row in rows:
        label = "length, tokens" if row.name == "length" else row.name
        cells = [escape(plain(label)), f"{row.value.value:.3f}", row.value.interval]
        if row.baseline is not None and row.difference is not None:
            cells += [f"{row.baseline.value:.3f}", f"{row.difference.value:+.3f}"]
            cells += [row.difference.interval]
        table.add_row(*cells)
    return table


def _scores(
    config: EvalConfig, each: Loaded, own: Sequence[tuple[Completion, ...]]
) -> Mapping[str, Array]:
    if not each.entries:
        return {}
    return score_each(
        each.entries, each.prompts, own, device=config.device, max_failed=config.max_failed
    )


def _texts(own: Sequence[tuple[Completion, ...]]) -> list[list[str]]:
    return [[completion.text for completion in row] for row in own]


def _win_rates(
    config: EvalConfig,
    each: Loaded,
    own: Sequence[tuple[Completion, ...]],
    baseline: Sequence[tuple[Completion, ...]],
    console: Console,
) -> dict[str, Any]:
    """Compare each completion with the baseline's of the same number."""
    assert config.judge is not None
    contests = [
        Contest(prompt=prompt, texts=(mine.text, theirs[i % len(theirs)].text))
        for prompt, row, theirs in zip(each.prompts, own, baseline, strict=True)
        for i, mine in enumerate(row)
    ]
    wins = compare_all(config.judge, contests, device=config.device)
    values = [contest.prompt.row.get("difficulty") for contest in contests]
    difficulty = [float(v) for v in values if isinstance(v, int | float)]
    duels = duels_of(contests, wins, difficulty if len(difficulty) == len(values) else None)
    table = Table(
        "figure", "value", "95 % interval", title=escape(plain(f"against {config.baseline}"))
    )
    results: dict[str, Any] = {
        "comparisons": len(duels.win_D),
        "without_verdict": len(contests) - len(duels.win_D),
        "ties": ties(duels),
        "length_gap": float(duels.length_gap_D.mean()),
    }
    for name, estimate in win_summary(duels).items():
        results[name] = estimate.to_json()
        table.add_row(name.replace("_", " "), f"{estimate.value:.3f}", estimate.interval)
    console.print(table)
    print_plain(
        console,
        f"{results['comparisons']} comparisons, {results['ties']:.1%} ties, "
        f"{results['without_verdict']} without a verdict",
    )
    return results


def _best_of(
    config: EvalConfig, each: Loaded, own: Sequence[tuple[Completion, ...]], console: Console
) -> list[dict[str, Any]]:
    """Return the curve of the judge's score over KL, where the proxy chooses among n samples."""
    best_of = config.best_of
    assert best_of is not None
    proxy = score_combined(best_of.proxy, each.prompts, own, device=config.device)
    judge = score_combined(best_of.judge, each.prompts, own, device=config.device)
    curve = best_of_n_curve(proxy, judge, best_of.sizes or powers_of_two(config.completions))
    headers = ("n", "KL, nats", "proxy", "95 % interval", "judge", "95 % interval")
    table = Table(*headers, "judge's gain", "95 % interval", title="best of n")
    for point in curve:
        cells = [str(point.n), f"{point.kl:.3f}"]
        for estimate in (point.proxy, point.judge, point.gain):
            cells += [f"{estimate.value:.3f}", estimate.interval]
        table.add_row(*cells)
    console.print(table)
    return [_point(point) for point in curve]


def _point(point: BestOfN) -> dict[str, Any]:
    figures = {name: getattr(point, name).to_json() for name in ("proxy", "judge", "gain")}
    return {"n": point.n, "kl": point.kl, **figures}


# ------------------------------------------------------------------------------------------ output


def _facts(
    config: EvalConfig, target: Target, each: Loaded, scores: Mapping[str, Array]
) -> dict[str, Any]:
    by_seed = {
        metric: {
            str(seed): float(np.nanmean(part))
            for seed, part in zip(
                config.seeds, np.split(values, len(config.seeds), axis=1), strict=True
            )
        }
        for metric, values in scores.items()
    }
    return {
        "model": target.text,
        "resolved_model": str(config.policy.model),
        "suite": each.name,
        "prompts": len(each.prompts),
        "completions_per_prompt": config.completions,
        "unscored": {name: int(np.isnan(values).sum()) for name, values in scores.items()},
        "by_seed": by_seed,
        "config": config.model_dump(mode="json"),
    }


def _write(
    out: Path,
    name: str,
    results: Mapping[str, Any],
    each: Loaded,
    own: Sequence[tuple[Completion, ...]],
    scores: Mapping[str, Array],
    console: Console,
) -> None:
    """Write results and answers. Raises ConfigError for a directory that cannot be written."""
    lines = []
    for number, (prompt, row) in enumerate(zip(each.prompts, own, strict=True)):
        completions = [
            {
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "scores": {
                    metric: float(values[number, i])
                    for metric, values in scores.items()
                    if np.isfinite(values[number, i])
                },
            }
            for i, completion in enumerate(row)
        ]
        messages = [dict(message) for message in prompt.messages]
        lines.append(
            json.dumps(
                {
                    "prompt_id": prompt.prompt_id,
                    "messages": messages,
                    "answer": prompt.reference_answer,
                    "completions": completions,
                    "row": dict(prompt.row),
                },
                ensure_ascii=False,
            )
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{name}.json", json.dumps(results, indent=2).encode())
        write_atomic(out / f"{name}.answers.jsonl", ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror or error})") from None
    print_plain(console, f"results: {out / name}.json")
    print_plain(console, f"answers: {out / name}.answers.jsonl")
