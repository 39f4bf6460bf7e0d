"""The composition root: places actors, builds the roles, hands them to the controller.

Every actor is created first and built side by side; a start that takes too long names who is still missing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import ray

from actors.learner import LearnerGroup, RemoteLearner
from actors.placement import Seat, bundles, check_available, entries_of, kind_of, seats
from actors.reference import RemoteReference, RemoteReferenceActor
from actors.remote import wait
from actors.rollout import RemoteRollout, RolloutPool
from actors.scorer import RemoteScorer, RemoteScorerActor
from rayhf.algorithms.base import needs_frozen_reference
from rayhf.config.algorithms import PPOConfig
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import JudgeScorer
from rayhf.errors import PlacementError
from rayhf.preflight import Prepared
from rayhf.roles import Roles
from rayhf.rollout.env import engine_env


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


class Cast:
    """The actors of one campaign."""

    def __init__(self, prepared: Prepared, *, base: Path) -> None:
        self.prepared, self.config, self.base = prepared, prepared.config, base
        algorithm = prepared.algorithm
        self.seats = seats(
            self.config,
            critic=algorithm.critic,
            reference=needs_frozen_reference(algorithm),
            policies=algorithm.policies,
        )
        self.device = "cuda" if self.config.cluster.device == "gpu" else "cpu"
        self._group: Any = None

    async def assemble(self) -> Roles:
        """Place and start everyone. Raises PlacementError, DeadlineError naming who did not start, or an engine's own error."""
        check_available(self.seats, ray.nodes())
        await self._reserve()
        config = self.config
        algorithm = self.prepared.algorithm
        rollouts = {
            policy: self._create(_role("rollout", policy), RemoteRollout, max_concurrency=100_000)
            for policy in algorithm.policies
        }
        scorer = self._create("scorer", RemoteScorerActor)[0]
        evaluators = self._create("evaluator", RemoteScorerActor)
        references = self._create("reference", RemoteReferenceActor)
        learners = {policy: self._learner(_role("learner", policy)) for policy in algorithm.policies}
        critic = self._learner("critic") if algorithm.critic else None
        starts = [
            self._built(f"{_role('rollout', policy)} engine {i}", actor, *self._rollout_arguments(policy))
            for policy, actors in rollouts.items()
            for i, actor in enumerate(actors)
        ]
        combine = {"combine": config.scorer.combine}
        starts += [self._built("scorer", scorer, (config.scorer.train,), self._scorer_settings("scorer") | combine)]
        lists = [config.scorer.evaluate] if config.scorer.evaluate is not None else []
        lists += [examination.scorer for examination in config.evaluations.values()]
        for actor, entries in zip(evaluators, lists, strict=True):
            starts += [self._built("evaluator", actor, (entries,), self._scorer_settings("evaluator"))]
        for actor in references:
            starts += [self._built("reference", actor, *self._reference_arguments())]
        starts += [self._build_learner(group, self._start_of(policy)) for policy, group in learners.items()]
        if critic:
            start = config.learner.critic_model or config.policy.model
            starts += [self._build_learner(critic, (start, config.learner.critic_lr), critic=True)]
        await _together(starts)
        timeout_s = config.run.timeout_s
        judges = [RemoteScorer(actor, name="evaluator", timeout_s=timeout_s) for actor in evaluators]
        own = judges.pop(0) if config.scorer.evaluate is not None else None
        return Roles(
            rollouts={policy: RolloutPool(actors, timeout_s=timeout_s) for policy, actors in rollouts.items()},
            learners=learners,
            scorer=RemoteScorer(scorer, name="scorer", timeout_s=timeout_s),
            evaluator=own,
            examiners=dict(zip(config.evaluations, judges, strict=True)),
            critic=critic,
            reference=RemoteReference(references[0], timeout_s=timeout_s) if references else None,
        )

    def _start_of(self, policy: str) -> tuple[Path, float]:
        """The model that a policy starts from, and its learning rate."""
        if policy == "policy":
            return self.config.policy.model, self.config.learner.lr
        other = self.prepared.algorithm.other_policy(policy)
        return other.model or self.config.policy.model, other.lr

    async def _reserve(self) -> None:
        """On GPUs, hold every bundle before any model loads."""
        if self.config.cluster.device == "cpu":
            return
        wanted = bundles(self.seats)
        self._group = ray.util.placement_group(wanted, strategy="PACK")
        ready, _ = await asyncio.to_thread(ray.wait, [self._group.ready()], timeout=self.config.run.start_timeout_s)
        if not ready:
            raise PlacementError(
                f"placement: {len(wanted)} bundles were not available within {self.config.run.start_timeout_s:g} s; "
                f"requested {wanted}, free now {ray.available_resources()}"
            )

    def _create(self, role: str, remote: Any, **options: Any) -> list[Any]:
        return [
            remote.options(
                num_cpus=seat.cpus,
                num_gpus=seat.gpus,
                runtime_env={"env_vars": environment(self.config, role)},
                max_restarts=0,
                max_task_retries=0,
                **self._strategy(seat),
                **options,
            ).remote()
            for seat in self.seats
            if seat.role == role
        ]

    def _strategy(self, seat: Seat) -> dict[str, Any]:
        if self._group is None:
            return {}
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        numbers = sorted({s.bundle for s in self.seats})
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=numbers.index(seat.bundle))
        return {"scheduling_strategy": strategy}

    async def _built(self, who: str, actor: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        await wait(actor.build.remote(*arguments, **settings), who=who, phase="start", timeout_s=self.config.run.start_timeout_s)

    def _rollout_arguments(self, policy: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        settings: dict[str, Any] = {"dtype": self.config.policy.dtype, "max_length": self.prepared.max_length}
        settings |= {"seed": self.config.seed % 2**31, "device": self.config.cluster.device}
        return (self.base / self._start_of(policy)[0], self.config.rollout), settings

    def _scorer_settings(self, role: str) -> dict[str, Any]:
        device = self.device if any(s.gpus for s in self.seats if s.role == role) else "cpu"
        return {"device": device, "threads": threads_of(self.config, role), "base": self.base}

    def _reference_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        model = self.config.reference.model or self.config.policy.model
        return (self.base / model, self.config.reference), {"dtype": self.config.policy.dtype, "device": self.device}

    def _learner(self, role: str) -> LearnerGroup:
        return LearnerGroup(
            self._create(role, RemoteLearner),
            self.config.learner,
            name=role,
            sync_dtype=self.config.policy.dtype,
            timeout_s=max(self.config.run.timeout_s, self.config.run.start_timeout_s),
        )

    async def _build_learner(self, group: LearnerGroup, start: tuple[Path, float], *, critic: bool = False) -> None:
        config = self.config
        model, lr = start
        await group.build(
            self.base / model,
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
    for task in done:
        task.result()
