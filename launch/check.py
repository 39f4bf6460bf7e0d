"""`rayhf check`: refuse a bad run and print the plan: batches, placement, memory, disk, pace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.assemble import actor_specs_of
from launch.local import ray_cluster
from launch.models import pin_models
from launch.view import placement_table
from rayhf.algorithms.base import Algorithm, TrainsCritic, needs_frozen_reference
from rayhf.algorithms.streaming import streams_reference, streams_values
from rayhf.config.schema import CampaignConfig
from rayhf.errors import PlacementError
from rayhf.planning.comparisons import comparisons_table
from rayhf.planning.host import check_hosts, host_bytes
from rayhf.planning.local_checks import check_local
from rayhf.planning.memory import GIB, Memory
from rayhf.planning.pace import seconds_per_iteration
from rayhf.planning.placement import (
    ActorSpec,
    NodeResources,
    bundles,
    crowded,
    impossible,
    pack,
)
from rayhf.planning.plan import Need, Plan, check_cache, check_disk, check_gpus
from rayhf.planning.precision import precision_warning
from rayhf.planning.preflight import check_settings, overlap, prepare, transport_of

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Stated speed of the hardware, in tokens per second."""

    engine_rate: float | None = None
    """Tokens that one engine generates per second."""
    learner_rate: float | None = None
    """Tokens that one learner rank trains on per second."""
    calibrate: bool = False
    """Run two iterations and measure."""


def check_config(config: CampaignConfig, console: Console, *, hardware: bool, pace: Pace) -> None:
    """Print the plan. Raises ConfigError or PlacementError for a run that cannot work."""
    if hardware:
        check_local(config, base=Path.cwd())
    algorithm, derived = check_settings(config)
    specs = actor_specs_of(config, algorithm)
    rows = derived.table(config)
    rows += comparisons_table(config, algorithm, derived.samples_per_iteration)
    if needs_frozen_reference(algorithm):
        rows.append(("reference", _reference(config, algorithm)))
    if isinstance(algorithm, TrainsCritic):
        rows.append(("critic", f"values {_when(streams_values(config, algorithm))}"))
    if hardware:
        config, _ = pin_models(config, Path.cwd(), console, weights=False)
        prepared = prepare(config, base=Path.cwd())
        for note in prepared.notes:
            console.print(escape(note))
        if shared := overlap(prepared):
            console.print(
                f"warning: {shared} held-out prompts are also training prompts", style="yellow"
            )
        stops = [f"{text} ({token_id})" for token_id, text in prepared.stop_tokens.items()]
        rows.append(("stop tokens", ", ".join(stops)))
        if warning := precision_warning(config, derived, Path.cwd()):
            console.print(f"warning: {warning}", style="yellow")
    plan = Plan(config, algorithm, derived, base=Path.cwd())
    with _cluster(config, hardware=hardware) as (nodes, gpu_bytes):
        console.print(
            _table(
                f"{config.algorithm.type} in {config.run.dir}",
                ("derived", "value"),
                rows,
            )
        )
        _print_placement(specs, nodes, console)
        _print_estimates(plan, specs, nodes, gpu_bytes, console, hardware=hardware, pace=pace)
    if pace.calibrate:
        from launch.calibrate import calibrate

        console.print(
            _table("measured in two iterations", ("of the second", "value"), calibrate(config))
        )
    console.print("ok" if hardware else "ok (models, prompts, scorers and hardware not checked)")


def _reference(config: CampaignConfig, algorithm: Algorithm) -> str:
    section = config.reference
    actors = (
        f"sharded over {section.ranks} ranks"
        if section.ranks > 1
        else f"{section.replicas} replica(s)"
    )
    return f"{actors}; log-probs {_when(streams_reference(config, algorithm))}"


def _when(streamed: bool) -> str:
    return "as soon as a prompt is explored" if streamed else "after the exploration"


@contextmanager
def _cluster(
    config: CampaignConfig, *, hardware: bool
) -> Iterator[tuple[list[NodeResources], float | None]]:
    """Yield the nodes that the campaign will find, and the memory of a GPU in bytes.

    A local CPU run needs no Ray for that.
    """
    stated = config.cluster.gpu_memory_gib
    gpu_bytes = stated * GIB if stated is not None else None
    if not hardware:
        yield [], gpu_bytes
    elif config.cluster.address == "local" and config.cluster.device == "cpu":
        here = {"CPU": float(os.cpu_count() or 1)}  # Ray is started with as many as it takes
        yield [NodeResources(name="this machine", total=here, free=here)], None
    else:
        with ray_cluster(config.cluster.address, cpus=1):
            from actors.placement_group import nodes_now, smallest_gpu

            gpu = config.cluster.device == "gpu"
            yield nodes_now(), (gpu_bytes or smallest_gpu()) if gpu else None


def _print_placement(
    specs: Sequence[ActorSpec], nodes: Sequence[NodeResources], console: Console
) -> None:
    """Print where each actor goes. Raises PlacementError where the nodes can never hold all."""
    console.print(placement_table(specs, nodes))
    if not nodes:
        return
    if problem := impossible(specs, nodes):
        raise PlacementError(f"no room in the cluster: {problem}")
    if None in pack(bundles(specs), nodes):
        console.print(f"warning: no room at the moment: {crowded(specs, nodes)}", style="yellow")


