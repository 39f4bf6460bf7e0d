"""`rayhf check`: refuses a bad run and prints the plan."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.placement import Seat, check_available, seats
from launch.campaign import build_tiny
from launch.local import ray_cluster
from rayhf.algorithms.base import needs_frozen_reference
from rayhf.config.schema import CampaignConfig
from rayhf.preflight import Derived, check_settings, overlap, prepare


def check_config(config: CampaignConfig, console: Console, *, hardware: bool) -> None:
    """Raises ConfigError or PlacementError for a run that cannot work."""
    algorithm, derived = check_settings(config)
    found = seats(config, critic=algorithm.critic, reference=needs_frozen_reference(algorithm), policies=algorithm.policies)
    if hardware:
        build_tiny(config, console)
        prepared = prepare(config, base=Path.cwd())
        if shared := overlap(prepared):
            console.print(f"warning: {shared} held-out prompts are also training prompts", style="yellow")
        _check_cluster(config, found)
    console.print(plan_table(config, derived))
    console.print(placement_table(found))
    console.print("ok" if hardware else "ok (models, prompts, scorers and hardware not checked)")


def _check_cluster(config: CampaignConfig, found: list[Seat]) -> None:
    """Ask the cluster itself; a local CPU run needs none."""
    if config.cluster.address == "local" and config.cluster.device == "cpu":
        return
    with ray_cluster(config.cluster.address, cpus=1):
        import ray

        check_available(found, ray.nodes())


def plan_table(config: CampaignConfig, derived: Derived) -> Table:
    table = Table("derived", "value", title=f"{config.algorithm.type} in {config.run.dir}")
    for label, value in derived.table(config):
        table.add_row(label, value)
    return table


def placement_table(found: list[Seat]) -> Table:
    table = Table("actor", "GPUs", "bundle", title="placement")
    for seat in found:
        table.add_row(seat.name, f"{seat.gpus:g}", str(seat.bundle) if seat.gpus else "-")
    return table
