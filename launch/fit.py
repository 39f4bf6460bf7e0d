"""`rayhf fit-scorer`: train a scorer on preference pairs with the learner's ranks.

In: a config of pairs, a model and an objective. Out: a directory that serves as a scorer, with its
held-out figures in metrics.json. All files are written beside the output and moved there at the
end: the output is a complete scorer or does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch.local import ray_cluster
from launch.models import pin_models
from launch.sanitize import print_plain
from rayhf.config.fit import FitConfig
from rayhf.errors import ConfigError, InterruptedRunError
from rayhf.planning.placement import ActorSpec
from rayhf.run_dir.files import seal, storage_errors, write_json
from rayhf.scorer.fit import (
    Figures,
    FitPlan,
    FitSet,
    mark,
    measure,
    prepare_fit,
    win_probability,
)
from rayhf.types import Batch, Example, FloatArray, derive_seed

if TYPE_CHECKING:
    from actors.learner import LearnerClient

Report = Callable[[int, dict[str, float]], None]
"""Called after every optimizer step with its number, from 1, and its metrics."""


def fit_scorer(config: FitConfig, console: Console) -> None:
    """Train a scorer and write it to `output`.

    Raises the errors of rayhf.errors; then nothing is written.
    """
    base = Path.cwd()
    output = base / config.output
    _check_output(output)
    config, _ = pin_models(config, base, console)
    plan = prepare_fit(config, base=base)
    for name, pairs in (("train", plan.train), ("test", plan.test)):
        print_plain(console, _pairs_line(name, pairs))
    started = time.monotonic()
    with _temporary_directory(output) as temporary:
        with (
            ray_cluster(config.cluster.address, cpus=_cpus(config) * config.learner.ranks),
            _progress(plan, console) as report,
        ):
            figures, train_loss = asyncio.run(
                _until_signaled(_fit(config, plan, base, temporary, report))
            )
        seconds = time.monotonic() - started
        metrics = _metrics(config, plan, figures, train_loss=train_loss, seconds=seconds)
        write_json(temporary / "metrics.json", metrics)
        seal(temporary, output, {"what": "scorer", "objective": config.objective.type})
    console.print(_table(config, figures, train_loss=train_loss, seconds=seconds))
    print_plain(console, f"scorer: {config.output}")


def _pairs_line(name: str, pairs: FitSet) -> str:
    line = f"{name}: {len(pairs.examples):,} pairs"
    if not pairs.equal + pairs.too_long:
        return line
    return f"{line}; left out: {pairs.equal} with equal completions, {pairs.too_long} too long"


async def _fit(
    config: FitConfig, plan: FitPlan, base: Path, directory: Path, report: Report
) -> tuple[Figures, float]:
    """Train, measure and export to `directory`.

    Returns held-out figures and the mean loss of the last epoch.
    """
    learner = await _start_learner(config, plan, base)
    train_loss = await _train(config, plan, learner, report)
    outputs: list[FloatArray] = []
    for start in range(0, len(plan.test.examples), config.batch):  # one deadline per slice
        examples = plan.test.examples[start : start + config.batch]
        rows = [row for example in examples for row in example.rows]
        outputs += await learner.outputs(rows, temperature=1.0)
    await learner.export(directory)
    mark(directory, config, pad_token_id=plan.pad_id)
    return measure(win_probability(config.objective, outputs)), train_loss


async def _train(config: FitConfig, plan: FitPlan, learner: LearnerClient, report: Report) -> float:
    """Train for all epochs; return the mean loss of the last one."""
    from rayhf.losses.reward import reward_loss

    loss = reward_loss(config.objective)
    step = 0
    total = 0.0
    for epoch in range(config.epochs):
        total = 0.0
        seed = derive_seed(config.seed, "fit", epoch)
        for examples in deal_pairs(plan.train.examples, batch=config.batch, seed=seed):
            metrics = await learner.step(Batch(examples=examples), loss)
            step += 1
            total += metrics["learner/loss"] * len(examples)
            report(step, metrics)
    return total / len(plan.train.examples)


def deal_pairs(
    examples: Sequence[Example], *, batch: int, seed: int
) -> Iterator[tuple[Example, ...]]:
    """Yield one epoch: a seeded permutation in slices of `batch`.

    The last one may be smaller: no pair is left out.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), batch):
        yield tuple(examples[index] for index in order[start : start + batch])


