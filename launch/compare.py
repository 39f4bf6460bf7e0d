"""`rayhf compare`: held-out completions before and after training, side by side.

In: the run directory of a campaign with prompts.heldout and an exported policy. Out: scores with
confidence intervals, and a page with the campaign's curve, the scores and the completions. Both
models complete the same prompts with the same seeds, in a vLLM engine of this process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.export import checked_files
from launch.models import pin_models
from launch.sanitize import plain, print_plain
from rayhf.config.load import load_config
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
from rayhf.planning.preflight import Prepared, prepare
from rayhf.run_dir.files import write_atomic
from rayhf.run_dir.records import read_metrics
from rayhf.run_dir.state import read_state
from rayhf.scorer.build import build_scorer
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import (
    Completion,
    FloatArray,
    GenerateRequest,
    Prompt,
    Sampling,
    Scored,
    ScoreRequest,
    derive_seed,
)

SAMPLES = 2
"""Completions per held-out prompt and model."""
_SHOWN = 6
"""Prompts on the console; the page has all."""
_RESAMPLES = 10_000
PAGE = "comparison.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one model answers to the held-out prompts."""

    texts: Sequence[Sequence[str]]
    """By prompt, one per seed."""
    scores: FloatArray
    """(prompts, seeds)."""

    @property
    def mean(self) -> float:
        return float(self.scores.mean())


def compare(run: Path, console: Console) -> None:
    """Print the comparison and write RUN/comparison.html.

    Raises ConfigError where the run has no exported policy or no held-out prompts, CheckpointError
    where the policy is damaged.
    """
    policy = run / "policy"
    if not (policy / "config.json").is_file():
        raise ConfigError(
            f"{run} has no exported policy yet; expected {policy} (written with every checkpoint)"
        )
    checked_files(run)
    base = Path.cwd()
    state = read_state(run)
    commits = state.models if state else None
    config, _ = pin_models(load_config(run / "config.yaml"), base, console, commits=commits)
    prepared = prepare(config, base=base)
    prompts = prepared.data.heldout
    if not prompts:
        raise ConfigError(f"{run}: the campaign has no prompts.heldout to compare on")
    before = _answer(prepared, local_directory(config.policy.model, base))
    after = _answer(prepared, policy)
    figures = {
        "before": interval(before.scores),
        "after": interval(after.scores),
        "difference": interval(after.scores - before.scores),
    }
    _print(prompts, before, after, figures, console)
    page = _page(config, prompts, before, after, figures, read_metrics(run))
    write_atomic(run / PAGE, page.encode())
    print_plain(console, f"page: {run / PAGE}")


def _answer(prepared: Prepared, model: Path) -> Answers:
    """Complete and score the held-out prompts with one model."""
    from rayhf.rollout.env import engine_env

    config = prepared.config
    device = config.cluster.device
    os.environ |= engine_env(device, config.rollout.threads)
    from rayhf.rollout.engine import RolloutEngine

    prompts = prepared.data.heldout
    engine = RolloutEngine(
        model,
        config.rollout,
        dtype=config.policy.dtype,
        max_length=prepared.max_length,
        seed=config.seed,
        device=device,
    )
    try:
        completions = engine.generate(_requests(config, prompts), version=0)
    finally:
        engine.close()
    return Answers(
        texts=[[completion.text for completion in each] for each in completions],
        scores=_score(config, prompts, completions),
    )


def _requests(config: CampaignConfig, prompts: Sequence[Prompt]) -> list[GenerateRequest]:
    sampling = Sampling(max_tokens=config.rollout.max_tokens, stop=config.rollout.stop)
    return [
        GenerateRequest(
            prompt_id=prompt.prompt_id,
            number=0,
            token_ids=prompt.token_ids,
            sampling=sampling,
            seeds=tuple(
                derive_seed(config.seed, "compare", prompt.prompt_id, i) for i in range(SAMPLES)
            ),
        )
        for prompt in prompts
    ]


