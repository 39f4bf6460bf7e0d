"""The one loop: rounds of explore, score, credit, learn, sync, evaluate, checkpoint, for every algorithm.

Who waits for whom: round i is learned when its exploration is done; weights go to the engines when no exploration is in flight;
exploration of round i + max_staleness may start when round i is about to be learned. With max_staleness 0 everything takes
turns and the run is strictly on-policy; with 1, generation overlaps learning, and so on. There is no second, asynchronous loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayhf.algorithms.base import Algorithm
from rayhf.campaign.evaluate import evaluate
from rayhf.campaign.exchange import Exchange
from rayhf.campaign.observer import Observer
from rayhf.campaign.store import RunDir
from rayhf.config.algorithms import EmaReference, InitialReference, PreviousReference
from rayhf.config.schema import CampaignConfig
from rayhf.errors import CheckpointError, ScorerError
from rayhf.experience import Batch, Example, Failed, Group, Invalid, Sampling, Scored, WeightSnapshot, derive_seed
from rayhf.losses.value import explained_variance
from rayhf.prompts import PromptSet, deal
from rayhf.roles import Learner, Reference, Rollout, Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the controller talks to."""

    rollout: Rollout
    scorer: Scorer
    evaluator: Scorer | None
    """Scores held-out completions; None means the training scorer does."""
    learner: Learner
    critic: Learner | None
    reference: Reference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """An explored round on its way to the learner."""

    groups: list[Group]
    seconds: Mapping[str, float]


