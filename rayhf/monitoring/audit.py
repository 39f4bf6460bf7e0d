"""The audit of a run directory: committed files are unchanged, every sample exists exactly once.

In: a run directory. Out: findings, which `rayhf verify` shows. Changes nothing and needs no Ray.
The quick audit compares names and sizes and reads a few columns; a deep one reads every file and
compares every checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.checkpoints import Checkpoint, read_checkpoint
from rayhf.run_dir.checksums import FILE as CHECKSUMS
from rayhf.run_dir.checksums import IterationChecksums, differs, read_checksums
from rayhf.run_dir.files import MANIFEST, read_bytes, sha256, verify
from rayhf.run_dir.identity import read_config
from rayhf.run_dir.names import check_links, iteration_name, numbered
from rayhf.run_dir.population import FOLDER
from rayhf.run_dir.records import METRICS
from rayhf.run_dir.state import CampaignState, read_state

_COPY = "restore it from a copy"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    problem: str
    """What is damaged and what to do; empty where the check passed."""


def audit(run: Path, *, deep: bool) -> Iterator[Finding]:
    """Check everything that a campaign committed; `deep` reads every file and every checksum.

    Raises ConfigError for what is not a run directory or has links in it, CheckpointError where
    campaign.json is damaged, StorageError for a file that cannot be read for another reason.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not a run directory")
    check_links(run)
    campaign = read_state(run)
    if campaign is None:
        raise ConfigError(f"{run} is not a run directory: there is no campaign.json in it")
    yield Finding("config.yaml", _problem(partial(read_config, run, campaign)))
    batch = _batch(run)
    newest: Checkpoint | None = None
    for finding, checkpoint in _checkpoints(run, campaign, deep=deep):
        yield finding
        newest = checkpoint or newest
    if campaign.checkpoint is not None:
        yield _last_commit(run, campaign)
    committed = campaign.iteration
    yield Finding(f"metrics of iterations 0 to {committed}", _metrics(run, committed))
    checksums, problems = read_checksums(run)
    if newest is not None and (recorded := newest.facts.get("checksums")):
        if isinstance(recorded, dict) and differs(run, recorded):
            problems.append("it is not the file that was committed")
        found = f"{'; '.join(problems)}; {_COPY}" if problems else ""
        yield Finding(CHECKSUMS, found)
    lines = _metrics_lines(run)
    for iteration in range(committed + 1 if campaign.checkpoint else 0):
        recorded_line = checksums.get(iteration)
        prompts = None if batch is None else batch + _refilled(recorded_line, lines)
        problems = [_tables(run, iteration, prompts)] if iteration else []
        problems.append(_changed(run, iteration, recorded_line, lines, deep=deep))
        problem = "; ".join(filter(None, problems))
        what = f"samples and examples of iteration {iteration}" if iteration else "iteration 0"
        yield Finding(what, problem)
    for policy in _policies(run):
        yield Finding(policy.name, _problem(partial(_check_policy, policy, contents=deep)))
    past = list(numbered(run / FOLDER, "iteration-").values())
    for policy in past:
        problem = _problem(partial(verify, policy, contents=deep))
        what = f"past policy {policy.name}"
        yield Finding(what, f"{problem}; {_COPY}" if problem else "")
    if deep:
        checkpoints = numbered(run / "checkpoints", "iteration-").values()
        folders = [*checkpoints, *_policies(run), *past]
        for file in sorted(file for folder in folders for file in folder.rglob("*.safetensors")):
            yield Finding(f"tensors of {file.relative_to(run)}", _tensors(file))


