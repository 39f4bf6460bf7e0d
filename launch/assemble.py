"""The composition root: places actors, builds the roles, hands them to the controller.

PlacementGroup first (actors/placement_group.py), then every actor is created and built side by side, and
until all are ready somebody says every few seconds who is missing. On shared GPUs engines go first
and lie down to sleep before anybody else loads.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.colocate import GpuTimeSharing, SharedLearner, SharedRollout
from actors.learner import LearnerGroup, RemoteLearner
from actors.placement_group import PlacementGroup
from actors.reference import ReferenceClient, RemoteReferenceActor
from actors.remote import wait
from actors.rollout import RemoteRollout, RolloutPool
from actors.scorer import RemoteScorerActor, ScorerClient
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import Transport, transport
from rayhf.algorithms.base import (
    Algorithm,
    TrainsCritic,
    TrainsSeveralPolicies,
    needs_frozen_reference,
    policies_of,
)
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import ScorerEntryConfig
from rayhf.monitoring.observer import Observer
from rayhf.planning.placement import ActorSpec, actor_specs, entries_of, role_of
from rayhf.planning.preflight import Prepared, transport_of
from rayhf.roles import Learner, Roles, Rollout, Scorer
from rayhf.rollout.env import engine_env
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.run_dir.store import RunDir
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.retrying import RetryingScorer

_SAY_S = 5.0
Build = Callable[[Any, int], ray.ObjectRef]
"""(actor, number): the call that builds the engine of a role's so-manieth actor."""