class Controller:
    """Runs one campaign from its last commit to `run.iterations`."""

    def __init__(
        self,
        config: CampaignConfig,
        *,
        algorithm: Algorithm,
        roles: Roles,
        prompts: PromptSet,
        heldout: PromptSet | None,
        store: RunDir,
        observer: Observer,
    ) -> None:
        self.config, self.algorithm, self.roles, self.store, self.observer = config, algorithm, roles, store, observer
        self.prompts = prompts
        self.heldout = heldout.prompts[: config.run.eval_prompts] if heldout else ()
        self.iteration = 0
        self.version = 0
        self.sampling = Sampling(
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
        )
        run = config.run
        self.deterministic = run.max_staleness == 0 if run.deterministic is None else run.deterministic
        self._rounds: dict[int, asyncio.Task[Round]] = {}
        self._seconds: dict[str, float] = {}

    async def run(self) -> None:
        """Raises the first error of any role; what was committed stays, and the same call continues."""
        await self._restore()
        if self.iteration >= self.config.run.iterations:
            return
        if self.iteration == 0:
            self._report({"iteration": 0, "policy/version": self.version, **await self._evaluate(0)})
        try:
            for iteration in range(self.iteration + 1, self.config.run.iterations + 1):
                await self._one_round(iteration)
        finally:
            await _cancel(list(self._rounds.values()))

    # -------------------------------------------------------------------- rounds

    async def _one_round(self, iteration: int) -> None:
        started = time.monotonic()
        self._seconds = {}
        last = self.config.run.iterations
        for ahead in range(iteration, min(iteration + self.config.run.max_staleness, last) + 1):
            if ahead not in self._rounds:
                self._rounds[ahead] = asyncio.create_task(self._explore(ahead), name=f"round {ahead}")
        explored = await self._rounds.pop(iteration)
        metrics: dict[str, float] = {"iteration": iteration, **_exploration_metrics(explored.groups, self.version)}
        self.store.write_samples(iteration, explored.groups)
        learned = await self._learn(iteration, explored.groups, metrics)
        if learned:
            self.version += 1
            await self._sync(iteration)
        self.iteration = iteration
        metrics["policy/version"] = self.version
        self.algorithm.observe(metrics)
        every = self.config.run.eval_every
        if iteration == last or (every and iteration % every == 0):
            metrics |= await self._evaluate(iteration)
        every = self.config.run.checkpoint_every
        due = iteration == last or bool(every and iteration % every == 0)
        metrics |= {f"time/{name}_s": s for name, s in {**explored.seconds, **self._seconds}.items()}
        metrics["time/iteration_s"] = time.monotonic() - started
        self._report(metrics)
        if due:
            await self._checkpoint(iteration)

    async def _explore(self, iteration: int) -> Round:
        prompts = deal(self.prompts.prompts, batch=self.config.prompts.batch, iteration=iteration, seed=self.config.seed)
        exchange = Exchange(self.roles.rollout, self.roles.scorer, version=self.version, deterministic=self.deterministic)
        budget = _FailureBudget(limit=self.config.scorer.max_failed, expected=len(prompts) * self.algorithm.samples)
        finished = 0

        def done(group: Group) -> None:
            nonlocal finished
            finished += 1
            budget.hear(group)
            self.observer.phase(iteration, "explore", finished, len(prompts))

        self.observer.phase(iteration, "explore", 0, len(prompts))
        groups = await exchange.run(
            prompts,
            self.algorithm.explore,
            sampling=self.sampling,
            seed=derive_seed(self.config.seed, "round", iteration),
            done=done,
        )
        return Round(groups=groups, seconds=exchange.stopwatch.seconds)

    # ------------------------------------------------------------------ learning

    async def _learn(self, iteration: int, groups: Sequence[Group], metrics: dict[str, float]) -> bool:
        """Select, annotate, credit and step; fills `metrics`. False when the policy did not change."""
        seed = derive_seed(self.config.seed, "select", iteration)
        selection = self.algorithm.select(groups, seed=seed)
        metrics |= selection.metrics
        examples = selection.examples
        self.store.write_examples(iteration, examples)
        if not examples:
            metrics["learner/steps"] = 0
            return False
        credited, credit_metrics = self.algorithm.credit(await self._annotate(iteration, examples))
        metrics |= credit_metrics
        trains_policy = self.algorithm.trains_policy(iteration)
        batches = list(self._batches(iteration, groups, credited))
        steps: list[dict[str, float]] = []
        async with self._timed("learner"):
            for number, batch in enumerate(batches):
                self.observer.phase(iteration, "learn", number, len(batches))
                steps.append(await self._step(batch, trains_policy))
        metrics |= _over_steps(steps)
        metrics["learner/steps"] = len(steps)
        return trains_policy

    async def _step(self, batch: Batch, trains_policy: bool) -> dict[str, float]:
        critic, critic_loss = self.roles.critic, self.algorithm.critic_loss()
        work = [self.roles.learner.step(batch, self.algorithm.loss())] if trains_policy else []
        if critic is not None and critic_loss is not None:
            work.append(critic.step(batch, critic_loss))
        policy, *value = await asyncio.gather(*work) if trains_policy else ({}, *await asyncio.gather(*work))
        metrics = dict(policy)
        for step in value:  # the critic is a learner too: its loss, norm and rate go under its own name
            metrics |= {k.replace("learner/", "critic/"): v for k, v in step.items()}
            metrics["critic/explained_variance"] = explained_variance(step)
        return metrics

    async def _annotate(self, iteration: int, examples: Sequence[Example]) -> list[Example]:
        """Add what the loss and the credit need to know of each token: reference, value, and the policy before its first step."""
        rows = [row for example in examples for row in example.rows]
        temperature = self.config.rollout.temperature
        names, work = [], []
        if self.roles.reference is not None:
            names.append("ref_logp")
            work.append(self.roles.reference.logprobs(rows, temperature=temperature))
        if self.roles.critic is not None:
            names.append("value")
            work.append(self.roles.critic.outputs(rows, temperature=1.0))
        if self._steps_per_round > 1:
            names.append("old_logp")
            work.append(self.roles.learner.outputs(rows, temperature=temperature))
        if not work:
            return list(examples)
        self.observer.phase(iteration, "reference")
        async with self._timed("reference"):
            columns = await asyncio.gather(*work)
        annotated = iter(
            row.with_tokens(**dict(zip(names, values, strict=True))) for row, *values in zip(rows, *columns, strict=True)
        )
        return [Example(rows=tuple(next(annotated) for _ in e.rows), scalars=e.scalars) for e in examples]

    @property
    def _steps_per_round(self) -> int:
        learner = self.config.learner
        return learner.epochs * (self.config.prompts.batch // (learner.prompts_per_step or self.config.prompts.batch))

    def _batches(self, iteration: int, groups: Sequence[Group], examples: Sequence[Example]) -> list[Batch]:
        """One batch per optimiser step: prompts in a seeded order, all examples of a prompt together."""
        size = self.config.learner.prompts_per_step or self.config.prompts.batch
        order = [group.prompt.prompt_id for group in groups]
        batches = []
        for epoch in range(self.config.learner.epochs):
            shuffled = list(order)
            if len(shuffled) > size:
                random.Random(derive_seed(self.config.seed, "minibatch", iteration, epoch)).shuffle(shuffled)
            for start in range(0, len(shuffled), size):
                chosen = set(shuffled[start : start + size])
                part = tuple(e for e in examples if e.rows[0].prompt_id in chosen)
                if part:
                    batches.append(Batch(examples=part, temperature=self.config.rollout.temperature))
        return batches

    # ---------------------------------------------------------------------- sync

    async def _sync(self, iteration: int) -> None:
        """The new weights to every engine, once no exploration is in flight, and to the reference when its schedule says so."""
        self.observer.phase(iteration, "sync")
        if self._rounds:
            await asyncio.wait(self._rounds.values())
        async with self._timed("sync"):
            snapshot = await self.roles.learner.publish(self.version)
            await self.roles.rollout.update(snapshot)
            await self._refresh_reference(iteration, snapshot)

    async def _refresh_reference(self, iteration: int, snapshot: WeightSnapshot) -> None:
        schedule = self.algorithm.reference
        if self.roles.reference is None or schedule is None or isinstance(schedule, InitialReference):
            return
        if iteration % schedule.every == 0:
            mix = schedule.alpha if isinstance(schedule, EmaReference) else 1.0
            await self.roles.reference.update(snapshot, mix=mix)

    # ---------------------------------------------------------------- evaluation

    async def _evaluate(self, iteration: int) -> dict[str, float]:
        if not self.heldout:
            return {}
        self.observer.phase(iteration, "evaluate")
        async with self._timed("evaluate"):
            return await evaluate(
                self.heldout,
                rollout=self.roles.rollout,
                scorer=self.roles.evaluator or self.roles.scorer,
                reward=self.roles.scorer if self.roles.evaluator else None,
                reference=self.roles.reference,
                version=self.version,
                sampling=self.sampling,
                seed=self.config.seed,
                task=self.config.prompts.task,
            )

    # --------------------------------------------------------------- checkpoints

    def _state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "version": self.version,
            "algorithm": self.algorithm.state_dict(),
            "prompts": self.prompts.fingerprint,
        }

    async def _checkpoint(self, iteration: int) -> None:
        self.observer.phase(iteration, "checkpoint")
        directory = self.store.checkpoint_directory()
        saves = [self.roles.learner.save(directory / "learner")]
        if self.roles.critic is not None:
            saves.append(self.roles.critic.save(directory / "critic"))
        if self._reference_moves and self.roles.reference is not None:
            saves.append(self.roles.reference.save(directory / "reference"))
        await asyncio.gather(*saves)
        finished = iteration >= self.config.run.iterations
        self.store.commit(directory, iteration, self._state(), campaign_state="done" if finished else "running")
        exported = self.store.policy_directory()
        await self.roles.learner.export(exported)
        self.store.publish_policy(exported)

    @property
    def _reference_moves(self) -> bool:
        return isinstance(self.algorithm.reference, PreviousReference | EmaReference)

    async def _restore(self) -> None:
        """Continue from the newest verified checkpoint, or from the start where none was ever committed."""
        checkpoint = self.store.latest()
        if checkpoint is None:
            self.store.rewind(-1)
            return
        state = checkpoint.state
        if state["prompts"] != self.prompts.fingerprint:
            raise CheckpointError(
                f"{self.config.prompts.train} is not the file this campaign was started with (its prompts changed); "
                "restore it, or choose another run.dir"
            )
        self.store.rewind(checkpoint.iteration)
        self.iteration, self.version = int(state["iteration"]), int(state["version"])
        if self.iteration >= self.config.run.iterations:
            return
        self.observer.phase(self.iteration, "restore")
        self.algorithm.load_state_dict(state["algorithm"])
        loads = [self.roles.learner.load(checkpoint.directory / "learner")]
        if self.roles.critic is not None:
            loads.append(self.roles.critic.load(checkpoint.directory / "critic"))
        if self._reference_moves and self.roles.reference is not None:
            loads.append(self.roles.reference.load(checkpoint.directory / "reference"))
        await asyncio.gather(*loads)
        if self.version:
            await self.roles.rollout.update(await self.roles.learner.publish(self.version))

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


