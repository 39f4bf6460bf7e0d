"""Evaluation schedule of a campaign: the held-out prompts and the config's further evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rayhf.algorithms.base import Algorithm, WorksAtTestTime
from rayhf.algorithms.context import ExplorationContext
from rayhf.campaign.iteration import IterationExplorer
from rayhf.config.scorers import names_of
from rayhf.evaluation.base import EvaluationContext
from rayhf.evaluation.scored import complete_once, evaluate
from rayhf.evaluation.values import PromptValues
from rayhf.types import Completion, Group, Prompt, Sample, Sampling, derive_seed


class Evaluator:
    """Evaluates the policy; shares roles, data and versions with the explorer."""

    def __init__(self, explorer: IterationExplorer) -> None:
        self._explorer = explorer
        self._config = explorer.config
        self._data = explorer.data
        self._roles = explorer.roles

    def due(self, iteration: int) -> list[str | None]:
        """Return the tasks to evaluate after `iteration`; None is the held-out task."""
        run = self._config.run
        intervals: dict[str | None, int] = {None: run.eval_every} if self._data.heldout else {}
        for task, evaluation in self._config.evaluations.items():
            intervals[task] = run.eval_every if evaluation.every is None else evaluation.every
        always = iteration in (0, run.iterations)
        return [
            task for task, every in intervals.items() if always or (every and not iteration % every)
        ]

    def generates(self, tasks: Sequence[str | None]) -> bool:
        """Whether any of `tasks` generates completions."""
        evaluations = self._config.evaluations
        return any(task is None or evaluations[task].generates for task in tasks)

    async def measure(
        self, tasks: Sequence[str | None], *, iteration: int, restore_scorer: bool
    ) -> dict[str, float]:
        """Evaluate `tasks` and return their metrics.

        Args:
            tasks: see `due`.
            iteration: under which completions and values by prompt are recorded.
            restore_scorer: restore the training scorer's state afterwards, so that an evaluation
                does not move a running normalizer. Must be off while the next iteration is already
                being scored (staleness): restoring the old state would lose its updates.
        """
        before = await self._roles.scorer.state_dict() if restore_scorer else None
        metrics: dict[str, float] = {}
        values: list[PromptValues] = []
        for task in tasks:
            metrics |= (
                await self._heldout(iteration, values.append)
                if task is None
                else await self._further(task, values.append)
            )
        if values:
            self._explorer.store.write_evaluations(iteration, values)
        if before is not None:
            await self._roles.scorer.load_state_dict(before)
        return metrics

    async def _heldout(
        self, iteration: int, record: Callable[[PromptValues], None]
    ) -> dict[str, float]:
        roles = self._roles
        return await evaluate(
            self._data.heldout,
            complete=partial(self._complete, policy="policy"),
            scorer=roles.evaluator or roles.scorer,
            reward=roles.scorer if roles.evaluator and self._scores_alone else None,
            reference=roles.reference,
            sampling=self._explorer.sampling,
            task=self._config.prompts.task,
            improve=self._improve if _at_test_time(self._explorer.algorithm) else None,
            record=record,
            record_answers=partial(self._explorer.store.write_heldout, iteration),
        )

    async def _further(self, task: str, record: Callable[[PromptValues], None]) -> dict[str, float]:
        context = EvaluationContext(
            roles=self._roles,
            versions=self._explorer.versions,
            sampling=self._explorer.sampling,
            seed=self._config.seed,
            scorer=self._roles.eval_scorers.get(task),
            complete=self._complete,
            record=record,
        )
        return await self._data.evaluations[task].measure(context)

    async def _complete(
        self, prompts: Sequence[Prompt], sampling: Sampling, policy: str
    ) -> list[Completion]:
        """Return a completion of each prompt, an episode where an environment serves it."""
        if not self._config.environment:
            rollout = self._roles.rollouts[policy]
            version = self._explorer.versions[policy]
            return await complete_once(prompts, rollout, version, sampling, self._config.seed)

        async def explore(prompt: Prompt, context: ExplorationContext) -> Group:
            (completion,) = await context.sample(1, policy=policy)
            return Group(prompt=prompt, samples=(Sample(completion=completion, outcome=None),))

        groups = await self._explorer.scheduler().run(
            prompts,
            explore,
            sampling=sampling,
            seed=derive_seed(self._config.seed, "evaluate"),
            done=lambda group: None,
        )
        return [group.samples[0].completion for group in groups]

    async def _improve(self, completions: Sequence[Completion]) -> list[Completion]:
        """Return held-out completions after the algorithm has refined them at test time."""
        algorithm = self._explorer.algorithm
        assert isinstance(algorithm, WorksAtTestTime)
        prompts = self._data.heldout
        first: Mapping[str, Completion] = dict(
            zip((prompt.prompt_id for prompt in prompts), completions, strict=True)
        )

        async def explore(prompt: Prompt, context: ExplorationContext) -> Group:
            better = await algorithm.improve(prompt, first[prompt.prompt_id], context)
            return Group(prompt=prompt, samples=(Sample(completion=better, outcome=None),))

        groups = await self._explorer.scheduler().run(
            prompts,
            explore,
            sampling=self._explorer.sampling,
            seed=derive_seed(self._config.seed, "test time"),
            done=lambda group: None,
        )
        return [group.samples[0].completion for group in groups]

    @property
    def _scores_alone(self) -> bool:
        """Whether the training scorer can score the held-out completions, one per prompt."""
        entries = self._config.scorer.train
        names = set(names_of(entries))
        judged = all(p.scorers is None or names & set(p.scorers) for p in self._data.heldout)
        scores = bool(entries) or bool(self._config.environment)
        return scores and judged and not any(entry.is_pairwise for entry in entries)


def _at_test_time(algorithm: Algorithm) -> bool:
    return isinstance(algorithm, WorksAtTestTime) and algorithm.at_test_time
