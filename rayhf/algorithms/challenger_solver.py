"""Challenger and solver: tasks at the edge of the solver's ability (R-Zero, Huang et al. 2025).

For each prompt, a subject, the challenger writes tasks and the solver ("policy") answers each of
them several times; p is the share of right answers. The challenger's reward is 1 - 2|p - 1/2|, less
a penalty on repetition, which as in the source's code is not cut at 0; the solver is trained on the
tasks whose p is in a band. Both by GRPO: a prompt's tasks are a group, and so are a task's answers.
The source trains the two in turns of several steps, and samples again for the solver; here both
take their steps in every iteration, on the same samples (ours).

Everything is in the group's samples (challenger_tasks.py): tasks and labels are those of one
iteration, and nothing is kept besides the run directory's samples.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext, scored
from rayhf.algorithms.challenger_solver_config import ChallengerSolverConfig
from rayhf.algorithms.challenger_tasks import Solved, group_samples, task_prompt, task_text
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.conversation import Dialogue, instruction_text
from rayhf.algorithms.group_gradient import gradient_examples
from rayhf.algorithms.grpo import GRPO
from rayhf.algorithms.policy_gradient import IterationTokens
from rayhf.algorithms.repetition import cluster_shares, repetition_clusters
from rayhf.algorithms.second_policy import SecondPolicy
from rayhf.config.registry import LOSSES
from rayhf.data.chat import Chat
from rayhf.losses.base import Loss
from rayhf.types import Example, Group, Prompt, Row, Sample, make_row, token_array


class ChallengerSolver(SecondPolicy, GRPO):
    """Tasks by one policy at the edge of the other's ability (R-Zero, Huang et al. 2025)."""

    Config = ChallengerSolverConfig
    config: ChallengerSolverConfig

    def __init__(self, config: ChallengerSolverConfig) -> None:
        super().__init__(config)
        self.samples = config.tasks * (1 + config.samples)
        self.set_role("challenger", config.challenger)
        self._challenge = Dialogue(config.challenge_template, "algorithm.challenge_template")
        self._solve = Dialogue(config.solve_template, "algorithm.solve_template")
        self._task_pattern = re.compile(config.task_pattern)
        self._answer_pattern = re.compile(config.answer_pattern)

    def check_chat(self, chat: Chat, prompt: Prompt) -> None:
        """Check that the policy's chat template renders both conversations. Raises ConfigError."""
        self._challenge.check(chat, {"instruction": instruction_text(prompt.messages)})
        self._solve.check(chat, {"task": "A task."})

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Let the challenger write tasks and the solver answer each of them."""
        config = self.config
        messages = self._challenge.render({"instruction": instruction_text(prompt.messages)})
        asked = token_array(context.render(messages))
        if context.room(asked) < 1:
            return Group(prompt=prompt, samples=(), metrics={"tasks/too_long": 1.0})
        written = await context.sample(
            config.tasks,
            context=asked,
            sampling=replace(
                context.sampling,
                max_tokens=config.challenger.max_tokens or context.sampling.max_tokens,
            ),
            policy=self.role_policy,
        )
        tasks = [task_text(self._task_pattern, completion) for completion in written]
        contexts = {
            task: token_array(context.render(self._solve.render({"task": task})))
            for task in dict.fromkeys(tasks)
            if task is not None
        }
        fitting = {task: ids for task, ids in contexts.items() if context.room(ids) > 0}
        answers = await asyncio.gather(
            *(context.sample(config.samples, context=ids) for ids in fitting.values())
        )
        outcomes = await asyncio.gather(
            *(
                context.score(each, prompt=task_prompt(prompt, task))
                for task, each in zip(fitting, answers, strict=True)
            )
        )
        solved = {
            task: Solved(context_ids=fitting[task], answers=each, outcomes=given)
            for task, each, given in zip(fitting, answers, outcomes, strict=True)
        }
        pairs = list(zip(written, tasks, strict=True))
        return Group(
            prompt=prompt,
            samples=group_samples(config, self._answer_pattern, pairs, asked, solved),
            metrics={"tasks/too_long": float(len(contexts) - len(fitting))},
        )

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make examples of the accepted tasks' answers and of all rewarded tasks."""
        self._max_tokens = context.sampling.max_tokens
        rewards, metrics = self._rewards(groups)
        solver: list[Example] = []
        challenger: list[Example] = []
        accepted = 0
        for number, group in enumerate(groups):
            for task, answers in self._accepted(group).items():
                accepted += 1
                for index, score in answers.items():
                    completion = group.samples[index].completion
                    shaped = self._shape_score(completion, score, context.sampling)
                    row = make_row(group, index, score=shaped)
                    scalars = {**row.scalars, "task": float(task)}
                    solver.append(Example(rows=(replace(row, scalars=scalars),)))
            challenger += gradient_examples(
                group, rewards[number], objective="challenger", scale=self.config.scale
            )
        without = sum(not self.has_signal(group) for group in groups)
        return Selection(
            examples=(*solver, *challenger),
            metrics={"tasks/accepted": float(accepted), **metrics},
            no_signal=without / max(len(groups), 1),
        )

    def has_signal(self, group: Group) -> bool:
        """Whether the solver is trained on any task of a group."""
        return bool(self._accepted(group))

    def _accepted(self, group: Group) -> dict[int, dict[int, float]]:
        """Return the scores of the answers, by task and answer, of the tasks in the band."""
        answers: dict[int, dict[int, float]] = {}
        for index, sample, score in scored(group):
            assert sample.parent is not None
            rate = group.samples[sample.parent].stats["rate"]
            if self.config.min_rate <= rate <= self.config.max_rate:
                answers.setdefault(sample.parent, {})[index] = score
        return {task: each for task, each in answers.items() if len(set(each.values())) > 1}

    def _rewards(self, groups: Sequence[Group]) -> tuple[list[dict[int, float]], dict[str, float]]:
        """Return the challenger's rewards, by group and text, and metrics.

        A task whose answers could not be scored has no reward.
        """
        texts = [
            (number, index, sample)
            for number, group in enumerate(groups)
            for index, sample in enumerate(group.samples)
            if sample.kind == "task"
        ]
        valid = [
            (number, index, sample) for number, index, sample in texts if sample.stats["valid"]
        ]
        repetition = self.config.repetition
        clusters = repetition_clusters(
            [task_text(self._task_pattern, sample.completion) or "" for _, _, sample in valid],
            repetition.similarity,
        )
        places = [(number, index) for number, index, _ in valid]
        share_of = dict(zip(places, cluster_shares(clusters), strict=True))
        rewards: list[dict[int, float]] = [{} for _ in groups]
        for number, index, sample in texts:
            if not sample.stats["valid"]:
                rewards[number][index] = self.config.invalid_reward
            elif "rate" in sample.stats:
                penalty = repetition.weight * share_of[number, index]
                rewards[number][index] = uncertainty(sample.stats["rate"]) - penalty
        rates = [sample.stats["rate"] for _, _, sample in valid if "rate" in sample.stats]
        metrics = {"tasks/unscored": float(len(valid) - len(rates))}
        if texts:
            metrics["tasks/valid"] = len(valid) / len(texts)
        if valid:
            metrics["tasks/distinct"] = len(set(clusters)) / len(valid)
        if rates:
            metrics["tasks/rate"] = float(np.mean(rates))
        if values := [reward for group in rewards for reward in group.values()]:
            metrics["tasks/reward"] = float(np.mean(values))
        return rewards, metrics | _label_metrics(groups, self.config.pass_score)

    def _tokens(self, rows: Sequence[Row]) -> IterationTokens:
        """Return the rows' tokens; the answers to one task are a group."""
        tokens = super()._tokens(rows)
        return replace(
            tokens, prompt_ids=[f"{row.prompt_id} {row.scalars['task']}" for row in rows]
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the solver's loss, or the challenger's: the same without a KL term."""
        if objective == "policy":
            return super().loss()
        loss: Loss = LOSSES.build(
            self.config.loss,
            importance=self.config.importance,
            max_tokens=self.config.challenger.max_tokens or self._max_tokens,
        )
        return loss


def uncertainty(rate: float) -> float:
    """Return the reward of a task by the solver's success rate (R-Zero, section 3.2).

    1 where half of the answers are right, 0 where all or none are.
    """
    return 1.0 - 2.0 * abs(rate - 0.5)


def _label_metrics(groups: Sequence[Group], pass_score: float) -> dict[str, float]:
    """Return how many tasks have no label, and the share of labels that the scorers confirm."""
    unlabeled = 0
    confirmed: list[bool] = []
    for group in groups:
        by_task: dict[int, list[Sample]] = {}
        for sample in group.samples:
            if sample.parent is not None:
                by_task.setdefault(sample.parent, []).append(sample)
        for answers in by_task.values():
            unlabeled += all(answer.outcome is None for answer in answers)
            agreeing = [
                answer.stats["verified"] >= pass_score
                for _, answer, score in scored(replace(group, samples=tuple(answers)))
                if score >= pass_score and "verified" in answer.stats
            ]
            confirmed += agreeing[:1]
    metrics = {"tasks/unlabeled": float(unlabeled)}
    if confirmed:
        metrics["tasks/label_accuracy"] = float(np.mean(confirmed))
    return metrics
