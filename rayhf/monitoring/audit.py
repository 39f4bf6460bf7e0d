"""Whether a run directory is whole: what was committed is there as it was written, and every sample
exists exactly once.

Reads files, changes nothing. `rayhf verify` shows the findings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.checkpoints import directory_name, read_checkpoint
from rayhf.run_dir.files import MANIFEST, sha256
from rayhf.run_dir.state import read_state


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    problem: str
    """Empty where all is well."""


def audit(run: Path, *, deep: bool) -> Iterator[Finding]:
    """Everything that can be checked without Ray; `deep` also opens every tensor.

    Raises ConfigError for no run directory, CheckpointError where campaign.json is damaged.
    """
    try:
        campaign = read_state(run)
        if campaign is None:
            raise ConfigError(f"{run} is not a run directory: there is no campaign.json in it")
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        committed, batch = campaign["iteration"], int(config["prompts"]["batch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run} is not a run directory ({error})") from None
    yield from _checkpoints(run, campaign)
    yield Finding(f"metrics of rounds 0 to {committed}", _metrics(run, committed))
    for iteration in range(1, committed + 1):
        yield Finding(f"samples and pairs of round {iteration}", _samples(run, iteration, batch))
    if deep:
        for file in sorted(
            [
                *run.glob("checkpoints/iteration-*/**/*.safetensors"),
                *run.glob("policy*/*.safetensors"),
            ]
        ):
            yield Finding(f"tensors of {file.relative_to(run)}", _tensors(file))


def _checkpoints(run: Path, campaign: dict[str, Any]) -> Iterator[Finding]:
    folders = sorted((run / "checkpoints").glob("iteration-*"))
    for folder in folders:
        yield Finding(f"checkpoint {folder.name}", _problem(partial(read_checkpoint, folder)))
    if campaign["checkpoint"] is None:
        return
    newest = run / "checkpoints" / str(campaign["checkpoint"])
    if (
        campaign["checkpoint"] != directory_name(int(campaign["iteration"]))
        or newest not in folders
    ):
        yield Finding(
            "last commit", f"campaign.json names {campaign['checkpoint']}, which is not there"
        )
    elif sha256(newest / MANIFEST) != campaign["manifest"]:
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
    try:
        lines = [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    except (OSError, ValueError) as error:
        return str(error) if committed else ""
    found = Counter(int(line["iteration"]) for line in lines)
    twice = sorted(number for number, count in found.items() if count > 1)
    lacking = sorted(set(range(committed + 1)) - found.keys())
    return "; ".join(
        f"{what}: {numbers[:5]}"
        for what, numbers in (("twice", twice), ("missing", lacking))
        if numbers
    )


def _samples(run: Path, iteration: int, batch: int) -> str:
    """Every prompt of the round once, its samples numbered from 0 without gaps, and pairs that
    point at existing samples."""
    name = f"iteration-{iteration:06d}.parquet"
    try:
        table = pq.read_table(
            run / "samples" / name, columns=["iteration", "prompt_id", "sample"]
        ).to_pylist()
        pairs = pq.read_table(
            run / "pairs" / name, columns=["prompt_id", "samples", "scalars"]
        ).to_pylist()
    except (OSError, ValueError) as error:
        return str(error)
    samples: dict[str, list[int]] = {}
    for row in table:
        if row["iteration"] != iteration:
            return f"a sample of round {row['iteration']} is among them"
        samples.setdefault(row["prompt_id"], []).append(row["sample"])
    for prompt, numbers in samples.items():
        if sorted(numbers) != list(range(len(numbers))):
            return f"prompt {prompt} has the samples {sorted(numbers)[:20]}"
    if len(samples) != batch:
        return f"{len(samples)} prompts, the round has {batch}"
    for pair in pairs:
        own = not dict(pair["scalars"]).get("iterations_back")
        known = samples.get(pair["prompt_id"], [])
        if own and any(number >= len(known) for number in pair["samples"]):
            return f"a pair of prompt {pair['prompt_id']} points at sample {max(pair['samples'])} of {len(known)}"
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