def _batch(run: Path) -> int | None:
    """Return the prompts of an iteration; None where the config is damaged."""
    try:
        return int(read_config(run)["prompts"]["batch"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def _policies(run: Path) -> list[Path]:
    """Return the directories of exported policies."""
    policy = run / "policy"
    others = [path for path in sorted(run.iterdir()) if (path / MANIFEST).exists()]
    shown = [path for path in others if not path.name.startswith(".")]
    return shown if policy in shown or not policy.exists() else [policy, *shown]


def _check_policy(policy: Path, *, contents: bool) -> None:
    try:
        verify(policy, contents=contents)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; delete {policy}, then the same `rayhf run` command exports it again"
        ) from None


def _checkpoints(
    run: Path, campaign: CampaignState, *, deep: bool
) -> Iterator[tuple[Finding, Checkpoint | None]]:
    """Yield a finding per checkpoint, and the committed one where it can be read."""
    folders = list(numbered(run / "checkpoints", "iteration-").values())
    unhealthy = [] if campaign.unhealthy is None else [run / "checkpoints" / campaign.unhealthy]
    for folder in (*folders, *unhealthy):
        checkpoint = None
        problem = ""
        try:
            checkpoint = read_checkpoint(folder, contents=deep)
        except CheckpointError as error:
            problem = f"{error}; {_COPY}, or the campaign continues from an earlier one"
        is_newest = folder.name == campaign.checkpoint
        yield Finding(f"checkpoint {folder.name}", problem), checkpoint if is_newest else None


def _last_commit(run: Path, campaign: CampaignState) -> Finding:
    name = str(campaign.checkpoint)
    folder = run / "checkpoints" / name
    if name != iteration_name(campaign.iteration) or not folder.is_dir():
        return Finding("last commit", f"campaign.json names {name}, which is missing; {_COPY}")
    try:
        same = sha256(folder / MANIFEST) == campaign.manifest
    except FileNotFoundError:
        same = False
    if not same:
        problem = f"the manifest of {name} is not the one that was committed; {_COPY}"
        return Finding("last commit", problem)
    return Finding(f"last commit {name}", "")


def _changed(
    run: Path,
    iteration: int,
    recorded: IterationChecksums | None,
    lines: dict[str, bytes],
    *,
    deep: bool,
) -> str:
    """Describe the first file of an iteration that is not as it was written."""
    if recorded is None:
        return f"{CHECKSUMS} has no checksums of iteration {iteration}"
    for name, entry in recorded["files"].items():
        try:
            size = (run / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {CHECKSUMS} says {entry['bytes']}; {_COPY}"
            if deep and sha256(run / name) != entry["sha256"]:
                return f"{name} does not have the checksum that was recorded; {_COPY}"
        except FileNotFoundError:
            return f"{name} is missing; {_COPY}"
    if recorded["metrics"] not in lines:
        return f"{METRICS}: the line of iteration {iteration} is damaged; {_COPY}"
    return ""


def _metrics_lines(run: Path) -> dict[str, bytes]:
    """Return the lines of metrics.jsonl by their SHA-256."""
    try:
        lines = read_bytes(run / METRICS).split(b"\n")
    except FileNotFoundError:
        return {}
    return {hashlib.sha256(line).hexdigest(): line for line in lines}


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return ""


def _metrics(run: Path, committed: int) -> str:
    """Describe iterations that have no line in metrics.jsonl, or several."""
    try:
        lines = read_bytes(run / METRICS).splitlines()
    except FileNotFoundError:
        return f"{METRICS} is missing; {_COPY}" if committed else ""
    counts: Counter[int] = Counter()
    for number, line in enumerate(lines, start=1):
        try:
            counts[int(json.loads(line)["iteration"])] += 1
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number < len(lines):  # the last one may be torn: it is not committed
                return f"{METRICS}: line {number} is damaged; {_COPY}"
    repeated = sorted(number for number, count in counts.items() if count > 1)
    missing = sorted(set(range(committed + 1)) - counts.keys())
    problems = {"repeated": repeated, "missing": missing}
    return "; ".join(f"{what}: {numbers[:5]}" for what, numbers in problems.items() if numbers)


def _refilled(recorded: IterationChecksums | None, lines: dict[str, bytes]) -> int:
    """Return how many prompts an iteration explored beyond prompts.batch, by its metrics."""
    line = None if recorded is None else lines.get(recorded["metrics"])
    return 0 if line is None else int(json.loads(line).get("rollout/refilled", 0))


def _tables(run: Path, iteration: int, prompts: int | None) -> str:
    """Check an iteration's samples and examples; `prompts` is the expected number of prompts.

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
    if prompts is not None and len(samples) != prompts:
        return f"{len(samples)} prompts, expected {prompts}"
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
