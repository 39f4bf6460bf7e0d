"""`rayhf run`, from a valid config to an exit: preflight, run directory, Ray, actors, the loop, the
summary."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.placement_group import nodes_now
from launch.assemble import ActorSet, actor_specs_of
from launch.local import ray_cluster
from launch.serve import control_served
from launch.tracking import tracked
from launch.view import LiveView, placement_table, summary
from rayhf.campaign.controller import Controller
from rayhf.campaign.gc_tuning import gc_tuned
from rayhf.config.algorithms import TAKES_LABELS
from rayhf.config.schema import CampaignConfig
from rayhf.errors import (
    ActorLostError,
    DeadlineError,
    InterruptedRunError,
    PlacementError,
    StorageError,
)
from rayhf.monitoring.event_log import EventLog
from rayhf.monitoring.observer import Observer
from rayhf.planning.placement import ActorSpec
from rayhf.planning.preflight import Prepared, overlap, prepare
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.store import RunDir


def run_campaign(config: CampaignConfig, console: Console, lock: RunLock) -> None:
    """Start or continue the campaign in `run.dir`. Raises the errors of rayhf.errors."""
    base = Path.cwd()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    build_tiny(config, console)
    prepared = prepare(config, base=base)
    if shared := overlap(prepared):
        console.print(
            f"warning: {shared} held-out prompts are also training prompts", style="yellow"
        )
    store = RunDir(config, lock, takes_labels=config.algorithm.type in TAKES_LABELS)
    try:
        if store.state.iteration >= config.run.iterations:
            say(
                f"{config.run.dir} already has {store.state.iteration} of {config.run.iterations} rounds: nothing to do"
            )
            return
        store.check_paused()
        with (
            control_served(store.path, config.service, base=base, console=console),
            ray_cluster(
                config.cluster.address, cpus=sum(seat.cpus for seat in actor_specs_of(prepared))
            ),
            _room_shown(actor_specs_of(prepared), console),
            LiveView(console, iterations=config.run.iterations, task=config.prompts.task) as view,
            tracked(recorder := EventLog(store, view), config, logs=store.attempt) as observer,
        ):
            asyncio.run(_play(prepared, store, observer, recorder.beat(), base=base))
        console.print(summary(config.run.dir, config.prompts.task))
        say(f"policy: {config.run.dir / 'policy'}")
    except BaseException as error:
        with suppress(StorageError):  # the disk may be what went wrong
            store.event(
                "end", f"{type(error).__name__}: {error}", code=getattr(error, "exit_code", 1)
            )
        raise
    else:
        store.event("end", "done", code=0)
    finally:
        store.close()


@contextmanager
def _room_shown(found: Sequence[ActorSpec], console: Console) -> Iterator[None]:
    """Where somebody has no place: who that is, and what each node has. The error itself is one
    line."""
    try:
        yield
    except PlacementError:
        console.print(placement_table(found, nodes_now()))
        raise


def build_tiny(config: CampaignConfig, console: Console) -> None:
    """The tiny world a preset points into, where it is missing."""
    if config.tiny is None:
        return
    from launch.tiny import build_with_progress

    build_with_progress(
        config.tiny.dir, tasks=config.tiny.tasks, seed=config.tiny.seed, console=console
    )


async def _play(
    prepared: Prepared,
    store: RunDir,
    observer: Observer,
    beat: Coroutine[Any, Any, None],
    *,
    base: Path,
) -> None:
    """Assemble and run, until done or told to stop. `beat` says that we are alive.

    A lost engine or scorer is replaced beneath the controller. When a learner is lost, or a wait
    passes its limit, everybody is dismissed and the campaign starts again from its last commit,
    with what the journal knows: at most run.restarts times without a new commit in between.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    told: list[int] = []

    def end(number: int) -> None:
        if not told:  # a second signal must not cut the cleaning-up short
            task.cancel()
        told.append(number)

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, end, name)
    heart = asyncio.create_task(beat, name="heartbeat")
    pristine = (
        prepared.algorithm.state_dict(),
        prepared.data.game.state_dict() if prepared.data.game else {},
    )
    restarts, committed = 0, store.state.iteration
    try:
        while True:
            try:
                await _one_life(
                    prepared,
                    store,
                    observer,
                    base=base,
                    again=restarts > 0 or store.state.checkpoint is not None,
                )
                return
            except (ActorLostError, DeadlineError) as error:
                if store.state.iteration > committed:
                    restarts, committed = 0, store.state.iteration
                restarts += 1
                if restarts > prepared.config.run.restarts or store.state.state == "new":
                    raise
                observer.event("fault", f"everybody starts again from round {committed}: {error}")
                prepared.algorithm.load_state_dict(deepcopy(pristine[0]))
                if prepared.data.game is not None:
                    prepared.data.game.load_state_dict(deepcopy(pristine[1]))
    except asyncio.CancelledError:
        raise InterruptedRunError(
            f"interrupted; {store.path} is committed up to round {store.state.iteration}, the same command continues"
        ) from None
    finally:
        heart.cancel()
        await asyncio.gather(
            heart, return_exceptions=True
        )  # what it could not write, the campaign could not write either


async def _one_life(
    prepared: Prepared, store: RunDir, observer: Observer, *, base: Path, again: bool
) -> None:
    """From hiring everybody to dismissing them."""
    observer.phase(store.state.iteration, "start actors")
    actors = ActorSet(prepared, store, observer, base=base)
    lost = False
    try:
        roles = await actors.assemble(patient=again)
        store.set_state("running")
        controller = Controller(
            prepared.config,
            algorithm=prepared.algorithm,
            roles=roles,
            data=prepared.data,
            store=store,
            observer=observer,
        )
        with gc_tuned():
            await controller.run()
    except (ActorLostError, DeadlineError):
        lost = True
        raise
    finally:
        await actors.shutdown(stacks=lost)
