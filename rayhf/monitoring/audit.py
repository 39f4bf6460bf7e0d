"""The audit of a run directory: committed files are unchanged, every sample exists exactly once.

In: a run directory. Out: findings, which `rayhf verify` shows. Changes nothing and needs no Ray.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from rayhf.config.load import read_mapping
from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.checkpoints import read_checkpoint
from rayhf.run_dir.files import MANIFEST, iteration_name, sha256
from rayhf.run_dir.state import CampaignState, read_state


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    problem: str
    """Empty where the check passed."""


def audit(run: Path, *, deep: bool) -> Iterator[Finding]:
    """Check everything that a campaign committed; `deep` also opens every tensor.

    Raises ConfigError for what is not a run directory, CheckpointError where campaign.json is
    damaged.
    """
    try:
        campaign = read_state(run)
        if campaign is None:
            raise ConfigError(f"{run} is not a run directory: there is no campaign.json in it")
        config = read_mapping(run / "config.yaml")
        batch = int(config["prompts"]["batch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run} is not a run directory ({error})") from None
    committed = campaign.iteration
    yield from _checkpoints(run, campaign)
    yield Finding(f"metrics of iterations 0 to {committed}", _metrics(run, committed))
    for iteration in range(1, committed + 1):
        yield Finding(
            f"samples and examples of iteration {iteration}", _tables(run, iteration, batch)
        )
    if deep:
        patterns = ("checkpoints/iteration-*/**/*.safetensors", "policy*/*.safetensors")
        for file in sorted(file for pattern in patterns for file in run.glob(pattern)):
            yield Finding(f"tensors of {file.relative_to(run)}", _tensors(file))


def _checkpoints(run: Path, campaign: CampaignState) -> Iterator[Finding]:
    folders = sorted((run / "checkpoints").glob("iteration-*"))
    unhealthy = [] if campaign.unhealthy is None else [run / "checkpoints" / campaign.unhealthy]
    for folder in (*folders, *unhealthy):
        yield Finding(f"checkpoint {folder.name}", _problem(partial(read_checkpoint, folder)))
    if campaign.checkpoint is None:
        return
    newest = run / "checkpoints" / campaign.checkpoint
    if campaign.checkpoint != iteration_name(campaign.iteration) or newest not in folders:
        yield Finding("last commit", f"campaign.json names {campaign.checkpoint}, which is missing")
    elif sha256(newest / MANIFEST) != campaign.manifest:
        yield Finding(
            "last commit", f"the manifest of {newest.name} is not the one that was committed"
        )
    else:
        yield Finding(f"last commit {newest.name}", "")


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return ""


def _metrics(run: Path, committed: int) -> str:
    """Describe iterations that have no line in metrics.jsonl, or several."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        counts = Counter(int(json.loads(line)["iteration"]) for line in lines)
    except (OSError, ValueError) as error:
        return str(error) if committed else ""
    repeated = sorted(number for number, count in counts.items() if count > 1)
    missing = sorted(set(range(committed + 1)) - counts.keys())
    problems = {"repeated": repeated, "missing": missing}
    return "; ".join(f"{what}: {numbers[:5]}" for what, numbers in problems.items() if numbers)


def _tables(run: Path, iteration: int, batch: int) -> str:
    """Check an iteration's samples and examples.

    Every prompt is there once, its samples are numbered from 0 without gaps, and examples refer to
    samples that exist.
    """
    name = f"{iteration_name(iteration)}.parquet"
    sample_columns = ["iteration", "prompt_id", "sample"]
    example_columns = ["prompt_id", "samples", "iterations_back"]
    try:
        rows = pq.read_table(run / "samples" / name, columns=sample_columns).to_pylist()
        examples = pq.read_table(run / "examples" / name, columns=example_columns).to_pylist()
    except (OSError, ValueError) as error:
        return str(error)
    samples: dict[str, list[int]] = {}
    for row in rows:
        if row["iteration"] != iteration:
            return f"it contains a sample of iteration {row['iteration']}"
        samples.setdefault(row["prompt_id"], []).append(row["sample"])
    for prompt, numbers in samples.items():
        if sorted(numbers) != list(range(len(numbers))):
            return f"prompt {prompt} has the samples {sorted(numbers)[:20]}"
    if len(samples) != batch:
        return f"{len(samples)} prompts, expected {batch}"
    for example in examples:
        if example["iterations_back"]:
            continue
        prompt = example["prompt_id"]
        count = len(samples.get(prompt, ()))
        last = max(example["samples"])
        if last >= count:
            return f"an example of prompt {prompt} refers to sample {last} of {count}"
    return ""


def _tensors(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                tensors.get_slice(name)[:]
    except (SafetensorError, OSError, TypeError) as error:
        return str(error)
    return ""