class _FailureBudget:
    """Stops a round as soon as more completions than allowed could not be scored."""

    def __init__(self, *, limit: float, expected: int) -> None:
        self.limit, self.allowed = limit, limit * expected
        self.bad, self.heard, self.expected = 0, 0, expected

    def hear(self, group: Group) -> None:
        bad = [s.outcome for s in group.samples if not isinstance(s.outcome, Scored)]
        self.bad += len(bad)
        self.heard += len(group.samples)
        if bad and self.bad > self.allowed:
            first = bad[0]
            assert isinstance(first, Invalid | Failed)
            raise ScorerError(
                f"{self.bad} of {self.heard} completions could not be scored (scorer.max_failed allows {self.limit:.0%} of "
                f"{self.expected} in a round); the last: {type(first).__name__}: {first.reason}"
            )


def _exploration_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    samples = [s for g in groups for s in g.samples]
    completions = [s.completion for s in samples]
    lengths = [len(c.token_ids) for c in completions]
    values = [s.outcome.value for s in samples if isinstance(s.outcome, Scored)]
    metrics = {
        "rollout/tokens": float(sum(lengths)),
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        "scorer/invalid": float(sum(isinstance(s.outcome, Invalid) for s in samples)),
        "scorer/failed": float(sum(isinstance(s.outcome, Failed) for s in samples)),
        "staleness/max": float(version - min(c.policy_version for c in completions)),
    }
    if values:
        metrics |= {"scorer/reward_mean": float(np.mean(values)), "scorer/reward_std": float(np.std(values))}
    parts: dict[str, list[float]] = {}
    for sample in samples:
        if isinstance(sample.outcome, Scored):
            for name, value in sample.outcome.parts.items():
                parts.setdefault(name, []).append(value)
    if len(parts) > 1:
        metrics |= {f"scorer/{name}/reward_mean": float(np.mean(values)) for name, values in parts.items()}
    return metrics


def _over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a round's optimiser steps; maxima of names that end in _max."""
    names = sorted({name for step in steps for name in step})
    values = {name: [step[name] for step in steps if name in step] for name in names}
    return {name: float(max(v) if name.endswith("_max") else np.mean(v)) for name, v in values.items()}


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
