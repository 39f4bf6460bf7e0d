"""Training on one iteration: from its groups to optimizer steps (select, annotate, credit, step).

Synchronization: annotations (reference, critic, the learner before its first step) run
concurrently; then credit; then the steps of one objective after the other, "policy" first.
Selection and credit run in a thread, so that the event loop keeps the engines busy.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from rayhf.algorithms.base import (
    Algorithm,
    SelectionContext,
    TakesLabels,
    TakesThumbs,
    TrainsCritic,
    TrainsSeveralPolicies,
    population_of,
    trained_policy,
)
from rayhf.blocking import release
from rayhf.campaign.annotation import Annotator, Timed
from rayhf.campaign.drift import drift_kl, initial_rows
from rayhf.config.schema import CampaignConfig
from rayhf.control.labels import label_is_due, labeled_examples, unanswered
from rayhf.losses.value import explained_variance
from rayhf.monitoring.observer import Observer
from rayhf.roles import Learner, Roles
from rayhf.run_dir.store import RunDir
from rayhf.types import PEOPLE, Batch, Example, Group, Row, Sampling, derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedExamples:
    """The examples that an iteration trains on."""

    examples: list[Example]
    prompt_ids: tuple[str, ...]
    """Prompts that are spread over the optimizer steps, also those without examples."""


class Trainer:
    """Selects, credits and trains on the examples of an iteration."""

    def __init__(
        self,
        config: CampaignConfig,
        *,
        algorithm: Algorithm,
        roles: Roles,
        store: RunDir,
        observer: Observer,
        sampling: Sampling,
        timed: Timed,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.roles = roles
        self.store = store
        self.observer = observer
        self.sampling = sampling
        self._timed = timed
        self.annotator = Annotator(
            config,
            algorithm=algorithm,
            roles=roles,
            observer=observer,
            context=self._selection_context,
            past=store.population.read_by,
            timed=timed,
        )
        self._initial_rows: list[Row] | None = None
        """Rows of the first iteration, once they were read."""

    async def select(
        self, iteration: int, groups: Sequence[Group], metrics: dict[str, float]
    ) -> SelectedExamples:
        """Select the examples to train on and store them; adds counts to `metrics`."""
        labels = self._labels(iteration) if isinstance(self.algorithm, TakesLabels) else ()
        context = replace(
            self._selection_context(iteration),
            earlier=self.store.read_examples,
            labels=[label for label in labels if len(label.rows) == 2],
            thumbs=[label for label in labels if len(label.rows) == 1],
            unanswered=partial(self._unanswered, iteration),
        )
        selection = await asyncio.to_thread(self.algorithm.select, groups, context)
        metrics |= selection.metrics
        if selection.no_signal is not None:
            metrics["selection/no_signal"] = selection.no_signal
        self.store.write_examples(iteration, selection.examples)
        trained = [e for e in selection.examples if e.objective != PEOPLE]
        return SelectedExamples(
            examples=trained,
            prompt_ids=_trained_prompts(groups, trained, self.config.prompts.batch),
        )

    def _selection_context(self, iteration: int) -> SelectionContext:
        """Return the context of a selection from an iteration's groups alone."""
        return SelectionContext(
            iteration=iteration,
            seed=derive_seed(self.config.seed, "select", iteration),
            sampling=self.sampling,
        )

    async def learn(
        self, iteration: int, selected: SelectedExamples, metrics: dict[str, float]
    ) -> set[str]:
        """Train on the iteration's examples and fill `metrics`.

        Returns the names of the policies whose weights changed.
        """
        metrics["learner/steps"] = 0
        changed: set[str] = set()
        objectives = {example.objective for example in selected.examples}
        for objective in sorted(objectives, key=lambda name: (name != "policy", name)):
            examples = [e for e in selected.examples if e.objective == objective]
            if objective == "policy":
                trains = await self._learn_policy(iteration, selected.prompt_ids, examples, metrics)
            else:
                trains = await self._learn_other(iteration, objective, examples, metrics)
            changed |= {trained_policy(self.algorithm, objective)} if trains else set()
        await self.annotator.close(iteration)
        return changed

    def _labels(self, iteration: int) -> tuple[Example, ...]:
        def warn(line: str) -> None:
            self.observer.event("warn", line)

        labels = self.store.inbox.take(
            "labels", iteration, is_due=lambda row: label_is_due(row, iteration), warn=warn
        )
        if not isinstance(self.algorithm, TakesThumbs):
            thumbs = [label for label in labels if "completion_id" in label]
            labels = [label for label in labels if "completion_id" not in label]
            if thumbs:  # written by hand: a submission is refused
                warn(f"skipped {len(thumbs)} thumbs: {self.config.algorithm.type} trains on pairs")
        return labeled_examples(self.store.path, labels, warn=warn)

    def _unanswered(self, iteration: int, earlier: int) -> tuple[Example, ...]:
        """Return the examples that `earlier` left to people and that they have not judged."""
        pairs = self.store.read_examples(earlier, objective=PEOPLE)
        if not pairs:
            return ()
        since = range(earlier + 1, iteration + 1)
        labels = self.store.inbox.taken("labels", since, warn=partial(self.observer.event, "warn"))
        return unanswered(earlier, pairs, labels)

    async def _learn_policy(
        self,
        iteration: int,
        prompt_ids: Sequence[str],
        examples: Sequence[Example],
        metrics: dict[str, float],
    ) -> bool:
        rows = await self.annotator.annotate(
            iteration,
            prompt_ids,
            [row for example in examples for row in example.rows],
            old_logp=self.steps_per_iteration > 1
            or self.algorithm.needs_old_logp
            or population_of(self.algorithm).size > 0,
            metrics=metrics,
        )
        credited, credit_metrics = await asyncio.to_thread(
            lambda: self.algorithm.credit(_with_rows(examples, rows))
        )
        metrics |= credit_metrics
        self.store.write_credit(iteration, credited)
        batches = await asyncio.to_thread(self._batches, iteration, prompt_ids, credited)
        # From here on only the batches have the rows, and each is freed once it is trained on.
        await release(rows)
        del credited
        trains = not isinstance(self.algorithm, TrainsCritic) or self.algorithm.trains_policy(
            iteration
        )
        steps: list[dict[str, float]] = []
        async with self._timed("learner"):
            count = len(batches)
            while batches:
                self.observer.phase(iteration, "learn", len(steps), count)
                steps.append(await self._step(batches.pop(0), trains))
        metrics |= over_steps(steps)
        metrics["learner/steps"] = len(steps)
        metrics |= await self._drift(iteration, examples)
        return trains

    async def _drift(self, iteration: int, examples: Sequence[Example]) -> dict[str, float]:
        """Return the distance from the initial policy; nothing where that is the reference."""
        schedule = self.algorithm.reference
        if schedule is None or not schedule.moves:
            return {}
        if self._initial_rows is None:
            first = examples if iteration == 1 else self.store.read_examples(1)
            self._initial_rows = initial_rows(first)
        rows = self._initial_rows
        if not rows:
            return {}
        async with self._timed("reference"):
            temperature = self.config.train_temperature
            logp = await self.roles.learners["policy"].outputs(rows, temperature=temperature)
        return {"policy/drift_kl": drift_kl(rows, logp)}

    async def _learn_other(
        self, iteration: int, objective: str, examples: Sequence[Example], metrics: dict[str, float]
    ) -> bool:
        """Train on a further objective with its own schedule; its metrics carry its name."""
        assert isinstance(self.algorithm, TrainsSeveralPolicies)
        schedule = self.algorithm.train_schedule(objective)
        learner: Learner = self.roles.learners[self.algorithm.trained_policy(objective)]
        steps: list[dict[str, float]] = []
        async with self._timed("learner"):
            for epoch in range(schedule.epochs):
                order = list(examples)
                seed = derive_seed(self.config.seed, objective, iteration, epoch)
                random.Random(seed).shuffle(order)
                for start in range(0, len(order), schedule.examples_per_step):
                    self.observer.phase(iteration, f"learn {objective}", epoch, schedule.epochs)
                    part = tuple(order[start : start + schedule.examples_per_step])
                    batch = Batch(examples=part, temperature=self.config.train_temperature)
                    steps.append(await learner.step(batch, self.algorithm.loss(objective)))
        for name, value in over_steps(steps).items():
            if "learner/" in name:
                metrics[name.replace("learner/", f"{objective}/")] = value
            else:
                metrics[f"{objective}/{name}"] = value
        metrics[f"{objective}/steps"] = len(steps)
        return bool(steps)

    async def _step(self, batch: Batch, trains_policy: bool) -> dict[str, float]:
        work: dict[str, Awaitable[dict[str, float]]] = {}
        if trains_policy:
            work["policy"] = self.roles.learners["policy"].step(batch, self.algorithm.loss())
        if self.roles.critic is not None and isinstance(self.algorithm, TrainsCritic):
            work["critic"] = self.roles.critic.step(batch, self.algorithm.critic_loss())
        steps = dict(zip(work, await asyncio.gather(*work.values()), strict=True))
        metrics = dict(steps.get("policy", {}))
        if "critic" in steps:
            # The critic is a learner too: its loss, gradient norm and rate get its own name.
            critic = steps["critic"]
            metrics |= {name.replace("learner/", "critic/"): v for name, v in critic.items()}
            metrics["critic/explained_variance"] = explained_variance(critic)
        return metrics

    @property
    def steps_per_iteration(self) -> int:
        """Planned optimizer steps of the policy per iteration."""
        learner = self.config.learner
        prompts = self.config.prompts.batch
        return learner.epochs * (prompts // (learner.prompts_per_step or prompts))

    def _batches(
        self, iteration: int, prompt_ids: Sequence[str], examples: Sequence[Example]
    ) -> list[Batch]:
        """Return one batch per optimizer step: prompts shuffled, a prompt's examples together.

        An iteration has the same number of steps whatever was dropped or mixed in: prompts that are
        not its own (earlier iterations, offline pairs) are spread over its steps.
        """
        steps = self.steps_per_iteration // self.config.learner.epochs
        order = list(dict.fromkeys([*prompt_ids, *(e.rows[0].prompt_id for e in examples)]))
        batches = []
        for epoch in range(self.config.learner.epochs):
            shuffled = list(order)
            if steps > 1:
                seed = derive_seed(self.config.seed, "minibatch", iteration, epoch)
                random.Random(seed).shuffle(shuffled)
            step_of: dict[str, int] = {}
            for step in range(steps):
                start = len(shuffled) * step // steps
                stop = len(shuffled) * (step + 1) // steps
                step_of |= dict.fromkeys(shuffled[start:stop], step)
            parts: list[list[Example]] = [[] for _ in range(steps)]
            for example in examples:
                parts[step_of[example.rows[0].prompt_id]].append(example)
            batches += [
                Batch(examples=tuple(part), temperature=self.config.train_temperature)
                for part in parts
                if part
            ]
        return batches


def _trained_prompts(
    groups: Sequence[Group], examples: Sequence[Example], batch: int
) -> tuple[str, ...]:
    """Return the prompts of the groups without those that refills replace.

    Where more than `batch` were explored, surplus ones without examples are left out, so that the
    others are spread evenly over the optimizer steps.
    """
    prompts = [group.prompt.prompt_id for group in groups]
    surplus = len(prompts) - batch
    if surplus <= 0:
        return tuple(prompts)
    trained = {example.rows[0].prompt_id for example in examples}
    replaced = set([prompt for prompt in prompts if prompt not in trained][:surplus])
    return tuple(prompt for prompt in prompts if prompt not in replaced)


def _with_rows(examples: Sequence[Example], rows: Sequence[Row]) -> list[Example]:
    """Return the examples with other rows, as many and in the same order."""
    remaining = iter(rows)
    # `dataclasses.replace` is three times slower.
    return [
        Example(
            rows=tuple(islice(remaining, len(e.rows))),
            scalars=e.scalars,
            objective=e.objective,
            iterations_back=e.iterations_back,
        )
        for e in examples
    ]


def over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over an iteration's optimizer steps, and maxima for names that end in _max."""
    names = sorted({name for step in steps for name in step})
    values = {name: [step[name] for step in steps if name in step] for name in names}
    return {
        name: float(max(v) if name.endswith("_max") else np.mean(v)) for name, v in values.items()
    }
