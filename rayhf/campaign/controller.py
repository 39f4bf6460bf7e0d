"""The one loop: rounds of explore, score, credit, learn, sync, evaluate, checkpoint, for every
algorithm.

Who waits for whom: round i is learned when its exploration is done; weights go to the engines when
no exploration is in flight; exploration of round i + max_staleness may start when round i is about
to be learned. With max_staleness 0 everything takes turns and the run is strictly on-policy; with
1, generation overlaps learning, and so on. There is no second, asynchronous loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rayhf.algorithms.base import Algorithm
from rayhf.algorithms.context import ExplorationContext
from rayhf.campaign.evaluation import evaluate
from rayhf.campaign.persistence import check_data, installed_packages, load_roles, save_roles
from rayhf.campaign.training import Trainer
from rayhf.config.algorithms import EmaReference, InitialReference
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import is_pairwise
from rayhf.data.prompts import Chat, PromptSet, deal, parse_prompt
from rayhf.errors import ConfigError, InterruptedRunError, PausedError
from rayhf.exploration.build import build_scheduler
from rayhf.exploration.journal import Journal
from rayhf.exploration.metrics import FailureBudget, exploration_metrics
from rayhf.exploration.scheduler import IN_FLIGHT, RequestScheduler
from rayhf.monitoring.guards import check_guards
from rayhf.monitoring.observer import Observer
from rayhf.roles import Roles
from rayhf.run_dir.state import CheckpointState
from rayhf.run_dir.store import RunDir
from rayhf.tiny.exploitability import Game
from rayhf.types import Completion, Group, Prompt, Sample, Sampling, WeightSnapshot, derive_seed

_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignData:
    """What a campaign reads: prompts, rendered, and what it is examined on."""

    chat: Chat
    prompts: PromptSet
    heldout: tuple[Prompt, ...] = ()
    eval_suites: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    """By task: the prompts of the config's further evaluations."""
    game: Game | None = None
    pairs: str | None = None
    """Fingerprint of the given pairs, which the algorithm has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploredIteration:
    """An explored round on its way to the learner."""

    groups: list[Group]
    tokens: Mapping[str, float]
    seconds: Mapping[str, float]


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
        self.config, self.algorithm, self.roles, self.store, self.observer = (
            config,
            algorithm,
            roles,
            store,
            observer,
        )
        self.data = data
        self.iteration = 0
        self.versions = dict.fromkeys(algorithm.policies, 0)
        self.sampling = Sampling(
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
        )
        self._rounds: dict[int, asyncio.Task[ExploredIteration]] = {}
        self._seconds: dict[str, float] = {}
        self._alarmed: set[tuple[str, str]] = set()
        self._trainer = Trainer(
            config,
            algorithm=algorithm,
            roles=roles,
            store=store,
            observer=observer,
            timed=self._timed,
        )

    async def run(self) -> None:
        """Raises the first error of any role; what was committed stays, and the same call
        continues."""
        await self._restore()
        if self.iteration >= self.config.run.iterations:
            return
        if self.iteration == 0:
            self._report(
                {
                    "iteration": 0,
                    **self._version_metrics(),
                    **await self._measure_game(),
                    **await self._evaluate(0),
                }
            )
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
                self._rounds[ahead] = asyncio.create_task(
                    self._explore(ahead), name=f"round {ahead}"
                )
        explored = await self._rounds.pop(iteration)
        metrics: dict[str, float] = {"iteration": iteration, **explored.tokens}
        metrics |= exploration_metrics(explored.groups, self.versions["policy"])
        await self.store.write_samples(iteration, explored.groups)
        selected, seconds = (
            await self._trainer.select(iteration, explored.groups, metrics),
            explored.seconds,
        )
        del explored  # most of a round's memory: not needed while it is learned, and the next one is explored meanwhile
        changed = await self._trainer.learn(iteration, selected, metrics)
        for policy in changed:
            self.versions[policy] += 1
        if changed:
            await self._sync(iteration, changed)
        self.iteration = iteration
        metrics |= self._version_metrics() | await self._measure_game()
        self.algorithm.observe(metrics)
        every = self.config.run.eval_every
        if iteration == last or (every and iteration % every == 0):
            metrics |= await self._evaluate(iteration)
        every = self.config.run.checkpoint_every
        due = iteration == last or bool(every and iteration % every == 0)
        metrics |= {f"time/{name}_s": s for name, s in {**seconds, **self._seconds}.items()}
        metrics["time/iteration_s"] = time.monotonic() - started
        self._report(metrics)
        self._apply_guards()
        request = self.store.requested()
        if due or request != "run":
            await self._checkpoint(iteration, metrics)
        if request != "run" and iteration < last:
            await self._apply_operator_requests()

    def _apply_guards(self) -> None:
        """Say what looks unhealthy. Raises PausedError where a guard says that it must not go on
        like this: the round is then not committed, so that the last healthy commit stays the
        newest."""
        accepted = self.store.state.accepted
        alarms = check_guards(self.store.history, self.config.guards)
        for alarm in alarms:
            if (alarm.guard, alarm.level) not in self._alarmed:
                self.observer.event(alarm.level, alarm.message)
        self._alarmed = {(alarm.guard, alarm.level) for alarm in alarms}
        stop = [alarm for alarm in alarms if alarm.level == "pause" and alarm.guard not in accepted]
        if stop:
            self.store.set_state(
                "paused", reason=stop[0].message, guards=[alarm.guard for alarm in stop]
            )
            raise PausedError(f"paused by guard {stop[0].guard}: {stop[0].message}")

    async def _apply_operator_requests(self) -> None:
        """Between two rounds, everything committed: stay paused as long as the operator wants, or
        stop."""
        if self.store.requested() == "pause":
            self.store.set_state("paused", reason="asked for by `rayhf pause`")
            self.observer.event(
                "pause",
                f"paused after round {self.iteration}; `rayhf unpause {self.store.path}` goes on",
            )
            while self.store.requested() == "pause":
                self.observer.phase(self.iteration, "paused")
                await asyncio.sleep(_POLL_S)
        if self.store.requested() == "stop":
            self.store.acknowledge()
            raise InterruptedRunError(
                f"stopped after round {self.iteration} by `rayhf stop`; the same command continues"
            )
        self.store.set_state("running")
        self.observer.event("unpause", f"goes on with round {self.iteration + 1}")

    def _scheduler(self, journal: Journal | None = None) -> RequestScheduler:
        rollout = self.config.rollout
        return build_scheduler(
            self.roles.rollouts,
            self.roles.scorer,
            chat=self.data.chat,
            versions=self.versions,
            deterministic=self.config.run.is_deterministic,
            journal=journal,
            in_flight=self.config.run.max_in_flight
            or max(IN_FLIGHT, 2 * rollout.engines * rollout.max_num_seqs),
        )

    def _prompts_of(self, iteration: int) -> list[Prompt]:
        """The round's prompts: those that people handed in take the places of dealt ones."""
        batch = self.config.prompts.batch
        dealt = deal(
            self.data.prompts.prompts, batch=batch, iteration=iteration, seed=self.config.seed
        )
        added: dict[str, Prompt] = {}
        room = self.data.chat.max_length - self.sampling.max_tokens
        for row in self.store.inbox.take("prompts", iteration, limit=batch):
            try:
                prompt = parse_prompt(row, self.data.chat, max_prompt_tokens=room)
            except ConfigError as error:
                self.observer.event("warn", f"left out: {error}")
            else:
                added[prompt.prompt_id] = prompt
        return [*added.values(), *(prompt for prompt in dealt if prompt.prompt_id not in added)][
            :batch
        ]

    async def _explore(self, iteration: int) -> ExploredIteration:
        prompts = self._prompts_of(iteration)
        journal = Journal(self.store.journal_file(iteration), config_hash=self.store.config_hash)
        scheduler = self._scheduler(journal)
        budget = FailureBudget(
            limit=self.config.scorer.max_failed, expected=len(prompts) * self.algorithm.samples
        )
        finished = 0

        def done(group: Group) -> None:
            nonlocal finished
            finished += 1
            budget.count(group)
            self.observer.phase(iteration, "explore", finished, len(prompts))

        self.observer.phase(iteration, "explore", 0, len(prompts))
        started = time.monotonic()
        try:
            if journal.scorer_state is not None:
                await self.roles.scorer.load_state_dict(journal.scorer_state)
            groups = await scheduler.run(
                prompts,
                self.algorithm.explore,
                sampling=self.sampling,
                seed=derive_seed(self.config.seed, "round", iteration),
                done=done,
            )
        finally:
            journal.close()
        tokens = {
            "rollout/tokens": float(scheduler.generated_tokens),
            "rollout/context_tokens": float(scheduler.prompt_tokens),
        }
        return ExploredIteration(
            groups=groups,
            tokens=tokens,
            seconds={**scheduler.stopwatch.seconds, "explore": time.monotonic() - started},
        )

    # ---------------------------------------------------------------------- sync

    async def _sync(self, iteration: int, changed: set[str]) -> None:
        """The new weights to every engine, once no exploration is in flight, and to the reference
        when its schedule says so."""
        self.observer.phase(iteration, "sync")
        if self._rounds:
            await asyncio.wait(self._rounds.values())
        async with self._timed("sync"):
            for policy in sorted(changed):
                mix = self._reference_mix(iteration) if policy == "policy" else None
                snapshot = await self._push(policy, stored=mix is not None)
                if mix is not None and self.roles.reference is not None:
                    await self.roles.reference.update(snapshot, mix=mix)

    async def _push(self, policy: str, *, stored: bool = False) -> WeightSnapshot:
        snapshot = await self.roles.learners[policy].publish(self.versions[policy], stored=stored)
        await self.roles.rollouts[policy].update(snapshot)
        return snapshot

    def _reference_mix(self, iteration: int) -> float | None:
        """How much of the new weights the reference takes in this round; None where it stays."""
        schedule = self.algorithm.reference
        if (
            self.roles.reference is None
            or schedule is None
            or isinstance(schedule, InitialReference)
        ):
            return None
        if iteration % schedule.every:
            return None
        return schedule.alpha if isinstance(schedule, EmaReference) else 1.0

    # ---------------------------------------------------------------- evaluation

    async def _evaluate(self, iteration: int) -> dict[str, float]:
        """The held-out prompts by the policy, and every further evaluation by its own policy and
        scorer."""
        self.observer.phase(iteration, "evaluate")
        metrics: dict[str, float] = {}
        # What is only looked at must not move a running normalizer: the next round scores as if
        # nobody had looked. Where that round is being scored already (staleness), putting the old
        # state back would lose what it has added.
        before = None if self._rounds else await self.roles.scorer.state_dict()
        async with self._timed("evaluate"):
            if self.data.heldout:
                metrics = await evaluate(
                    self.data.heldout,
                    rollout=self.roles.rollouts["policy"],
                    scorer=self.roles.evaluator or self.roles.scorer,
                    reward=self.roles.scorer
                    if self.roles.evaluator and self._scores_alone
                    else None,
                    reference=self.roles.reference,
                    version=self.versions["policy"],
                    sampling=self.sampling,
                    seed=self.config.seed,
                    task=self.config.prompts.task,
                    improve=self._improve if self.algorithm.at_test_time else None,
                )
            for task, eval_suite in self.config.evaluations.items():
                policy = (
                    eval_suite.policy if eval_suite.policy in self.versions else "policy"
                )  # where one model is both
                metrics |= await evaluate(
                    self.data.eval_suites[task],
                    rollout=self.roles.rollouts[policy],
                    scorer=self.roles.eval_scorers[task],
                    reward=None,
                    reference=None,
                    version=self.versions[policy],
                    sampling=self.sampling,
                    seed=self.config.seed,
                    task=task,
                )
        if before is not None:
            await self.roles.scorer.load_state_dict(before)
        return metrics

    async def _improve(self, completions: Sequence[Completion]) -> list[Completion]:
        """Held-out answers after the algorithm's test-time work on them."""
        improve = self.algorithm.at_test_time
        assert improve is not None
        answers = dict(zip((p.prompt_id for p in self.data.heldout), completions, strict=True))

        async def explore(prompt: Prompt, context: ExplorationContext) -> Group:
            better = await improve(prompt, answers[prompt.prompt_id], context)
            return Group(prompt=prompt, samples=(Sample(completion=better, outcome=None),))

        seed = derive_seed(self.config.seed, "test time")
        groups = await self._scheduler().run(
            self.data.heldout,
            explore,
            sampling=self.sampling,
            seed=seed,
            done=lambda group: None,
        )
        return [group.samples[0].completion for group in groups]

    @property
    def _scores_alone(self) -> bool:
        """A pairwise scorer compares answers to one prompt; a held-out answer stands alone."""
        return not any(is_pairwise(entry) for entry in self.config.scorer.train)

    async def _measure_game(self) -> dict[str, float]:
        """The policy's exact distribution over the game's answers, from the learner's log-probs."""
        game = self.data.game
        if game is None:
            return {}
        async with self._timed("game"):
            return game.measure(
                await self.roles.learners["policy"].outputs(game.rows, temperature=1.0)
            )

    def _version_metrics(self) -> dict[str, float]:
        return {f"{policy}/version": float(version) for policy, version in self.versions.items()}

    # --------------------------------------------------------------- checkpoints

    async def _state(self) -> CheckpointState:
        game = self.data.game
        return CheckpointState(
            iteration=self.iteration,
            versions=self.versions,
            algorithm=self.algorithm.state_dict(),
            scorer=await self.roles.scorer.state_dict(),
            evaluations={"game": game.state_dict()} if game else {},
            prompts=self.data.prompts.fingerprint,
            pairs=self.data.pairs,
            config=self.config.model_dump(mode="json"),
            packages=installed_packages(),
        )

    async def _checkpoint(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.observer.phase(iteration, "checkpoint")
        directory = self.store.checkpoints.begin()
        await save_roles(directory, self.roles, self.algorithm)
        for (
            policy,
            learner,
        ) in self.roles.learners.items():  # before the commit: what is done has its policy
            exported = self.store.policy_directory(policy)
            await learner.export(exported)
            self.store.publish_policy(exported, policy)
        finished = iteration >= self.config.run.iterations
        score = metrics.get(f"eval/{self.config.prompts.task}/sampled")
        self.store.commit(
            directory,
            await self._state(),
            campaign_state="done" if finished else "running",
            score=score,
        )
        self.observer.event("commit", f"round {iteration} is committed")

    async def _restore(self) -> None:
        """Continue from the newest verified checkpoint, or from the start where none was ever
        committed."""
        checkpoint = self.store.latest()
        if checkpoint is None:
            self.store.rewind(-1)
            return
        state = checkpoint.state
        check_data(state, self.config, prompts=self.data.prompts.fingerprint, pairs=self.data.pairs)
        self.store.rewind(checkpoint.iteration)
        self.iteration = state.iteration
        self.versions = dict(state.versions)
        if self.iteration >= self.config.run.iterations:
            self.store.set_state("done")
            return
        self.observer.phase(self.iteration, "restore")
        self.algorithm.load_state_dict(state.algorithm)
        await self.roles.scorer.load_state_dict(state.scorer)
        if self.data.game is not None:
            self.data.game.load_state_dict(state.evaluations["game"])
        await load_roles(checkpoint.directory, self.roles, self.algorithm)
        for policy, version in self.versions.items():
            if version:
                await self._push(policy)
        self.observer.event(
            "continue", f"after round {self.iteration}, from {checkpoint.directory.name}"
        )

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
