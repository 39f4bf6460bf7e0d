"""The composition root: places actors, builds the roles, hands them to the controller.

Room first (actors/room.py), then every actor is created and built side by side, and until all are ready somebody says every few
seconds who is missing. On shared GPUs engines go first and lie down to sleep before anybody else loads.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.colocate import SharedLearner, SharedRollout, Turns
from actors.learner import LearnerGroup, RemoteLearner
from actors.placement import Seat, entries_of, kind_of, seats
from actors.reference import RemoteReference, RemoteReferenceActor
from actors.remote import wait
from actors.rollout import RemoteRollout, RolloutPool
from actors.room import Room
from actors.scorer import RemoteScorer, RemoteScorerActor
from actors.supervise import Limits, Supervised
from actors.transport import Transport, transport
from rayhf.algorithms.base import needs_frozen_reference
from rayhf.campaign.fence import Fence
from rayhf.campaign.observer import Observer
from rayhf.campaign.store import RunDir
from rayhf.config.algorithms import PPOConfig
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import JudgeScorer, ScorerEntry
from rayhf.preflight import Prepared, transport_of
from rayhf.roles import Learner, Roles, Rollout, Scorer
from rayhf.rollout.env import engine_env
from rayhf.scorer.patience import PatientScorer

_SAY_S = 5.0
Build = Callable[[Any, int], ray.ObjectRef]
"""(actor, number): the call that builds the engine of a role's so-manieth actor."""