def _score(
    config: CampaignConfig,
    prompts: Sequence[Prompt],
    completions: Sequence[tuple[Completion, ...]],
) -> FloatArray:
    entries = config.scorer.evaluate or config.scorer.train
    setup = ScorerSetup(base=Path.cwd(), device="cuda" if config.cluster.device == "gpu" else "cpu")
    scorer = build_scorer(entries, setup)
    try:
        # One completion per request: a scorer may compare those of one request.
        outcomes = scorer.score(
            [
                ScoreRequest(prompt=prompt, completions=(replace(completion, index=0),))
                for prompt, each in zip(prompts, completions, strict=True)
                for completion in each
            ]
        )
    finally:
        scorer.close()
    values = []
    for (outcome,) in outcomes:
        if not isinstance(outcome, Scored):
            raise ConfigError(f"a held-out completion could not be scored: {outcome.reason}")
        values.append(outcome.value)
    return np.asarray(values, dtype=np.float32).reshape(len(prompts), -1)


def interval(scores: FloatArray) -> tuple[float, float, float]:
    """Return the mean and a 95 % interval: bootstrap over prompts (Efron 1979), fixed seed."""
    by_prompt = scores.mean(1)
    draws = np.random.default_rng(0).integers(len(by_prompt), size=(_RESAMPLES, len(by_prompt)))
    low, high = np.quantile(by_prompt[draws].mean(1), (0.025, 0.975))
    return float(by_prompt.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------------ output

Figures = Mapping[str, tuple[float, float, float]]


def _print(
    prompts: Sequence[Prompt],
    before: Answers,
    after: Answers,
    figures: Figures,
    console: Console,
) -> None:
    table = Table("held-out score", "mean", "95 % interval", title=f"{len(prompts)} prompts")
    for name, (mean, low, high) in figures.items():
        table.add_row(name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    samples = Table("prompt", "before", "after", title="first samples", show_lines=True)
    for index in range(min(_SHOWN, len(prompts))):
        cells = [prompts[index].messages[-1]["content"]]
        cells += [
            f"[{answers.scores[index][0]:.2g}] {answers.texts[index][0]}"
            for answers in (before, after)
        ]
        samples.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(samples)


def _page(
    config: CampaignConfig,
    prompts: Sequence[Prompt],
    before: Answers,
    after: Answers,
    figures: Figures,
    history: Sequence[Mapping[str, float]],
) -> str:
    """Return a self-contained HTML page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, subplot_titles=("training", "held-out score"))
    lines = [line for line in history if "scorer/reward_mean" in line]
    for name in ("scorer/reward_mean", "rollout/mismatch_kl", "reference/kl"):
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        shown = True if name == "scorer/reward_mean" else "legendonly"
        x, y = zip(*points, strict=True) if points else ((), ())
        figure.add_trace(go.Scatter(x=x, y=y, name=name, visible=shown), row=1, col=1)
    names = ["before", "after"]
    means = [figures[name][0] for name in names]
    error = {
        "array": [figures[name][2] - figures[name][0] for name in names],
        "arrayminus": [figures[name][0] - figures[name][1] for name in names],
    }
    figure.add_trace(go.Bar(x=names, y=means, error_y=error, showlegend=False), row=1, col=2)
    rows = "".join(
        f"<tr><td>{escape(plain(prompt.messages[-1]['content']))}</td>"
        + "".join(
            f"<td>{answers.scores[index][0]:.2g}</td>"
            f"<td>{escape(plain(answers.texts[index][0]))}</td>"
            for answers in (before, after)
        )
        + "</tr>\n"
        for index, prompt in enumerate(prompts)
    )
    picture = figure.to_html(full_html=False, include_plotlyjs=True)
    title = escape(plain(f"{config.algorithm.type} of {config.policy.model}"))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:4px;vertical-align:top;"
        "border-bottom:1px solid #ccc;text-align:left;white-space:pre-wrap}</style>"
        f"<h1>{title}</h1>{picture}<table><tr><th>prompt</th><th>score</th><th>before</th>"
        f"<th>score</th><th>after</th></tr>{rows}</table>\n"
    )