def threads_of(config: CampaignConfig, role: str, *, critic: bool) -> int | None:
    """CPU threads of an actor: what the config says; None leaves it to the libraries (GPU).

    Otherwise all cores for a role that works alone, and half of them for one that works beside
    another: where generation overlaps learning, where a critic learns beside the policy, and for an
    engine in any case, whose steps are many and small.
    """
    section = {
        "rollout": config.rollout,
        "reference": config.reference,
        "scorer": config.scorer,
        "evaluator": config.scorer,
    }
    wanted = getattr(section.get(role_of(role), config.learner), "threads", None)
    if wanted is not None or config.cluster.device == "gpu":
        return wanted
    cores = os.cpu_count() or 1
    alone = config.run.max_staleness == 0 and not critic and role_of(role) != "rollout"
    return cores if alone else max(1, cores // 2)


def environment(config: CampaignConfig, role: str, *, critic: bool) -> dict[str, str]:
    """Environment variables of an actor's process, set before it imports anything."""
    threads = threads_of(config, role, critic=critic)
    if role_of(role) == "rollout":
        return engine_env(config.cluster.device, threads)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if any(entry.runs_engine for entry in entries_of(config, role)):
        env |= engine_env(config.cluster.device, threads)
    if config.cluster.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return env


def actor_specs_of(config: CampaignConfig, algorithm: Algorithm) -> list[ActorSpec]:
    """Return every actor that the campaign needs. Raises ConfigError for impossible placements."""
    return actor_specs(
        config,
        critic=isinstance(algorithm, TrainsCritic),
        reference=needs_frozen_reference(algorithm),
        policies=policies_of(algorithm),
    )


class ActorSet:
    """The actors of one campaign, for one life of its learners."""

    def __init__(
        self, prepared: Prepared, store: RunDir, observer: Observer, *, base: Path
    ) -> None:
        self.prepared, self.config, self.observer, self.base = (
            prepared,
            prepared.config,
            observer,
            base,
        )
        self.epoch_guard, self.diagnosis = (
            EpochGuard(store.path, store.epoch),
            store.attempt / "stacks",
        )
        self.specs = actor_specs_of(prepared.config, prepared.algorithm)
        self.trains_critic = isinstance(prepared.algorithm, TrainsCritic)
        self.actors: list[SupervisedActor] = []
        """Everyone who was started."""
        cluster = self.config.cluster
        self.device = "cuda" if cluster.device == "gpu" else "cpu"
        self.shares = cluster.placement == "colocate"
        self.placement_group = PlacementGroup(
            self.specs, grouped=cluster.device == "gpu" or cluster.address != "local"
        )

    async def assemble(self, *, patient: bool = False) -> Roles:
        """Place and start everyone. Raises PlacementError, DeadlineError naming who did not start,
        or an engine's own error.

        `patient`: a campaign that has run here before waits up to run.start_timeout_s for nodes
        that went away.
        """
        run, cluster = self.config.run, self.config.cluster
        limit_s = (
            run.start_timeout_s
            if patient
            else 0.0
            if cluster.address == "local"
            else cluster.placement_timeout_s
        )
        await self.placement_group.take(
            limit_s=limit_s, report=partial(self.observer.event, "warn")
        )
        announcer = asyncio.create_task(self._announce(), name="who is missing")
        try:
            return await self._start()
        finally:
            announcer.cancel()

    async def _announce(self) -> None:
        while True:
            await asyncio.sleep(_SAY_S)
            missing = [f"{one.name} ({one.stage})" for one in self.actors if one.stage != "ready"]
            if missing:
                self.observer.event("start", f"waiting for: {', '.join(missing)}")

    async def _start(self) -> Roles:
        config, algorithm = self.config, self.prepared.algorithm
        timeout_s = config.run.timeout_s
        policies = policies_of(algorithm)
        engines = {policy: self._rollouts(policy) for policy in policies}
        starts = [one.start() for one in self.actors]
        learners = {policy: self._learner(_role("learner", policy)) for policy in policies}
        pools = {
            policy: RolloutPool(
                group,
                self._transport(learners[policy], group),
                places=config.rollout.max_num_seqs,
                timeout_s=timeout_s,
            )
            for policy, group in engines.items()
        }
        if self.shares:
            await _together(starts)
            await asyncio.gather(*(pool.sleep() for pool in pools.values()))
            starts = []
        started = len(self.actors)
        (scorer,) = self._scorers(
            "scorer", [config.scorer.train], {"combine": config.scorer.combine}
        )
        evaluator_scorers = config.evaluator_scorers
        evaluators = self._scorers("evaluator", list(evaluator_scorers.values()), {})
        references = self._references()
        starts += [one.start() for one in self.actors[started:]]
        starts += [
            self._start_learner(group, self._start_of(policy)) for policy, group in learners.items()
        ]
        critic = self._learner("critic") if self.trains_critic else None
        if critic:
            start = config.learner.critic_model or config.policy.model, config.learner.critic_lr
            starts += [self._start_learner(critic, start, critic=True)]
        await _together(starts)
        eval_scorers = {
            task: self._retrying(actor)
            for task, actor in zip(evaluator_scorers, evaluators, strict=True)
        }
        rollouts, trained, value = self._shared(pools, learners, critic)
        return Roles(
            rollouts=rollouts,
            learners=trained,
            scorer=self._retrying(scorer),
            evaluator=eval_scorers.pop(None, None),
            eval_scorers={task: scorer for task, scorer in eval_scorers.items() if task},
            critic=value,
            reference=ReferenceClient(references[0], timeout_s=timeout_s) if references else None,
        )

    def _shared(
        self,
        pools: Mapping[str, RolloutPool],
        learners: Mapping[str, LearnerGroup],
        critic: LearnerGroup | None,
    ) -> tuple[Mapping[str, Rollout], Mapping[str, Learner], Learner | None]:
        """Whoever shares GPUs takes turns on them."""
        if not self.shares:
            return pools, learners, critic
        turns = GpuTimeSharing(
            list(pools.values()), [*learners.values(), *([critic] if critic else [])]
        )
        return (
            {policy: SharedRollout(pool, turns) for policy, pool in pools.items()},
            {policy: SharedLearner(group, turns) for policy, group in learners.items()},
            SharedLearner(critic, turns) if critic else None,
        )

    async def shutdown(self, *, stacks: bool) -> None:
        """End everyone's process, also of who is stopped or hangs; their stacks are saved first
        where somebody wants to know."""
        for one in self.actors:
            one.retired = True
        await asyncio.gather(
            *(one.kill(stacks=stacks) for one in self.actors), return_exceptions=True
        )  # as many as can be
        self.placement_group.leave()

    def _start_of(self, policy: str) -> tuple[Path, float]:
        """The model that a policy starts from, and its learning rate."""
        if policy == "policy":
            return self.config.policy.model, self.config.learner.lr
        algorithm = self.prepared.algorithm
        assert isinstance(algorithm, TrainsSeveralPolicies)
        other = algorithm.other_policy(policy)
        return other.model or self.config.policy.model, other.lr

    def _create(
        self, role: str, remote: Any, build: Build | None, **options: Any
    ) -> list[SupervisedActor]:
        """One member of the actors for every spec of a role; `build` gets the new actor and the
        spec's number."""
        specs = [spec for spec in self.specs if spec.role == role]

        def create(spec: ActorSpec) -> Any:
            return remote.options(
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                resources=dict(spec.resources),
                runtime_env={"env_vars": environment(self.config, role, critic=self.trains_critic)},
                max_restarts=0,
                max_task_retries=0,
                **self.placement_group.strategy(spec),
                **options,
            ).remote()

        run = self.config.run

        async def built(actor: Any, number: int) -> None:
            if build is not None:
                await wait(
                    build(actor, number),
                    who=specs[number].name,
                    phase="start",
                    timeout_s=run.start_timeout_s,
                )

        started = [
            SupervisedActor(
                spec.name,
                partial(create, spec),
                partial(built, number=number),
                limits=SupervisionLimits(stall_s=run.stall_s, restarts=run.restarts),
                report=self.observer.event,
                diagnosis=self.diagnosis,
            )
            for number, spec in enumerate(specs)
        ]
        self.actors += started
        return started

    def _rollouts(self, policy: str) -> list[SupervisedActor]:
        config, role = self.config, _role("rollout", policy)
        caching = config.rollout.prefix_caching
        if caching is None:
            caching = not (config.run.is_deterministic and config.cluster.device == "cpu")
        rollout = config.rollout.model_copy(update={"prefix_caching": caching})
        model = self.base / self._start_of(policy)[0]

        def build(actor: Any, number: int) -> ray.ObjectRef:
            return actor.build.remote(
                model,
                rollout,
                dtype=config.policy.dtype,
                max_length=self.prepared.max_length,
                seed=config.seed % 2**31,
                device=config.cluster.device,
                sleeps=self.shares,
            )

        return self._create(role, RemoteRollout, build, max_concurrency=100_000)

    def _scorers(
        self, role: str, lists: Sequence[Sequence[ScorerEntryConfig]], settings: Mapping[str, Any]
    ) -> list[SupervisedActor]:
        device = self.device if any(s.gpus for s in self.specs if s.role == role) else "cpu"
        threads = threads_of(self.config, role, critic=self.trains_critic)
        setup = ScorerSetup(base=self.base, device=device, threads=threads)

        def build(actor: Any, number: int) -> ray.ObjectRef:
            return actor.build.remote(lists[number], setup, **settings)

        return self._create(role, RemoteScorerActor, build)

    def _retrying(self, actor: SupervisedActor) -> Scorer:
        scorer = ScorerClient(actor, timeout_s=self.config.run.timeout_s)
        section = self.config.scorer
        return RetryingScorer(
            scorer,
            attempts=section.attempts,
            tolerated=section.max_failed,
            report=self.observer.event,
        )

    def _references(self) -> list[SupervisedActor]:
        config = self.config

        def build(actor: Any, number: int) -> ray.ObjectRef:
            model = self.base / (config.reference.model or config.policy.model)
            return actor.build.remote(
                model,
                config.reference,
                dtype=config.policy.dtype,
                device=self.device,
                epoch_guard=self.epoch_guard,
            )

        return self._create("reference", RemoteReferenceActor, build)

    def _learner(self, role: str) -> LearnerGroup:
        run = self.config.run
        ranks = self._create(role, RemoteLearner, None)
        return LearnerGroup(
            ranks,
            self.config.learner,
            sync_dtype=self.config.policy.dtype,
            timeout_s=max(run.timeout_s, run.start_timeout_s),
            transport=transport_of(self.config),
        )

    def _transport(self, learner: LearnerGroup, engines: Sequence[SupervisedActor]) -> Transport:
        workers, timeout_s = self.config.rollout.tensor_parallel, self.config.run.timeout_s
        return transport(
            transport_of(self.config), learner, engines, workers=workers, timeout_s=timeout_s
        )

    async def _start_learner(
        self, group: LearnerGroup, start: tuple[Path, float], *, critic: bool = False
    ) -> None:
        config = self.config
        model, lr = start
        await group.start(
            self.base / model,
            epoch_guard=self.epoch_guard,
            head="value" if critic else "policy",
            lr=lr,
            total_steps=self.prepared.derived.total_steps,
            lora=None if critic else config.policy.lora,
            device=self.device,
            seed=config.seed,
        )


def _role(kind: str, policy: str) -> str:
    """The name of a policy's actors: `rollout`, or `rollout refiner`."""
    return kind if policy == "policy" else f"{kind} {policy}"


async def _together(starts: list[Coroutine[Any, Any, None]]) -> None:
    """Start side by side; the first error is raised and the rest is left to the end of the
    cluster."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
