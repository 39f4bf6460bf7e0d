"""Model card of an exported policy: what it was trained from, how, on what, and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayhf import __version__
from rayhf.config.models import ModelName
from rayhf.config.yaml_text import dump_yaml
from rayhf.evaluation.statistics import Estimate
from rayhf.run_dir.records import read_metrics
from rayhf.run_dir.state import CampaignState
from rayhf.view.evaluations import changes
from rayhf.view.run import Run

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_PUBLISHED = ("seed", "policy", "prompts", "algorithm", "rollout", "scorer", "reference", "learner")
"""Sections of the config in the card; the others say where it ran."""
_FIGURES = ("scorer/reward_mean", "reference/kl", "rollout/length_mean", "rollout/truncated")


def model_card(
    run: Path, config: Mapping[str, Any], state: CampaignState, *, title: str, adapter: bool
) -> ModelCard:
    """Return the card of a campaign's policy.

    Args:
        run: run directory, for its metrics.
        config: the campaign's config, as read from config.yaml.
        state: its committed state.
        title: heading.
        adapter: the card is of the adapter, not of the merged model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = str(config["policy"]["model"])
    commit = state.models.get(base)
    repository = ModelName(base).repository if commit else None
    algorithm = config["algorithm"]["type"]
    data = ModelCardData(
        base_model=repository,
        base_model_relation=("adapter" if adapter else "finetune") if repository else None,
        datasets=sorted(set(_datasets(config["prompts"]))) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["rayhf", "rlhf", algorithm.replace(":", ".")],
        ignore_metadata_errors=True,
    )
    facts = {
        "base model": f"{repository} at commit {commit}" if repository else "a local directory",
        "weights": _weights(config, adapter=adapter),
        "algorithm": algorithm,
        "iterations": f"{state.iteration} of {config['prompts']['batch']} prompts",
        "prompts": _sources(config["prompts"].get("train")),
        "scorers": ", ".join(_name(entry) for entry in config.get("scorer", {}).get("train") or ()),
        "made with": f"rayhf {__version__}",
    }
    published = {name: config[name] for name in _PUBLISHED if name in config}
    parts = [
        f"# {title}",
        _table(("", ""), [row for row in facts.items() if row[1]]),
        "## Figures",
        _table(("metric", "before", "after", "difference"), _figures(run)),
        "`eval/<task>/sampled` is measured on held-out prompts at temperature 1. In brackets: 95 % "
        "intervals over prompts, where there is more than one; differences are paired by prompt.",
        "## Recipe",
        f"```yaml\n{dump_yaml(published)}```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _weights(config: Mapping[str, Any], *, adapter: bool) -> str:
    lora = config["policy"].get("lora")
    if not lora:
        return "all parameters were trained"
    place = "the adapter by itself" if adapter else "the adapter is merged"
    return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}; {place}"


def _name(entry: Mapping[str, Any]) -> str:
    """Describe a scorer: its type, and the function or the model."""
    what = entry.get("function") or entry.get("model")
    return f"{entry['type']} ({what})" if what else str(entry["type"])


def _sources(value: object) -> str:
    """Describe where training prompts come from: data sets, files or types of sources."""
    sources = value if isinstance(value, list) else [value]
    keys = ("dataset", "path", "task", "type")
    named = [
        next((str(source[key]) for key in keys if source.get(key)), "")
        for source in sources
        if isinstance(source, Mapping)
    ]
    return ", ".join(filter(None, named))


def _datasets(value: object) -> Iterator[str]:
    """Yield the hub data sets that prompts come from, without their revisions."""
    if isinstance(value, Mapping):
        if isinstance(value.get("dataset"), str):
            yield value["dataset"].partition("@")[0]
        for item in value.values():
            yield from _datasets(item)
    elif isinstance(value, list):
        for item in value:
            yield from _datasets(item)


def _figures(run: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, first and last value, and change of the metrics that say what training changed.

    A change has its interval; where it has none, it is left out.
    """
    lines = read_metrics(run)
    measured = {change.metric: change for change in changes(Run(run, run.name))}
    names = {name for line in lines for name in line}
    evaluated = {
        name
        for name in names | measured.keys()
        if (name in measured or name.startswith("eval/"))
        and not name.endswith(("_s", "_low", "_high"))
    }
    for name in (*sorted(evaluated), *(name for name in _FIGURES if name in names)):
        if change := measured.get(name):
            before, after = _with_interval(change.before), _with_interval(change.after)
            yield f"`{name}`", before, after, _with_interval(change.difference)
        else:
            values = [line[name] for line in lines if name in line]
            yield f"`{name}`", f"{values[0]:.4g}", f"{values[-1]:.4g}", ""


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    known = estimate.count != 1
    bounds = f" ({estimate.low:.4g} to {estimate.high:.4g})" if known else ""
    return f"{estimate.value:.4g}{bounds}"


def _table(columns: tuple[str, ...], rows: Any) -> str:
    """Return a Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
