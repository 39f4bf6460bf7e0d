"""Composition root: place the actors, build the roles, hand them to the controller.

Synchronization: the placement group is reserved first, then all actors are created and built in
parallel; until all are ready, an event every few seconds names those that are not. On shared GPUs
the engines are built first, one policy's after the other's, and sleep before the learners load.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray

from actors.colocate import GpuTimeSharing, SharedLearner, SharedRollout
from actors.environment import process_env
from actors.learner import LearnerActor, LearnerClient
from actors.placement_group import PlacementGroup, nodes_now
from actors.process import CONCURRENCY_GROUPS
from actors.reference import ReferenceActor, ReferencePool
from actors.remote import wait
from actors.rollout import RolloutActor, RolloutPool
from actors.scorer import ScorerActor, ScorerClient
from actors.sharded_reference import ShardedReference, ShardedReferenceActor
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import ObjectStore, Transport, make_transport
from rayhf.algorithms.base import (
    Algorithm,
    OtherPolicy,
    TrainsCritic,
    TrainsSeveralPolicies,
    frozen_policies,
    generates,
    needs_frozen_reference,
    policies_of,
)
from rayhf.config.models import ModelName
from rayhf.config.schema import CampaignConfig, LearnerConfig
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.environments.process import EnvironmentHost
from rayhf.environments.scorer import EpisodeScorer
from rayhf.monitoring.observer import Observer
from rayhf.planning.placement import (
    ActorSpec,
    actor_specs,
    cores_per_gpu,
    entries_of,
    role_of,
)
from rayhf.planning.preflight import Prepared, transport_of
from rayhf.roles import Learner, Reference, Roles, Rollout, Scorer
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.run_dir.store import RunDir
from rayhf.scorer.none import NoScorer
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.retrying import RetryingScorer

_REPORT_S = 5.0
"""Seconds between two events that name the actors that are not ready."""
Build = Callable[[Any, int], ray.ObjectRef]
"""(actor handle, index within its role) -> the call that builds the actor's engine."""