def threads_of(config: CampaignConfig, role: str) -> int | None:
    """CPU threads of an actor: what the config says; None leaves it to the libraries (GPU).

    Otherwise all cores for a role that works alone, and half of them for one that works beside another: where generation overlaps
    learning, where a critic learns beside the policy, and for an engine in any case, whose steps are many and small.
    """
    section = {"rollout": config.rollout, "reference": config.reference, "scorer": config.scorer, "evaluator": config.scorer}
    wanted = getattr(section.get(kind_of(role), config.learner), "threads", None)
    if wanted is not None or config.cluster.device == "gpu":
        return wanted
    cores = os.cpu_count() or 1
    critic = isinstance(config.algorithm, PPOConfig) and config.algorithm.advantage == "gae"
    alone = config.run.max_staleness == 0 and not critic and kind_of(role) != "rollout"
    return cores if alone else max(1, cores // 2)


def environment(config: CampaignConfig, role: str) -> dict[str, str]:
    """Environment variables of an actor's process, set before it imports anything."""
    threads = threads_of(config, role)
    if kind_of(role) == "rollout":
        return engine_env(config.cluster.device, threads)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if any(isinstance(entry, JudgeScorer) for entry in entries_of(config, role)):
        env |= engine_env(config.cluster.device, threads)
    if config.cluster.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return env


def seats_of(prepared: Prepared) -> list[Seat]:
    """Everyone that the campaign needs."""
    algorithm = prepared.algorithm
    return seats(
        prepared.config,
        critic=algorithm.critic,
        reference=needs_frozen_reference(algorithm),
        policies=algorithm.policies,
    )


class Cast:
    """The actors of one campaign, for one life of its learners."""

    def __init__(self, prepared: Prepared, store: RunDir, observer: Observer, *, base: Path) -> None:
        self.prepared, self.config, self.observer, self.base = prepared, prepared.config, observer, base
        self.fence, self.diagnosis = Fence(store.path, store.epoch), store.attempt / "stacks"
        self.seats = seats_of(prepared)
        self.crew: list[Supervised] = []
        """Everyone who was hired."""
        cluster = self.config.cluster
        self.device = "cuda" if cluster.device == "gpu" else "cpu"
        self.shares = cluster.placement == "colocate"
        self.room = Room(self.seats, grouped=cluster.device == "gpu" or cluster.address != "local")

    async def assemble(self, *, patient: bool = False) -> Roles:
        """Place and start everyone. Raises PlacementError, DeadlineError naming who did not start, or an engine's own error.

        `patient`: a campaign that has run here before waits up to run.start_timeout_s for nodes that went away.
        """
        run, cluster = self.config.run, self.config.cluster
        limit_s = run.start_timeout_s if patient else 0.0 if cluster.address == "local" else cluster.placement_timeout_s
        await self.room.take(limit_s=limit_s, report=partial(self.observer.event, "warn"))
        announcer = asyncio.create_task(self._announce(), name="who is missing")
        try:
            return await self._start()
        finally:
            announcer.cancel()

    async def _announce(self) -> None:
        while True:
            await asyncio.sleep(_SAY_S)
            missing = [f"{one.name} ({one.stage})" for one in self.crew if one.stage != "ready"]
            if missing:
                self.observer.event("start", f"waiting for: {', '.join(missing)}")

    async def _start(self) -> Roles:
        config, algorithm = self.config, self.prepared.algorithm
        timeout_s = config.run.timeout_s
        engines = {policy: self._rollouts(policy) for policy in algorithm.policies}
        starts = [one.start() for one in self.crew]
        learners = {policy: self._learner(_role("learner", policy)) for policy in algorithm.policies}
        pools = {
            policy: RolloutPool(
                group, self._transport(learners[policy], group), places=config.rollout.max_num_seqs, timeout_s=timeout_s
            )
            for policy, group in engines.items()
        }
        if self.shares:
            await _together(starts)
            await asyncio.gather(*(pool.sleep() for pool in pools.values()))
            starts = []
        hired = len(self.crew)
        (scorer,) = self._scorers("scorer", [config.scorer.train], {"combine": config.scorer.combine})
        own = [config.scorer.evaluate] if config.scorer.evaluate is not None else []
        evaluators = self._scorers("evaluator", [*own, *(each.scorer for each in config.evaluations.values())], {})
        references = self._references()
        starts += [one.start() for one in self.crew[hired:]]
        starts += [self._start_learner(group, self._start_of(policy)) for policy, group in learners.items()]
        critic = self._learner("critic") if algorithm.critic else None
        if critic:
            start = config.learner.critic_model or config.policy.model, config.learner.critic_lr
            starts += [self._start_learner(critic, start, critic=True)]
        await _together(starts)
        judges = [self._patient(actor) for actor in evaluators]
        rollouts, trained, value = self._shared(pools, learners, critic)
        return Roles(
            rollouts=rollouts,
            learners=trained,
            scorer=self._patient(scorer),
            evaluator=judges.pop(0) if own else None,
            examiners=dict(zip(config.evaluations, judges, strict=True)),
            critic=value,
            reference=RemoteReference(references[0], timeout_s=timeout_s) if references else None,
        )

    def _shared(
        self, pools: Mapping[str, RolloutPool], learners: Mapping[str, LearnerGroup], critic: LearnerGroup | None
    ) -> tuple[Mapping[str, Rollout], Mapping[str, Learner], Learner | None]:
        """Whoever shares GPUs takes turns on them."""
        if not self.shares:
            return pools, learners, critic
        turns = Turns(list(pools.values()), [*learners.values(), *([critic] if critic else [])])
        return (
            {policy: SharedRollout(pool, turns) for policy, pool in pools.items()},
            {policy: SharedLearner(group, turns) for policy, group in learners.items()},
            SharedLearner(critic, turns) if critic else None,
        )

    async def dismiss(self, *, stacks: bool) -> None:
        """End everyone's process, also of who is stopped or hangs; their stacks are saved first where somebody wants to know."""
        for one in self.crew:
            one.retired = True
        await asyncio.gather(*(one.kill(stacks=stacks) for one in self.crew), return_exceptions=True)  # as many as can be
        self.room.leave()

    def _start_of(self, policy: str) -> tuple[Path, float]:
        """The model that a policy starts from, and its learning rate."""
        if policy == "policy":
            return self.config.policy.model, self.config.learner.lr
        other = self.prepared.algorithm.other_policy(policy)
        return other.model or self.config.policy.model, other.lr

    def _hire(self, role: str, remote: Any, build: Build | None, **options: Any) -> list[Supervised]:
        """One member of the crew for every seat of a role; `build` gets the new actor and the seat's number."""
        places = [seat for seat in self.seats if seat.role == role]

        def create(seat: Seat) -> Any:
            return remote.options(
                num_cpus=seat.cpus,
                num_gpus=seat.gpus,
                resources=dict(seat.resources),
                runtime_env={"env_vars": environment(self.config, role)},
                max_restarts=0,
                max_task_retries=0,
                **self.room.strategy(seat),
                **options,
            ).remote()

        run = self.config.run

        async def built(actor: Any, number: int) -> None:
            if build is not None:
                await wait(build(actor, number), who=places[number].name, phase="start", timeout_s=run.start_timeout_s)

        hired = [
            Supervised(
                seat.name,
                partial(create, seat),
                partial(built, number=number),
                limits=Limits(stall_s=run.stall_s, restarts=run.restarts),
                report=self.observer.event,
                diagnosis=self.diagnosis,
            )
            for number, seat in enumerate(places)
        ]
        self.crew += hired
        return hired

    def _rollouts(self, policy: str) -> list[Supervised]:
        config, role = self.config, _role("rollout", policy)
        caching = config.rollout.prefix_caching
        if caching is None:
            caching = not (config.run.takes_turns and config.cluster.device == "cpu")
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

        return self._hire(role, RemoteRollout, build, max_concurrency=100_000)

    def _scorers(self, role: str, lists: Sequence[Sequence[ScorerEntry]], settings: Mapping[str, Any]) -> list[Supervised]:
        device = self.device if any(s.gpus for s in self.seats if s.role == role) else "cpu"

        def build(actor: Any, number: int) -> ray.ObjectRef:
            threads = threads_of(self.config, role)
            return actor.build.remote(lists[number], device=device, threads=threads, base=self.base, **settings)

        return self._hire(role, RemoteScorerActor, build)

    def _patient(self, actor: Supervised) -> Scorer:
        scorer = RemoteScorer(actor, timeout_s=self.config.run.timeout_s)
        section = self.config.scorer
        return PatientScorer(scorer, attempts=section.attempts, tolerated=section.max_failed, report=self.observer.event)

    def _references(self) -> list[Supervised]:
        config = self.config

        def build(actor: Any, number: int) -> ray.ObjectRef:
            model = self.base / (config.reference.model or config.policy.model)
            return actor.build.remote(model, config.reference, dtype=config.policy.dtype, device=self.device, fence=self.fence)

        return self._hire("reference", RemoteReferenceActor, build)

    def _learner(self, role: str) -> LearnerGroup:
        run = self.config.run
        ranks = self._hire(role, RemoteLearner, None)
        return LearnerGroup(
            ranks,
            self.config.learner,
            sync_dtype=self.config.policy.dtype,
            timeout_s=max(run.timeout_s, run.start_timeout_s),
            transport=transport_of(self.config),
        )

    def _transport(self, learner: LearnerGroup, engines: Sequence[Supervised]) -> Transport:
        workers, timeout_s = self.config.rollout.tensor_parallel, self.config.run.timeout_s
        return transport(transport_of(self.config), learner, engines, workers=workers, timeout_s=timeout_s)

    async def _start_learner(self, group: LearnerGroup, start: tuple[Path, float], *, critic: bool = False) -> None:
        config = self.config
        model, lr = start
        await group.start(
            self.base / model,
            fence=self.fence,
            head="value" if critic else "policy",
            lr=lr,
            total_steps=self.prepared.derived.total_steps,
            lora=None if critic else config.policy.lora,
            device=self.device,
            seed=config.seed,
        )


def _role(kind: str, policy: str) -> str:
    """The name of a policy's seats: `rollout`, or `rollout refiner`."""
    return kind if policy == "policy" else f"{kind} {policy}"


async def _together(starts: list[Coroutine[Any, Any, None]]) -> None:
    """Start side by side; the first error is raised and the rest is left to the end of the cluster."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
