"""`rayhf fit-scorer`: train a scorer on preference pairs and write a directory that serves as one.

In: a valid config. Out: the directory, with held-out figures in its metrics.json. Everything is
written beside the output and moved there at the end, so that the output is a whole scorer or not
there.
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
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch.local import ray_cluster
from rayhf.config.fit import FitConfig
from rayhf.errors import ConfigError, InterruptedRunError
from rayhf.run_dir.files import seal, storage_errors, write_json
from rayhf.scorer.fit import Figures, FitPlan, mark, measure, prepare_fit, win_probability
from rayhf.types import Batch, Example, FloatArray, derive_seed

if TYPE_CHECKING:
    from actors.learner import LearnerGroup

T = TypeVar("T")
Report = Callable[[int, dict[str, float]], None]
"""Called after every optimizer step with its number from 1 and its metrics."""


def fit_scorer(config: FitConfig, console: Console) -> None:
    """Train a scorer and write it to `output`.

    Raises the errors of rayhf.errors; then nothing is written.
    """
    base = Path.cwd()
    output = base / config.output
    _check_output(output)
    plan = prepare_fit(config, base=base)
    for name, part in (("train", plan.train), ("test", plan.test)):
        line = f"{name}: {len(part.examples):,} pairs"
        if part.equal + part.too_long:
            line += f"; left out: {part.equal} with equal completions, {part.too_long} too long"
        console.print(line, markup=False, highlight=False)
    started = time.monotonic()
    with _workplace(output) as temporary:
        with (
            ray_cluster(config.cluster.address, cpus=_cpus(config) * config.learner.ranks),
            _progress(plan, console) as report,
        ):
            figures, train_loss = asyncio.run(
                _until_signal(_fit(config, plan, base, temporary, report))
            )
        seconds = time.monotonic() - started
        content = _content(config, plan, figures, train_loss=train_loss, seconds=seconds)
        write_json(temporary / "metrics.json", content)
        seal(temporary, output, {"what": "scorer", "objective": config.objective.type})
    console.print(_table(config, figures, train_loss=train_loss, seconds=seconds))
    console.print(f"scorer: {config.output}", markup=False, highlight=False)


async def _fit(
    config: FitConfig, plan: FitPlan, base: Path, directory: Path, report: Report
) -> tuple[Figures, float]:
    """Train, measure, and export to `directory`.

    Returns held-out figures and the mean loss of the last epoch.
    """
    from rayhf.losses.reward import reward_loss

    learner = await _learner(config, plan, base)
    loss = reward_loss(config.objective)
    step = 0
    epoch_loss = 0.0
    for epoch in range(config.epochs):
        epoch_loss = 0.0
        for examples in deal_pairs(
            plan.train.examples, batch=config.batch, seed=derive_seed(config.seed, "fit", epoch)
        ):
            metrics = await learner.step(Batch(examples=examples), loss)
            step += 1
            epoch_loss += metrics["learner/loss"] * len(examples)
            report(step, metrics)
    outputs: list[FloatArray] = []
    # In slices, because each call has a deadline.
    for start in range(0, len(plan.test.examples), config.batch):
        held_out = plan.test.examples[start : start + config.batch]
        rows = [row for example in held_out for row in example.rows]
        outputs += await learner.outputs(rows, temperature=1.0)
    await learner.export(directory)
    mark(directory, config, pad_token_id=plan.pad_id)
    figures = measure(win_probability(config.objective, outputs))
    return figures, epoch_loss / len(plan.train.examples)


def deal_pairs(
    examples: Sequence[Example], *, batch: int, seed: int
) -> Iterator[tuple[Example, ...]]:
    """Yield the batches of one epoch: a seeded permutation in slices of `batch`.

    The last one may be smaller: no pair is left out.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), batch):
        yield tuple(examples[index] for index in order[start : start + batch])


async def _learner(config: FitConfig, plan: FitPlan, base: Path) -> LearnerGroup:
    """Place and start the ranks. Raises PlacementError where the cluster is too small."""
    from actors.learner import LearnerGroup, RemoteLearner
    from actors.placement_group import PlacementGroup
    from actors.supervise import SupervisedActor
    from rayhf.planning.placement import ActorSpec

    cluster, gpu = config.cluster, config.cluster.device == "gpu"
    places = [
        ActorSpec(
            role="learner",
            index=rank,
            name=f"scorer learner rank {rank}",
            cpus=_cpus(config),
            gpus=float(gpu),
            resources=cluster.resources.get("learner", {}),
            bundle=rank,
        )
        for rank in range(config.learner.ranks)
    ]
    room = PlacementGroup(places, grouped=gpu or cluster.address != "local")
    limit_s = 0.0 if cluster.address == "local" else cluster.placement_timeout_s
    await room.take(limit_s=limit_s, report=logging.getLogger(__name__).warning)
    options = {
        "runtime_env": {"env_vars": _environment(config)},
        "max_restarts": 0,
        "max_task_retries": 0,
    }

    def create(seat: ActorSpec) -> Any:
        return RemoteLearner.options(
            num_cpus=seat.cpus,
            num_gpus=seat.gpus,
            resources=dict(seat.resources),
            **room.strategy(seat),
            **options,
        ).remote()

    ranks = [SupervisedActor(seat.name, partial(create, seat)) for seat in places]
    learner = LearnerGroup(
        ranks, config.learner, sync_dtype="float32", timeout_s=config.learner.collective_timeout_s
    )
    await learner.start(
        base / config.model,
        head="score",
        head_size=config.objective.outputs,
        lr=config.learner.lr,
        total_steps=plan.steps,
        lora=config.lora,
        device="cuda" if gpu else "cpu",
        seed=config.seed,
    )
    return learner


def _cpus(config: FitConfig) -> float:
    """Return the CPUs that Ray reserves for one rank."""
    return 1.0 if config.cluster.device == "gpu" else 0.25


def _environment(config: FitConfig) -> dict[str, str]:
    """Return the environment variables of a rank's process, set before it imports anything.

    On CPU the ranks share the cores.
    """
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if config.cluster.device == "cpu":
        threads = config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.ranks)
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return env


async def _until_signal(work: Awaitable[T]) -> T:
    """Run until done, or until SIGTERM or Ctrl-C."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, task.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        raise InterruptedRunError(
            "interrupted; nothing was written, the same command starts again"
        ) from None


# --- output ---------------------------------------------------------------------------------------


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(
            f"output: {output} exists and is not an empty directory; expected a new one"
        )


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """Create a directory beside `output`; it is removed at the end unless it was moved."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    with storage_errors("write", output):
        temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _content(
    config: FitConfig, plan: FitPlan, figures: Figures, *, train_loss: float, seconds: float
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    counts = {
        f"{name}_{what}": value
        for name, part in (("train", plan.train), ("test", plan.test))
        for what, value in (
            ("pairs", len(part.examples)),
            ("equal", part.equal),
            ("too_long", part.too_long),
        )
    }
    return {
        **asdict(figures),
        "train_loss": train_loss,
        "seconds": seconds,
        "steps": plan.steps,
        **counts,
        "config": config.model_dump(mode="json"),
    }


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
    """Show a live line in a terminal, ten plain lines elsewhere."""
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
                console.print(f"step {step}/{plan.steps}  {text}", markup=False, highlight=False)

        yield report