def _print_estimates(
    plan: Plan,
    specs: Sequence[ActorSpec],
    nodes: Sequence[NodeResources],
    gpu_bytes: float | None,
    console: Console,
    *,
    hardware: bool,
    pace: Pace,
) -> None:
    """Print memory, disk and pace.

    Raises PlacementError for what does not fit a GPU or a node, ConfigError for what does not fit
    the disk.
    """
    if not hardware and not plan.config_file.is_file():
        console.print(
            f"no estimates: {plan.config.policy.model}/config.json is missing "
            "(no weights are needed)",
            style="yellow",
        )
        return
    needs = plan.needs(specs, gpu_bytes)
    gpu = plan.config.cluster.device == "gpu"
    console.print(memory_table(needs, gpu=gpu, gpu_bytes=gpu_bytes))
    disk = plan.disk()
    free = check_disk(disk, plan.config.run.dir) if hardware else "not checked"
    engine = next((need.memory for need in needs if need.spec.role == "rollout"), None)
    sync = [] if engine is None else [("weights of one sync", _sync(plan))]
    rows: Rows = [
        *sync,
        (
            "one checkpoint, and exported models",
            f"{_gib(disk.checkpoint)} + {_gib(disk.policies)} GiB",
        ),
        ("checkpoints that stay", f"at most {disk.kept}"),
        ("samples of one iteration", f"at most {disk.samples / 2**20:,.1f} MiB"),
        ("run directory", f"at most {_gib(disk.total)} GiB; {free}"),
    ]
    if engine is not None and (not gpu or gpu_bytes is not None):
        check_cache(plan, needs)
        rows.append(
            (
                f"sequences of {plan.length} tokens in one engine's cache",
                f"{plan.sequences(engine):,.0f}",
            )
        )
    if gpu:
        rows.append(("host memory of all actors", f"{_gib(_host(plan, needs))} GiB"))
    rows += _pace_rows(plan, pace)
    console.print(_table("estimates", ("what", "how much"), rows))
    if gpu and gpu_bytes is None:
        console.print(
            "cluster.gpu_memory_gib is not set: whether this fits a GPU was not checked",
            style="yellow",
        )
    if gpu:
        for tight in check_hosts(plan, needs, nodes):
            console.print(f"warning: tight: {tight}", style="yellow")
    if gpu_bytes is not None:
        published = plan.weights() if transport_of(plan.config) == "cuda_ipc" else 0.0
        for tight in check_gpus(
            needs,
            gpu_bytes,
            colocate=plan.config.cluster.placement == "colocate",
            published=published,
        ):
            console.print(f"warning: tight: {tight}", style="yellow")


def _host(plan: Plan, needs: Sequence[Need]) -> float:
    return sum(host_bytes(plan, need) for need in needs)


def _sync(plan: Plan) -> str:
    whole = f"{_gib(plan.weights(whole=True))} GiB"
    if plan.config.policy.lora is None:
        return whole
    adapters = f"{plan.weights() / 2**20:,.1f} MiB (LoRA adapters only)"
    return f"{adapters}; {whole} when the reference moves" if plan.moves else adapters


def _pace_rows(plan: Plan, pace: Pace) -> Rows:
    seconds = seconds_per_iteration(
        plan.config,
        samples=plan.derived.samples_per_iteration,
        engine_rate=pace.engine_rate,
        learner_rate=pace.learner_rate,
    )
    if not seconds:
        return []
    overlaps = plan.config.run.max_staleness > 0
    total = max(seconds.values()) if overlaps else sum(seconds.values())
    parts = ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
    return [
        (
            "iterations per hour, without scoring, reference and sync",
            f"at least {3600 / total:,.2f} ({parts})",
        )
    ]


def memory_table(needs: Sequence[Need], *, gpu: bool, gpu_bytes: float | None) -> Table:
    """Return a table of each actor's GiB at its peak; equal actors of a role share a row."""
    of = f", of a GPU with {_gib(gpu_bytes)}" if gpu_bytes is not None else ""
    table = Table(
        "actor",
        "total",
        "largest parts",
        title=f"GiB {'per GPU' if gpu else 'per process'} at the peak, estimated{of}",
    )
    for (role, _), group in groupby(needs, key=lambda need: (need.spec.role, need.memory)):
        alike = list(group)
        name = alike[0].spec.name if len(alike) == 1 else f"{role} ({len(alike)})"
        memory = alike[0].memory
        table.add_row(name, _gib(memory.total), ", ".join(_parts(memory)))
    return table


def _parts(memory: Memory) -> list[str]:
    """Return the parts that are at least 0.01 GiB, the largest first."""
    parts = [(getattr(memory, field.name), field.name) for field in fields(Memory)]
    return [f"{name} {_gib(size)}" for size, name in sorted(parts, reverse=True) if size > GIB / 99]


def _table(title: str, columns: Sequence[str], rows: Rows) -> Table:
    table = Table(*columns, title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.2f}"
