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
from actors.placement import Seat, bundles, check_available, seats
from actors.reference import RemoteReference, RemoteReferenceActor
from actors.remote import wait
from actors.rollout import RemoteRollout, RolloutPool
from actors.scorer import RemoteScorer, RemoteScorerActor
from rayhf.campaign.controller import Roles
from rayhf.config.algorithms import PPOConfig
from rayhf.config.schema import CampaignConfig
from rayhf.errors import PlacementError
from rayhf.preflight import Prepared
from rayhf.rollout.env import engine_env


def threads_of(config: CampaignConfig, role: str) -> int | None:
    """CPU threads of an actor: what the config says; None leaves it to the libraries (GPU).

    Otherwise all cores for a role that works alone, and half of them for one that works beside another: where generation overlaps
    learning, where a critic learns beside the policy, and for an engine in any case, whose steps are many and small.
    """
    section = {"rollout": config.rollout, "reference": config.reference, "scorer": config.scorer, "evaluator": config.scorer}
    wanted = getattr(section.get(role, config.learner), "threads", None)
    if wanted is not None or config.cluster.device == "gpu":
        return wanted
    cores = os.cpu_count() or 1
    critic = isinstance(config.algorithm, PPOConfig) and config.algorithm.advantage == "gae"
    alone = config.run.max_staleness == 0 and not critic and role != "rollout"
    return cores if alone else max(1, cores // 2)


def environment(config: CampaignConfig, role: str) -> dict[str, str]:
    """Environment variables of an actor's process, set before it imports anything."""
    threads = threads_of(config, role)
    if role == "rollout":
        return engine_env(config.cluster.device, threads)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if config.cluster.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return env


class Cast:
    """The actors of one campaign."""

    def __init__(self, prepared: Prepared, *, base: Path) -> None:
        self.prepared, self.config, self.base = prepared, prepared.config, base
        algorithm = prepared.algorithm
        self.seats = seats(self.config, critic=algorithm.critic, reference=algorithm.reference is not None)
        self.device = "cuda" if self.config.cluster.device == "gpu" else "cpu"
        self._group: Any = None

    async def assemble(self) -> Roles:
        """Place and start everyone. Raises PlacementError, DeadlineError naming who did not start, or an engine's own error."""
        check_available(self.seats, ray.nodes())
        await self._reserve()
        config = self.config
        algorithm = self.prepared.algorithm
        rollout = self._create("rollout", RemoteRollout, max_concurrency=100_000)
        scorer = self._create("scorer", RemoteScorerActor)[0]
        evaluators = self._create("evaluator", RemoteScorerActor)
        references = self._create("reference", RemoteReferenceActor)
        learner = self._learner("learner")
        critic = self._learner("critic") if algorithm.critic else None
        starts = [self._built(f"rollout engine {i}", actor, *self._rollout_arguments()) for i, actor in enumerate(rollout)]
        starts += [self._built("scorer", scorer, (config.scorer.train,), self._scorer_settings("scorer"))]
        if evaluators and config.scorer.evaluate is not None:
            starts += [self._built("evaluator", evaluators[0], (config.scorer.evaluate,), self._scorer_settings("evaluator"))]
        for actor in references:
            starts += [self._built("reference", actor, *self._reference_arguments())]
        starts += [self._build_learner(learner, critic=False)]
        starts += [self._build_learner(critic, critic=True)] if critic else []
        await _together(starts)
        return Roles(
            rollout=RolloutPool(rollout, timeout_s=config.run.timeout_s),
            scorer=RemoteScorer(scorer, name="scorer", timeout_s=config.run.timeout_s),
            evaluator=RemoteScorer(evaluators[0], name="evaluator", timeout_s=config.run.timeout_s) if evaluators else None,
            learner=learner,
            critic=critic,
            reference=RemoteReference(references[0], timeout_s=config.run.timeout_s) if references else None,
        )

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

    def _rollout_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        settings: dict[str, Any] = {"dtype": self.config.policy.dtype, "max_length": self.prepared.max_length}
        settings |= {"seed": self.config.seed % 2**31, "device": self.config.cluster.device}
        return (self.base / self.config.policy.model, self.config.rollout), settings

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

    async def _build_learner(self, group: LearnerGroup, *, critic: bool) -> None:
        config = self.config
        model = (config.learner.critic_model if critic else None) or config.policy.model
        await group.build(
            self.base / model,
            head="value" if critic else "policy",
            lr=config.learner.critic_lr if critic else config.learner.lr,
            total_steps=self.prepared.derived.total_steps,
            lora=None if critic else config.policy.lora,
            device=self.device,
            seed=config.seed,
        )


async def _together(starts: list[Coroutine[Any, Any, None]]) -> None:
    """Start side by side; the first error is raised and the rest is left to the end of the cluster."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
