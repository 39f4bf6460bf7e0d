"""Exploration of one iteration: its prompts, the scheduler over the engines, the failure budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayhf.algorithms.base import Algorithm, generates
from rayhf.campaign.data import CampaignData
from rayhf.campaign.refill import Refill
from rayhf.config.schema import CampaignConfig
from rayhf.data.prompts import parse_prompt
from rayhf.errors import ConfigError
from rayhf.exploration.build import build_scheduler
from rayhf.exploration.journal import Journal
from rayhf.exploration.metrics import FailureBudget
from rayhf.exploration.scheduler import IN_FLIGHT, RequestScheduler
from rayhf.monitoring.observer import Observer
from rayhf.roles import Roles
from rayhf.run_dir.store import RunDir
from rayhf.types import Group, Prompt, Sampling, derive_seed

Listen = Callable[[int, Sequence[Prompt]], Callable[[Group], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploredIteration:
    """Result of one iteration's exploration."""

    groups: list[Group]
    counts: Mapping[str, float]
    """Metrics that count tokens and refills."""
    seconds: Mapping[str, float]
    """Durations by phase."""


class IterationExplorer:
    """Explores iterations; several may be in flight at once (staleness).

    Args:
        versions: by policy, the version of the weights that must generate (with in-flight updates
            the oldest that may). This is the controller's own mapping, which it updates when it
            sends new weights.
    """

    def __init__(
        self,
        config: CampaignConfig,
        *,
        algorithm: Algorithm,
        roles: Roles,
        data: CampaignData,
        store: RunDir,
        observer: Observer,
        versions: Mapping[str, int],
        sampling: Sampling,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.roles = roles
        self.data = data
        self.store = store
        self.observer = observer
        self.versions = versions
        self.sampling = sampling

    def scheduler(self, journal: Journal | None = None) -> RequestScheduler:
        """Return a scheduler for one exploration, at the current versions."""
        rollout = self.config.rollout
        run = self.config.run
        return build_scheduler(
            self.roles.rollouts,
            self.roles.scorer,
            chat=self.data.chat,
            versions=self.versions,
            deterministic=run.is_deterministic,
            journal=journal,
            in_flight=run.max_in_flight
            or max(IN_FLIGHT, 2 * rollout.engines * rollout.max_num_seqs),
            score_calls=self.config.scorer.calls_in_flight,
            environments=self.roles.environments,
            environment_configs=self.config.environment,
        )

    def prompts_of(self, iteration: int) -> Sequence[Prompt]:
        """Return the iteration's prompts; prompts added at run time replace those of the set."""
        batch = self.config.prompts.batch
        dealt = self.data.prompts.batch(batch=batch, iteration=iteration, seed=self.config.seed)
        added: dict[str, Prompt] = {}
        room = self.data.chat.max_length - self.sampling.max_tokens - self.config.reply_tokens
        submitted = self.store.inbox.take(
            "prompts", iteration, limit=batch, warn=lambda line: self.observer.event("warn", line)
        )
        if submitted and not generates(self.algorithm):
            self.observer.event(
                "warn", f"ignored {len(submitted)} added prompts: nothing is generated for training"
            )
            return dealt
        for row in submitted:
            try:
                prompt = parse_prompt(row, self.data.chat, max_prompt_tokens=room)
            except ConfigError as error:
                self.observer.event("warn", f"skipped an added prompt: {error}")
            else:
                added[prompt.prompt_id] = prompt
        if not added:
            return dealt
        rest = (prompt for prompt in dealt if prompt.prompt_id not in added)
        return [*added.values(), *rest][:batch]

    async def explore(self, iteration: int, listen: Listen) -> ExploredIteration:
        """Explore every prompt of the iteration.

        Args:
            iteration: to explore.
            listen: called with its prompts; what it returns is called with each finished group.

        Raises ScorerError when too many completions could not be scored, and any error of a role.
        """
        prompts = self.prompts_of(iteration)
        journal = Journal(
            self.store.journal_file(iteration),
            config_hash=f"{self.store.config_hash} {self.data.inputs_hash}",
            functions_hash=self.data.functions_hash,
        )
        scheduler = self.scheduler(journal)
        refill = Refill(self.config, self.algorithm, self.data.prompts, iteration)
        budget = FailureBudget(limit=self.config.scorer.max_failed, expected=0)
        groups: list[Group] = []
        finished = 0
        total = 0
        take = listen(iteration, prompts)

        def done(group: Group) -> None:
            nonlocal finished
            finished += 1
            budget.count(group)
            take(group)
            self.observer.phase(iteration, "explore", finished, total)

        async def explore(more: Sequence[Prompt]) -> None:
            nonlocal total
            total += len(more)
            budget.expected = total * self.algorithm.samples
            self.observer.phase(iteration, "explore", finished, total)
            groups.extend(
                await scheduler.run(
                    more,
                    self.algorithm.explore,
                    sampling=self.sampling,
                    seed=derive_seed(self.config.seed, "round", iteration),
                    done=done,
                )
            )

        started = time.monotonic()
        try:
            if journal.scorer_state is not None:
                await self.roles.scorer.load_state_dict(journal.scorer_state)
            await explore(prompts)
            while further := refill.further(groups):
                await explore(further)
        finally:
            journal.close()
        if problems := budget.summary():
            self.observer.event("warn", f"iteration {iteration}: {problems}")
        counts = {
            "rollout/tokens": float(scheduler.generated_tokens),
            "rollout/context_tokens": float(scheduler.prompt_tokens),
            **refill.metrics(groups),
        }
        return ExploredIteration(
            groups=groups,
            counts=counts if generates(self.algorithm) else {},
            seconds={**scheduler.stopwatch.seconds, "explore": time.monotonic() - started},
        )
