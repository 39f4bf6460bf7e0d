"""`rayhf run`, from a valid config to an exit: preflight, run directory, Ray, actors, the loop, the summary."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from rich.console import Console

from launch.assemble import Cast
from launch.local import ray_cluster
from launch.tracking import tracked
from launch.view import LiveView, summary
from rayhf.campaign.controller import Controller
from rayhf.campaign.observer import Observer
from rayhf.campaign.store import RunDir
from rayhf.config.schema import CampaignConfig
from rayhf.errors import InterruptedRunError
from rayhf.preflight import Prepared, overlap, prepare


def run_campaign(config: CampaignConfig, console: Console) -> None:
    """Start or continue the campaign in `run.dir`. Raises the errors of rayhf.errors."""
    base = Path.cwd()
    build_tiny(config, console)
    prepared = prepare(config, base=base)
    if shared := overlap(prepared):
        console.print(f"warning: {shared} held-out prompts are also training prompts", style="yellow")
    store = RunDir(config)
    try:
        if store.state["iteration"] >= config.run.iterations:
            console.print(
                f"{config.run.dir} already has {store.state['iteration']} of {config.run.iterations} rounds: nothing to do"
            )
            return
        if store.state["checkpoint"]:
            console.print(f"continuing {config.run.dir} after round {store.state['iteration']}")
        cast = Cast(prepared, base=base)
        with (
            ray_cluster(config.cluster.address, cpus=sum(seat.cpus for seat in cast.seats)),
            LiveView(console, iterations=config.run.iterations, task=config.prompts.task) as view,
            tracked(view, config) as observer,
        ):
            asyncio.run(_play(cast, prepared, store, observer))
        console.print(summary(config.run.dir, config.prompts.task))
        console.print(f"policy: {config.run.dir / 'policy'}", markup=False)
    finally:
        store.close()


def build_tiny(config: CampaignConfig, console: Console) -> None:
    """The tiny world a preset points into, where it is missing."""
    if config.tiny is None:
        return
    from launch.tiny import build_with_progress

    build_with_progress(config.tiny.dir, tasks=config.tiny.tasks, seed=config.tiny.seed, console=console)


async def _play(cast: Cast, prepared: Prepared, store: RunDir, observer: Observer) -> None:
    """Assemble and run, until done or told to stop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, task.cancel)
    try:
        observer.phase(store.state["iteration"], "start actors")
        roles = await cast.assemble()
        controller = Controller(
            prepared.config,
            algorithm=prepared.algorithm,
            roles=roles,
            material=prepared.material,
            store=store,
            observer=observer,
        )
        await controller.run()
    except asyncio.CancelledError:
        raise InterruptedRunError(
            f"interrupted; {store.path} is committed up to round {store.state['iteration']}, the same command continues"
        ) from None
