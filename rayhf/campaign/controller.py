"""The one loop of every algorithm: explore, select, credit, train, sync, evaluate, checkpoint.

Synchronization: training on iteration i starts when its exploration has finished; weights are sent
to the engines when no exploration is in flight, or at once with rollout.in_flight_updates;
exploration of iteration i + max_staleness may start just before training on iteration i. With
max_staleness 0 the phases follow each other and the run is strictly on-policy; with 1, generation
overlaps training, and so on. There is no second, asynchronous loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

from rayhf.algorithms.base import (
    Algorithm,
    KeepsState,
    frozen_policies,
    generates,
    load_state,
    policies_of,
    state_of,
)
from rayhf.blocking import in_thread, release
from rayhf.campaign.data import CampaignData
from rayhf.campaign.evaluator import Evaluator
from rayhf.campaign.iteration import ExploredIteration, IterationExplorer
from rayhf.campaign.persistence import check_data, installed_packages, load_roles, save_roles
from rayhf.campaign.training import Trainer
from rayhf.config.schema import CampaignConfig
from rayhf.errors import InterruptedRunError, PausedError
from rayhf.exploration.metrics import exploration_metrics, scorer_counts, source_metrics
from rayhf.exploration.token_ages import token_ages
from rayhf.monitoring.guards import Alarm, check_guards
from rayhf.monitoring.observer import Observer
from rayhf.roles import CountsCalls, FollowsPolicy, Roles, TimesUpdates
from rayhf.run_dir.identity import config_changes
from rayhf.run_dir.state import CheckpointState
from rayhf.run_dir.store import RunDir
from rayhf.types import Sampling, WeightSnapshot

_POLL_S = 1.0


class Controller:
    """Runs one campaign from its last commit to `run.iterations`."""

    def __init__(
        self,
        config: CampaignConfig,
        *,
        algorithm: Algorithm,
        roles: Roles,
        data: CampaignData,
        store: RunDir,
        observer: Observer,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.roles = roles
        self.data = data
        self.store = store
        self.observer = observer
        self.iteration = 0
        self.versions = dict.fromkeys((*policies_of(algorithm), *frozen_policies(algorithm)), 0)
        self.sampling = Sampling(
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
        )
        self._explorer = IterationExplorer(
            config,
            algorithm=algorithm,
            roles=roles,
            data=data,
            store=store,
            observer=observer,
            versions=self.versions,
            sampling=self.sampling,
        )
        self._evaluator = Evaluator(self._explorer)
        self._trainer = Trainer(
            config,
            algorithm=algorithm,
            roles=roles,
            store=store,
            observer=observer,
            sampling=self.sampling,
            timed=self._timed,
        )
        self._explorations: dict[int, asyncio.Task[ExploredIteration]] = {}
        self._seconds: dict[str, float] = {}
        self._alarmed: set[tuple[str, str]] = set()
        self._muted = algorithm.muted_guards.union(
            *(evaluation.muted_guards for evaluation in data.evaluations.values())
        )

    async def run(self) -> None:
        """Run to the last iteration.

        Raises the first error of any role; what was committed stays, and the same call continues.
        """
        await self._restore()
        if self.iteration >= self.config.run.iterations:
            return
        await self._verify_initial_weights()
        if self.iteration == 0:
            await self._keep_policy(0)
            metrics = {"iteration": 0, **self._version_metrics(), **await self._evaluate(0)}
            await self.store.tables_written()
            self._report(metrics)
        try:
            for iteration in range(self.iteration + 1, self.config.run.iterations + 1):
                await self._run_iteration(iteration)
        finally:
            await _cancel(list(self._explorations.values()))
            await self._trainer.annotator.close()
            await self.store.tables_written()

    # ---------------------------------------------------------------- iterations

    async def _run_iteration(self, iteration: int) -> None:
        started = time.monotonic()
        self._seconds = {}
        last = self.config.run.iterations
        self._start_explorations(iteration)
        explored = await self._explorations.pop(iteration)
        metrics: dict[str, float] = {"iteration": iteration, **explored.counts}
        self.store.write_samples(iteration, explored.groups)
        # In threads: meanwhile the engines get requests of the next iteration.
        metrics |= await asyncio.to_thread(
            exploration_metrics, explored.groups, self.versions["policy"]
        )
        if self.config.rollout.in_flight_updates:
            metrics |= await asyncio.to_thread(
                token_ages,
                explored.groups,
                self.versions["policy"],
                limit=self.config.run.max_staleness,
            )
        selected = await self._trainer.select(iteration, explored.groups, metrics)
        metrics |= await asyncio.to_thread(source_metrics, explored.groups, selected.examples)
        seconds = explored.seconds
        # The groups are most of an iteration's memory: free them before training, while the next
        # iteration may already be exploring.
        await release(explored.groups)
        del explored
        changed = await self._trainer.learn(iteration, selected, metrics)
        await release(selected.examples)
        for policy in changed:
            self.versions[policy] += 1
        if changed or self._reference_mix(iteration) is not None:
            metrics |= await self._sync(iteration, changed)
        self.iteration = iteration
        await self._keep_policy(iteration)
        metrics |= self._version_metrics()
        if isinstance(self.algorithm, KeepsState):
            self.algorithm.observe(metrics)
        metrics |= await self._evaluate(iteration)
        metrics |= await scorer_counts(self.roles)
        if isinstance(self.roles.scorer, FollowsPolicy):
            await self.roles.scorer.observe(metrics)
        if isinstance(self.roles.reference, CountsCalls):
            metrics |= await self.roles.reference.take_counts()
        every = self.config.run.checkpoint_every
        due = iteration == last or bool(every and iteration % every == 0)
        metrics |= {f"time/{name}_s": s for name, s in {**seconds, **self._seconds}.items()}
        # An iteration that has metrics has tables, and so has one that is committed.
        await self.store.tables_written()
        metrics["time/iteration_s"] = time.monotonic() - started
        self._report(metrics)
        if pausing := self._check_guards():
            await self._commit_unhealthy(pausing)
        requested = self.store.requested()
        if due or requested != "run":
            await self._checkpoint(iteration, metrics)
        if requested != "run" and iteration < last:
            await self._apply_operator_request()

    def _start_explorations(self, iteration: int) -> None:
        """Start the explorations of this iteration and of those that may run ahead of it."""
        newest = min(iteration + self.config.run.max_staleness, self.config.run.iterations)
        for ahead in range(iteration, newest + 1):
            if ahead not in self._explorations:
                self._explorations[ahead] = asyncio.create_task(
                    self._explorer.explore(ahead, self._trainer.annotator.stream),
                    name=f"exploration {ahead}",
                )

    def _check_guards(self) -> list[Alarm]:
        """Report the guards' alarms; return those that pause the campaign."""
        accepted = self.store.state.accepted
        alarms = check_guards(self.store.history, self.config.guards, muted=self._muted)
        for alarm in alarms:
            if (alarm.guard, alarm.level) not in self._alarmed:
                self.observer.event(alarm.level, f"guard {alarm.guard}: {alarm.message}")
        self._alarmed = {(alarm.guard, alarm.level) for alarm in alarms}
        return [alarm for alarm in alarms if alarm.level == "pause" and alarm.guard not in accepted]

    async def _commit_unhealthy(self, alarms: Sequence[Alarm]) -> NoReturn:
        """Save the iteration beside the healthy checkpoints, so that an operator can accept it.

        Raises PausedError.
        """
        self.observer.phase(self.iteration, "checkpoint")
        directory = self.store.checkpoints.begin()
        await save_roles(directory, self.roles, self.algorithm)
        reason = alarms[0].message
        await in_thread(
            self.store.commit_unhealthy,
            directory,
            await self._state(),
            reason=reason,
            guards=[alarm.guard for alarm in alarms],
        )
        raise PausedError(
            f"paused by guard {alarms[0].guard}: {reason}. "
            f"{self.store.state.ways_to_continue(self.store.path)}"
        )

    async def _apply_operator_request(self) -> None:
        """Pause until the operator resumes the campaign, or stop it; everything is committed."""
        if self.store.requested() == "pause":
            self.store.set_state("paused", reason="requested by `rayhf pause`")
            self.observer.event(
                "pause",
                f"paused after iteration {self.iteration}; "
                f"`rayhf unpause {self.store.path}` continues",
            )
            while self.store.requested() == "pause":
                self.observer.phase(self.iteration, "paused")
                await asyncio.sleep(_POLL_S)
        if self.store.requested() == "stop":
            self.store.acknowledge()
            raise InterruptedRunError(
                f"stopped after iteration {self.iteration} by `rayhf stop`; "
                "the same command continues"
            )
        self.store.set_state("running")
        self.observer.event("unpause", f"continuing with iteration {self.iteration + 1}")

    # ---------------------------------------------------------------------- sync

    async def _sync(self, iteration: int, changed: set[str]) -> dict[str, float]:
        """Send the new weights to the engines that use them, and to the reference when it is due.

        The reference takes the policy's weights also after an iteration that did not change them:
        earlier ones did. Waits until no exploration is in flight, except with in-flight updates.
        Returns metrics of the sync.
        """
        metrics: dict[str, float] = {}
        self.observer.phase(iteration, "sync")
        if self._explorations and not self.config.rollout.in_flight_updates:
            await asyncio.wait(self._explorations.values())
        async with self._timed("sync"):
            refresh = self._reference_mix(iteration)
            for policy in sorted(changed | ({"policy"} if refresh is not None else set())):
                mix = refresh if policy == "policy" else None
                engines = policy in changed and self._uses_engines(iteration)
                if mix is None and not engines:
                    continue
                snapshot = await self._push(policy, stored=mix is not None, engines=engines)
                if mix is not None and self.roles.reference is not None:
                    await self.roles.reference.update(snapshot, mix=mix)
                measured = await self.roles.learners[policy].sync_metrics()
                rollout = self.roles.rollouts.get(policy)
                if engines and isinstance(rollout, TimesUpdates):
                    name = "time/engine_paused_s"
                    metrics[name] = max(metrics.get(name, 0.0), rollout.paused_s)
                for name, value in measured.items():
                    own = name if policy == "policy" else f"{policy}/{name}"
                    metrics[own] = value
        return metrics

    async def _verify_initial_weights(self) -> None:
        """Check that engines and learner loaded the same weights; a sync does it for later ones."""
        learners = self.roles.learners
        for policy, rollout in self.roles.rollouts.items():
            # Engines of a frozen policy hold what the learner of "policy" starts from.
            source = policy if policy in learners else "policy"
            if self.versions[source] == 0:
                await rollout.verify(await learners[source].probe())

    async def _push(
        self, policy: str, *, stored: bool = False, engines: bool = True
    ) -> WeightSnapshot:
        snapshot = await self.roles.learners[policy].publish(self.versions[policy], stored=stored)
        if engines:
            await self.roles.rollouts[policy].update(snapshot)
        return snapshot

    def _uses_engines(self, iteration: int) -> bool:
        """Return whether anything is generated with the weights of `iteration`."""
        return generates(self.algorithm) or self._evaluator.generates(
            self._evaluator.due(iteration)
        )

    def _reference_mix(self, iteration: int) -> float | None:
        """Return the share of the new weights that the reference takes; None where it stays."""
        schedule = self.algorithm.reference
        if self.roles.reference is None or schedule is None:
            return None
        return schedule.mix(iteration, self._trainer.steps_per_iteration)

    # ---------------------------------------------------------------- evaluation

    async def _evaluate(self, iteration: int) -> dict[str, float]:
        tasks = self._evaluator.due(iteration)
        if not tasks:
            return {}
        self.observer.phase(iteration, "evaluate")
        async with self._timed("evaluate"):
            return await self._evaluator.measure(
                tasks, iteration=iteration, restore_scorer=not self._explorations
            )

    def _version_metrics(self) -> dict[str, float]:
        return {f"{policy}/version": float(version) for policy, version in self.versions.items()}

    # --------------------------------------------------------------- checkpoints

    async def _state(self) -> CheckpointState:
        return CheckpointState(
            iteration=self.iteration,
            versions=self.versions,
            algorithm=state_of(self.algorithm),
            scorer=await self.roles.scorer.state_dict(),
            evaluations=self.data.evaluation_state(),
            prompts=self.data.prompts.fingerprint,
            pairs=self.data.pairs,
            inputs=dict(self.data.inputs),
            functions=dict(self.data.functions),
            config=self.config.model_dump(mode="json"),
            packages=installed_packages(),
        )

    async def _checkpoint(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.observer.phase(iteration, "checkpoint")
        directory = self.store.checkpoints.begin()
        await save_roles(directory, self.roles, self.algorithm)
        # Exported before the commit, so that a finished campaign always has its policy.
        await self._export()
        finished = iteration >= self.config.run.iterations
        await in_thread(  # reads all files: minutes for a large model
            self.store.commit,
            directory,
            await self._state(),
            campaign_state="done" if finished else "running",
            score=metrics.get(f"eval/{self.config.prompts.task}/sampled"),
        )
        self.observer.event("commit", f"iteration {iteration} is committed")

    async def _export(self) -> None:
        for policy in self.roles.learners:
            exported = self.store.policy_directory(policy)
            await self._export_into(exported, policy)
            await in_thread(self.store.publish_policy, exported, self.iteration, policy)

    async def _export_into(self, directory: Path, policy: str) -> None:
        await self.roles.learners[policy].export(directory)
        for name, text in self.data.exported_files.items():
            (directory / name).write_text(text, encoding="utf-8")

    async def _keep_policy(self, iteration: int) -> None:
        """Export the policy into the population, where the algorithm reads it later."""
        if not self.store.population.population.is_due(iteration):
            return
        async with self._timed("population"):
            exported = self.store.population.begin()
            await self._export_into(exported, "policy")
            await in_thread(self.store.keep_past_policy, exported, iteration)

    async def _restore(self) -> None:
        """Continue from the newest verified checkpoint, or start where none was ever committed."""
        checkpoint = await in_thread(self.store.latest)
        if checkpoint is None:
            self.store.rewind(None)
            return
        state = checkpoint.state
        check_data(state, self.data)
        self.store.rewind(checkpoint)
        self.iteration = state.iteration
        self.versions.update(state.versions)
        self.observer.phase(self.iteration, "restore")
        load_state(self.algorithm, state.algorithm)
        await self.roles.scorer.load_state_dict(state.scorer)
        self.data.load_evaluation_state(state.evaluations)
        await load_roles(checkpoint.directory, self.roles, self.algorithm)
        await in_thread(self.store.population.check_kept, self.iteration)
        if self.iteration >= self.config.run.iterations:
            # Not exported yet where an operator accepted the last iteration after a guard's pause.
            await self._export()
            self.store.set_state("done")
            return
        for policy, version in self.versions.items():
            if version and policy in self.roles.rollouts:
                await self._push(policy)
        for name, before in state.functions.items():
            if before != self.data.functions.get(name, before):
                self.observer.event(
                    "warn",
                    f"{name} changed since iteration {self.iteration}: figures before and after "
                    "are not of the same function; to compare, choose another run.dir",
                )
        where = f"after iteration {self.iteration}, from {checkpoint.directory.name}"
        changes = config_changes(state.config, self.config)
        self.observer.event("continue", "; ".join([where, *changes]))

    # ------------------------------------------------------------------- helpers

    def _report(self, metrics: Mapping[str, float]) -> None:
        self.store.append_metrics(metrics)
        self.observer.metrics(metrics)

    @asynccontextmanager
    async def _timed(self, name: str) -> AsyncIterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