async def _start_learner(config: FitConfig, plan: FitPlan, base: Path) -> LearnerClient:
    """Place and start the ranks. Raise PlacementError where the cluster is too small."""
    from actors.environment import process_env
    from actors.learner import LearnerActor, LearnerClient
    from actors.placement_group import PlacementGroup
    from actors.supervise import SupervisedActor

    cluster = config.cluster
    specs = _rank_specs(config)
    placement_group = PlacementGroup(
        specs, grouped=cluster.device == "gpu" or cluster.address != "local"
    )
    limit_s = 0.0 if cluster.address == "local" else cluster.placement_timeout_s
    await placement_group.reserve(limit_s=limit_s, report=logging.getLogger(__name__).warning)
    env = process_env(cluster.device, _threads(config), vllm=False)
    learner = LearnerClient(
        [
            SupervisedActor(spec.name, partial(placement_group.create, LearnerActor, spec, env))
            for spec in specs
        ],
        config.learner,
        sync_dtype="float32",
        timeout_s=config.learner.collective_timeout_s,
    )
    await learner.start(
        config.model.below(base),
        head="score",
        head_size=config.objective.outputs,
        lr=config.learner.lr,
        total_steps=plan.steps,
        lora=config.lora,
        device="cuda" if cluster.device == "gpu" else "cpu",
        seed=config.seed,
    )
    return learner


def _rank_specs(config: FitConfig) -> list[ActorSpec]:
    return [
        ActorSpec(
            role="learner",
            index=rank,
            name=f"scorer learner rank {rank}",
            cpus=_cpus(config),
            gpus=1.0 if config.cluster.device == "gpu" else 0.0,
            resources=config.cluster.resources.get("learner", {}),
            bundle=rank,
        )
        for rank in range(config.learner.ranks)
    ]


def _cpus(config: FitConfig) -> float:
    """Return the CPUs of one rank, as Ray counts them."""
    return 1.0 if config.cluster.device == "gpu" else 0.25


def _threads(config: FitConfig) -> int:
    """Return the CPU threads of one rank: by default ranks share the cores."""
    return config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.ranks)


async def _until_signaled(
    work: Awaitable[tuple[Figures, float]],
) -> tuple[Figures, float]:
    """Run to the end, or until SIGTERM or SIGINT."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        raise InterruptedRunError(
            "interrupted; nothing was written, the same command starts again"
        ) from None


# ----------------------------------------------------------------------------------------- output


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(
            f"output: {output} exists and is not an empty directory; expected a new one"
        )


@contextmanager
def _temporary_directory(output: Path) -> Iterator[Path]:
    """Make a directory beside `output`; remove it at the end unless it was moved."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    with storage_errors("write", output):
        temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _metrics(
    config: FitConfig, plan: FitPlan, figures: Figures, *, train_loss: float, seconds: float
) -> dict[str, object]:
    """Return the content of metrics.json."""
    metrics: dict[str, object] = {
        **asdict(figures),
        "train_loss": train_loss,
        "seconds": seconds,
        "steps": plan.steps,
    }
    for name, pairs in (("train", plan.train), ("test", plan.test)):
        metrics[f"{name}_pairs"] = len(pairs.examples)
        metrics[f"{name}_equal"] = pairs.equal
        metrics[f"{name}_too_long"] = pairs.too_long
    metrics["config"] = config.model_dump(mode="json")
    return metrics


def _table(config: FitConfig, figures: Figures, *, train_loss: float, seconds: float) -> Table:
    table = Table("figure", "value", title=f"{config.objective.type}: {config.output.name}")
    table.columns[1].justify = "right"
    table.add_row("held-out accuracy", f"{figures.accuracy:.3f}")
    table.add_row("held-out calibration error (ECE, 15 bins)", f"{figures.calibration_error:.3f}")
    table.add_row("held-out loss, -log P(chosen wins), nats", f"{figures.likelihood_loss:.4f}")
    table.add_row("training loss, last epoch", f"{train_loss:.4f}")
    table.add_row("seconds", f"{seconds:.1f}")
    return table


@contextmanager
def _progress(plan: FitPlan, console: Console) -> Iterator[Report]:
    """Show progress: a live line in a terminal, ten plain lines elsewhere."""
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    every = max(1, plan.steps // 10)
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        line = progress.add_task("start the learner", total=plan.steps)

        def report(step: int, metrics: dict[str, float]) -> None:
            text = f"loss {metrics['learner/loss']:.4f}  accuracy {metrics['scorer/accuracy']:.3f}"
            progress.update(line, description=text, completed=step)
            if step % every == 0 and not console.is_terminal:
                print_plain(console, f"step {step}/{plan.steps}  {text}")

        yield report