def threads_of(
    config: CampaignConfig, role: str, *, critic: bool, gpu_cores: int | None = None
) -> int | None:
    """Return the CPU threads of an actor; None leaves it to Ray and the libraries.

    The config's number, where it gives one. On GPU `gpu_cores`, the cores that one GPU's actors
    have: a learner's offloaded optimizer runs on them, and roles without a GPU. An engine needs
    none. On CPU all cores for a role that works alone, and half of them for one that works beside
    another: where generation overlaps learning, and where a critic learns beside the policy.
    Engines share their role's cores, and so do the reference's actors. An engine has at most half
    of the cores: its steps are many and small, and their threads wait for each other, so that on a
    busy machine an engine with a thread on every core can be five times slower than with half.
    """
    sections = {
        "rollout": config.rollout,
        "reference": config.reference,
        "scorer": config.scorer,
        "evaluator": config.scorer,
    }
    threads: int | None = getattr(sections.get(role_of(role), config.learner), "threads", None)
    if threads is not None:
        return threads
    if config.cluster.device == "gpu":
        return None if role_of(role) == "rollout" else gpu_cores
    cores = os.cpu_count() or 1
    actors, beside, most = 1, critic, cores
    if role == "reference":
        actors = config.reference.replicas * config.reference.ranks
        beside = critic or config.reference.stream == "on"
    elif role_of(role) == "rollout":
        actors = config.rollout.engines
        beside = config.reference.stream == "on"
        most = cores // 2
    if beside or config.run.max_staleness > 0:
        cores //= 2
    return max(1, min(cores // actors, most))


def environment(
    config: CampaignConfig, role: str, *, critic: bool, gpu_cores: int | None = None
) -> dict[str, str]:
    """Return the environment variables of an actor's process."""
    return process_env(
        config.cluster.device,
        threads_of(config, role, critic=critic, gpu_cores=gpu_cores),
        vllm=role_of(role) == "rollout"
        or any(entry.runs_engine for entry in entries_of(config, role)),
    )


def actor_specs_of(config: CampaignConfig, algorithm: Algorithm) -> list[ActorSpec]:
    """Return every actor that the campaign needs. Raises ConfigError for impossible placements."""
    return actor_specs(
        config,
        critic=isinstance(algorithm, TrainsCritic),
        reference=needs_frozen_reference(algorithm),
        policies=policies_of(algorithm),
        frozen=frozen_policies(algorithm),
        generates=generates(algorithm),
    )


class ActorSet:
    """Actors of one campaign, from their start to the next loss of a learner."""

    def __init__(
        self, prepared: Prepared, store: RunDir, observer: Observer, *, base: Path
    ) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.observer = observer
        self.base = base
        self.epoch_guard = EpochGuard(store.path, store.epoch)
        self.diagnosis = store.attempt / "stacks"
        self.specs = actor_specs_of(prepared.config, prepared.algorithm)
        self.trains_critic = isinstance(prepared.algorithm, TrainsCritic)
        self._gpu_cores: int | None = None
        """CPU cores of one GPU's actors, once the cluster is known."""
        self.actors: list[SupervisedActor] = []
        """All that were started."""
        self._environments: EnvironmentHost | None = None
        cluster = self.config.cluster
        self.device = "cuda" if cluster.device == "gpu" else "cpu"
        self.shares = cluster.placement == "colocate"
        self.placement_group = PlacementGroup(
            self.specs, grouped=cluster.device == "gpu" or cluster.address != "local"
        )

    async def assemble(self, *, patient: bool = False) -> Roles:
        """Place and start all actors, and return the roles.

        Args:
            patient: wait up to run.start_timeout_s for nodes that were lost; for a campaign that
                has run here before.

        Raises PlacementError, DeadlineError naming the actor that did not start, or an engine's own
        error.
        """
        if patient:
            limit_s = self.config.run.start_timeout_s
        elif self.config.cluster.address == "local":
            limit_s = 0.0
        else:
            limit_s = self.config.cluster.placement_timeout_s
        await self.placement_group.reserve(
            limit_s=limit_s, report=partial(self.observer.event, "warn")
        )
        self._gpu_cores = cores_per_gpu(nodes_now())
        reporter = asyncio.create_task(self._report_missing(), name="actors not ready")
        try:
            return await self._start()
        finally:
            reporter.cancel()

    async def _report_missing(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            missing = [
                f"{actor.name} ({actor.stage})" for actor in self.actors if actor.stage != "ready"
            ]
            if missing:
                ready = f"{len(self.actors) - len(missing)} of {len(self.actors)} processes ready"
                self.observer.event("start", f"{ready}, waiting for: {', '.join(missing)}")

    async def _start(self) -> Roles:
        config = self.config
        timeout_s = config.run.timeout_s
        policies = policies_of(self.prepared.algorithm)
        names = (*policies, *frozen_policies(self.prepared.algorithm))
        engines = {policy: group for policy in names if (group := self._rollouts(policy))}
        schedules = {policy: self._schedule_of(policy) for policy in policies}
        learners = {
            policy: self._learner(_role("learner", policy), schedules[policy][0])
            for policy in policies
        }
        pools = {
            policy: RolloutPool(
                group,
                self._transport(learners.get(policy), group),
                max_num_seqs=config.rollout.max_num_seqs,
                timeout_s=timeout_s,
                report_s=config.rollout.in_flight_report_s
                if config.rollout.in_flight_updates
                else None,
            )
            for policy, group in engines.items()
        }
        starts = []
        if self.shares:
            await start_in_turn([(engines[policy], pool) for policy, pool in pools.items()])
        else:
            starts += [actor.start() for group in engines.values() for actor in group]
        reference, reference_starts = self._reference()
        starts += reference_starts
        before = len(self.actors)
        section = config.scorer
        scorers = self._scorers("scorer", [section.train] * section.replicas)
        evaluator_scorers = config.evaluator_scorers
        evaluated = list(evaluator_scorers.values())
        evaluators = self._scorers("evaluator", evaluated)
        starts += [actor.start() for actor in self.actors[before:]]
        starts += [
            self._start_learner(group, self._start_of(policy), steps=schedules[policy][1])
            for policy, group in learners.items()
        ]
        critic = self._learner("critic", config.learner) if self.trains_critic else None
        if critic:
            start = config.learner.critic_model or config.policy.model, config.learner.critic_lr
            steps = self.prepared.derived.total_steps
            starts += [self._start_learner(critic, start, steps=steps, critic=True)]
        await _all(starts)
        eval_scorers = {
            task: self._retrying([actor], entries, calls=self._calls(evaluated))
            for (task, entries), actor in zip(evaluator_scorers.items(), evaluators, strict=True)
        }
        rollouts, trained, value = self._shared(pools, learners, critic)
        scorer: Scorer = NoScorer()
        if scorers:
            scorer = self._retrying(
                scorers, section.train, section.combine, calls=self._calls([section.train])
            )
        if config.environment:
            self._environments = EnvironmentHost(config.environment, base=self.base)
            pairwise = any(entry.is_pairwise for entry in section.train)
            scorer = EpisodeScorer(scorer, config.environment, is_pairwise=pairwise)
        return Roles(
            rollouts=rollouts,
            learners=trained,
            scorer=scorer,
            environments=self._environments,
            evaluator=eval_scorers.pop(None, None),
            eval_scorers={task: scorer for task, scorer in eval_scorers.items() if task},
            critic=value,
            reference=reference,
        )

    def _shared(
        self,
        pools: Mapping[str, RolloutPool],
        learners: Mapping[str, LearnerClient],
        critic: LearnerClient | None,
    ) -> tuple[Mapping[str, Rollout], Mapping[str, Learner], Learner | None]:
        """Return the roles, sharing the GPUs in time where placement is colocate."""
        if not self.shares:
            return pools, learners, critic
        sharing = GpuTimeSharing(
            list(pools.values()), [*learners.values(), *([critic] if critic else [])]
        )
        return (
            {policy: SharedRollout(pool, sharing) for policy, pool in pools.items()},
            {policy: SharedLearner(group, sharing) for policy, group in learners.items()},
            SharedLearner(critic, sharing) if critic else None,
        )

    async def shutdown(self, *, stacks: bool) -> None:
        """End the processes of all actors, also of those that are stopped or hang.

        Args:
            stacks: save the stacks of all threads first.
        """
        if self._environments is not None:
            self._environments.close()
        for actor in self.actors:
            actor.retired = True
        # One that cannot be reached must not keep the others alive.
        await asyncio.gather(
            *(actor.kill(stacks=stacks) for actor in self.actors), return_exceptions=True
        )
        self.placement_group.release()

    def _other(self, policy: str) -> OtherPolicy | None:
        """Return the settings of a policy other than "policy" and the frozen ones."""
        algorithm = self.prepared.algorithm
        if policy not in policies_of(algorithm)[1:]:
            return None
        assert isinstance(algorithm, TrainsSeveralPolicies)
        return algorithm.other_policy(policy)

    def _start_of(self, policy: str) -> tuple[ModelName, float]:
        """Return the model that a policy starts from, and its learning rate."""
        other = self._other(policy)
        if other is None:
            return self.config.policy.model, self.config.learner.lr
        return other.model or self.config.policy.model, other.lr

    def _schedule_of(self, policy: str) -> tuple[LearnerConfig, int]:
        """Return a policy's learner settings, and its schedule's length in optimizer steps."""
        other = self._other(policy)
        if other is None:
            return self.config.learner, self.prepared.derived.total_steps
        return other.learner_settings(self.config.learner)

    def _create(
        self, role: str, actor_class: type, build: Build | None, **options: Any
    ) -> list[SupervisedActor]:
        """Create a supervised actor for every spec of a role."""
        specs = [spec for spec in self.specs if spec.role == role]

        def create(spec: ActorSpec) -> Any:
            env = environment(
                self.config, role, critic=self.trains_critic, gpu_cores=self._gpu_cores
            )
            return self.placement_group.create(actor_class, spec, env, **options)

        run = self.config.run

        async def built(actor: Any, number: int) -> None:
            if build is not None:
                await wait(
                    build(actor, number),
                    name=specs[number].name,
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
        config = self.config
        role = _role("rollout", policy)
        model = self._start_of(policy)[0].below(self.base)

        def build(actor: Any, number: int) -> ray.ObjectRef:
            return actor.build.remote(
                model,
                config.rollout,
                dtype=config.policy.dtype,
                max_length=self.prepared.max_length,
                seed=config.seed % 2**31,
                device=config.cluster.device,
                sleeps=self.shares,
                stop_token_ids=tuple(self.prepared.stop_tokens),
                scaled_logprobs=config.train_temperature != 1,
                isolates_waves=config.run.is_deterministic and config.cluster.device == "cpu",
            )

        return self._create(role, RolloutActor, build, max_concurrency=100_000)

    def _scorers(
        self, role: str, lists: Sequence[Sequence[ScorerEntryConfig]]
    ) -> list[SupervisedActor]:
        device = self.device if any(s.gpus for s in self.specs if s.role == role) else "cpu"
        threads = threads_of(
            self.config, role, critic=self.trains_critic, gpu_cores=self._gpu_cores
        )
        setup = ScorerSetup(base=self.base, device=device, threads=threads)

        def build(actor: Any, number: int) -> ray.ObjectRef:
            return actor.build.remote(lists[number], setup)

        return self._create(
            role,
            ScorerActor,
            build,
            concurrency_groups=CONCURRENCY_GROUPS,
            max_concurrency=self._calls(lists),
        )

    def _calls(self, lists: Sequence[Sequence[ScorerEntryConfig]]) -> int:
        """Return how many calls an actor of these scorers takes at a time.

        Calls of models follow each other, in one thread.
        """
        concurrent = all(entry.is_concurrent for entries in lists for entry in entries)
        return self.config.scorer.in_flight if concurrent else 1

    def _retrying(
        self,
        actors: Sequence[SupervisedActor],
        entries: Sequence[ScorerEntryConfig],
        combine: CombineConfig = WEIGHTED_SUM,
        *,
        calls: int,
    ) -> Scorer:
        section = self.config.scorer
        scorer = ScorerClient(
            actors, entries, combine=combine, timeout_s=self.config.run.timeout_s, calls=calls
        )
        return RetryingScorer(
            scorer,
            attempts=section.attempts,
            tolerated=section.max_failed,
            report=self.observer.event,
        )

    def _reference(self) -> tuple[Reference | None, list[Coroutine[Any, Any, None]]]:
        """Create the reference's actors; return the role, and what starts them."""
        config = self.config
        section = config.reference
        timeout_s = config.run.timeout_s
        model = (section.model or config.policy.model).below(self.base)
        settings = {
            "dtype": config.policy.dtype,
            "device": self.device,
            "learner": config.learner,
            "epoch_guard": self.epoch_guard,
        }
        if not any(spec.role == "reference" for spec in self.specs):
            return None, []
        if section.ranks > 1:
            group = ShardedReference(
                self._create("reference", ShardedReferenceActor, None),
                section,
                timeout_s=max(timeout_s, config.run.start_timeout_s),
                chunk_timeout_s=timeout_s,
            )
            return group, [group.start(model, **settings)]

        def build(actor: Any, number: int) -> ray.ObjectRef:
            return actor.build.remote(model, section, **settings)

        actors = self._create(
            "reference", ReferenceActor, build, concurrency_groups=CONCURRENCY_GROUPS
        )
        pool = ReferencePool(actors, token_budget=section.token_budget, timeout_s=timeout_s)
        return pool, [actor.start() for actor in actors]

    def _learner(self, role: str, config: LearnerConfig) -> LearnerClient:
        run = self.config.run
        ranks = self._create(role, LearnerActor, None)
        return LearnerClient(
            ranks,
            config,
            sync_dtype=self.config.policy.dtype,
            timeout_s=max(run.timeout_s, run.start_timeout_s),
            chunk_timeout_s=run.timeout_s,
            transport=transport_of(self.config),
        )

    def _transport(
        self, learner: LearnerClient | None, engines: Sequence[SupervisedActor]
    ) -> Transport:
        timeout_s = self.config.run.timeout_s
        if learner is None:  # frozen: a new engine loads the model, and nothing is ever sent
            return ObjectStore(engines, timeout_s=timeout_s)
        return make_transport(
            transport_of(self.config),
            learner,
            engines,
            workers=self.config.rollout.tensor_parallel,
            timeout_s=timeout_s,
        )

    async def _start_learner(
        self,
        group: LearnerClient,
        start: tuple[ModelName, float],
        *,
        steps: int,
        critic: bool = False,
    ) -> None:
        config = self.config
        model, lr = start
        await group.start(
            model.below(self.base),
            epoch_guard=self.epoch_guard,
            head="value" if critic else "policy",
            lr=lr,
            total_steps=steps,
            lora=None if critic else config.policy.lora,
            device=self.device,
            seed=config.seed,
        )


def _role(kind: str, policy: str) -> str:
    """Return the role of a policy's actors, for example `rollout` or `rollout refiner`."""
    return kind if policy == "policy" else f"{kind} {policy}"


class Sleeps(Protocol):
    async def sleep(self) -> None: ...


async def start_in_turn(
    policies: Sequence[tuple[Sequence[SupervisedActor], Sleeps]],
) -> None:
    """Start each policy's engines and put them to sleep, one policy after the other.

    While an engine starts, vLLM measures the GPU's free memory, and assumes that no other process
    changes it.
    """
    for engines, pool in policies:
        await _all([engine.start() for engine in engines])
        await pool.sleep()


async def _all(starts: list[Coroutine[Any, Any, None]]) -> None:
    """Start in parallel. Raises the first error; `shutdown` ends what was left half started."""
    if not starts:
        return
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
