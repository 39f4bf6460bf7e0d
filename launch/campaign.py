"""`rayhf run`, from a valid config to an exit.

Preflight, run directory, Ray, actors, the loop, and a summary at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.placement_group import nodes_now
from actors.ray_internals import dead_processes
from actors.remote import errors_translated
from launch.assemble import ActorSet, actor_specs_of
from launch.interrupt import Interrupt
from launch.local import ray_cluster
from launch.models import pin_models
from launch.serve import control_served
from launch.summary import summary
from launch.view import LiveView, placement_table
from rayhf.algorithms.base import (
    TakesLabels,
    TakesThumbs,
    load_state,
    population_of,
    state_of,
)
from rayhf.campaign.controller import Controller
from rayhf.campaign.gc_tuning import gc_tuned
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
from rayhf.monitoring.tracking import tracked
from rayhf.planning.local_checks import check_local
from rayhf.planning.placement import ActorSpec
from rayhf.planning.precision import precision_warning
from rayhf.planning.preflight import Prepared, overlap, prepare
from rayhf.planning.quantized import with_quantized_base
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.state import read_state
from rayhf.run_dir.store import RunDir

_WATCH_S = 1.0


def run_campaign(
    config: CampaignConfig, console: Console, lock: RunLock, *, interrupt: Interrupt | None = None
) -> None:
    """Start or continue the campaign in `run.dir`. Raises the errors of rayhf.errors."""
    base = Path.cwd()
    interrupt = interrupt or Interrupt()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    check_local(config, base=base)
    known = read_state(config.run.dir)
    pinned, commits = pin_models(config, base, console, commits=known.models if known else None)
    prepared = prepare(pinned, base=base)
    if shared := overlap(prepared):
        console.print(
            f"warning: {shared} held-out prompts are also training prompts", style="yellow"
        )
    if warning := precision_warning(pinned, prepared.derived, base):
        console.print(f"warning: {warning}", style="yellow")
    store = RunDir(
        config,
        lock,
        takes_labels=isinstance(prepared.algorithm, TakesLabels),
        takes_thumbs=isinstance(prepared.algorithm, TakesThumbs),
        population=population_of(prepared.algorithm),
        models=commits,
    )
    try:
        store.record_datasets(prepared.data.commits)
        finished = store.state.iteration >= config.run.iterations
        if finished and store.state.state == "done" and store.has_policy():
            _show_result(config, console)
            say(
                f"{config.run.dir} already has {store.state.iteration} of {config.run.iterations} "
                "iterations: nothing to do"
            )
            return
        store.check_paused()
        prepared = with_quantized_base(prepared, base=base)
        specs = actor_specs_of(config, prepared.algorithm)
        with (
            control_served(store.path, config.service, base=base, console=console),
            ray_cluster(config.cluster.address, cpus=sum(spec.cpus for spec in specs)),
            _placement_shown(specs, console),
            LiveView(console, iterations=config.run.iterations, task=config.prompts.task) as view,
            tracked(event_log := EventLog(store, view), config, logs=store.attempt) as observer,
            # Last: Ray and other libraries set handlers of their own while they start.
            interrupt.on_signals(),
            errors_translated(name="the Ray cluster", phase="campaign"),
        ):
            asyncio.run(
                _run_until_done(
                    prepared, store, observer, event_log.beat(), base=base, interrupt=interrupt
                )
            )
        _show_result(config, console)
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


def _show_result(config: CampaignConfig, console: Console) -> None:
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    console.print(summary(config.run.dir, config.prompts.task))
    say(f"policy: {config.run.dir / 'policy'}")
    say(f"curves, samples and pairs as a page: rayhf report {config.run.dir}")


@contextmanager
def _placement_shown(specs: Sequence[ActorSpec], console: Console) -> Iterator[None]:
    """Print a table of nodes and actors where an actor has no place; the error is one line."""
    try:
        yield
    except PlacementError:
        console.print(placement_table(specs, nodes_now()))
        raise


async def _run_until_done(
    prepared: Prepared,
    store: RunDir,
    observer: Observer,
    beat: Coroutine[Any, Any, None],
    *,
    base: Path,
    interrupt: Interrupt,
) -> None:
    """Run the campaign until it is done or interrupted; `beat` writes the heartbeat.

    A lost engine or scorer is replaced beneath the controller. When a learner is lost, or a wait
    passes its limit, all actors are restarted from the last commit, with the journal's responses:
    at most run.restarts times without a new commit in between.
    """
    task = asyncio.current_task()
    assert task is not None
    interrupt.bind(asyncio.get_running_loop(), task)
    heartbeat = asyncio.create_task(beat, name="heartbeat")
    lost: list[str] = []
    """Processes of a local cluster whose loss ended the campaign."""
    watch = asyncio.create_task(_watch_cluster(lost, task), name="cluster watch")
    initial = deepcopy((state_of(prepared.algorithm), prepared.data.evaluation_state()))
    restarts = 0
    committed = store.state.iteration
    try:
        while True:
            try:
                await _run_with_actors(
                    prepared,
                    store,
                    observer,
                    base=base,
                    ended=lost,
                    again=restarts > 0 or store.state.checkpoint is not None,
                )
                return
            except (ActorLostError, DeadlineError) as error:
                if store.state.iteration > committed:
                    restarts = 0
                    committed = store.state.iteration
                restarts += 1
                if restarts > prepared.config.run.restarts or store.state.state == "new":
                    raise
                observer.event(
                    "fault", f"restarting all actors from iteration {committed}: {error}"
                )
                load_state(prepared.algorithm, deepcopy(initial[0]))
                prepared.data.load_evaluation_state(deepcopy(initial[1]))
    except asyncio.CancelledError:
        if lost:
            raise ActorLostError(
                f"Ray's {', '.join(lost)} on this machine ended; everything it ran is lost"
            ) from None
        raise InterruptedRunError(
            f"interrupted; {store.path} is committed up to iteration {store.state.iteration} of "
            f"{prepared.config.run.iterations}, the same command continues"
        ) from None
    finally:
        interrupt.end()
        for background in (heartbeat, watch):
            background.cancel()
        # An error of the heartbeat is one of the disk, which the campaign meets itself.
        await asyncio.gather(heartbeat, watch, return_exceptions=True)


async def _watch_cluster(lost: list[str], campaign: asyncio.Task[None]) -> None:
    """Cancel the campaign when a process of the cluster that it started ends, and say which.

    Ray itself would let every call wait for its deadline.
    """
    while not lost:
        await asyncio.sleep(_WATCH_S)
        lost += dead_processes()
    campaign.cancel()


async def _run_with_actors(
    prepared: Prepared,
    store: RunDir,
    observer: Observer,
    *,
    base: Path,
    ended: Sequence[str],
    again: bool,
) -> None:
    """Start the actors, run the controller, and end the actors' processes.

    `ended` names processes of the cluster that are gone: then Ray answers no call, and the actors
    end with the rest of the cluster.
    """
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
        if not ended:
            await actors.shutdown(stacks=lost)
