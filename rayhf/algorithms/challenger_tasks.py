"""Tasks of a challenger, the solver's answers to them, and the answers' labels.

A group's samples are the challenger's texts (kind "task") and then the solver's answers (kind
"answer", parent: the first text with its task). A text's stats:

    valid    1 where it has a task that can be labeled, else 0
    first    index of the first text of the group with the same task
    rate     share of the task's scored answers that are right; missing where none was scored

An answer's stat "verified" is the scorers' score where its label is the majority's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayhf.algorithms.challenger_solver_config import ChallengerSolverConfig
from rayhf.algorithms.conversation import last_group
from rayhf.types import (
    Completion,
    Outcome,
    Prompt,
    Sample,
    Scored,
    Skipped,
    TokenArray,
    derive_seed,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of one task's answers."""

    outcomes: Sequence[Outcome | None]
    """One per answer; None where the task has no label."""
    rate: float | None
    """Share of right answers; None where no answer could be scored."""
    by_majority: bool
    """Whether they are the majority's; else they are the scorers'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A task with the solver's answers."""

    context_ids: TokenArray
    """The conversation that the answers continue."""
    answers: Sequence[Completion]
    outcomes: Sequence[Outcome]
    """The scorers'."""


def task_text(pattern: re.Pattern[str], written: Completion) -> str | None:
    """Return the task in a challenger's text; None where it has none or is truncated."""
    if written.finish_reason == "length":
        return None
    return (last_group(pattern, written.text) or "").strip() or None


def task_prompt(prompt: Prompt, task: str) -> Prompt:
    """Return a task as a prompt of its own, for scorers; it has no reference answer."""
    return replace(
        prompt,
        prompt_id=f"{prompt.prompt_id}-{derive_seed('task', task):016x}",
        messages=({"role": "user", "content": task},),
        reference_answer=None,
    )


def label_answers(
    config: ChallengerSolverConfig, pattern: re.Pattern[str], solved: Solved
) -> Labels | None:
    """Return the labels of a task's answers; None for a task that is invalid."""
    if config.label != "majority":
        if not all(isinstance(outcome, Skipped) for outcome in solved.outcomes):
            return _verified(solved.outcomes, config.pass_score)
        if config.label == "verified":
            return None
    return _majority(
        [
            None if answer.finish_reason == "length" else last_group(pattern, answer.text)
            for answer in solved.answers
        ]
    )


def _verified(outcomes: Sequence[Outcome], pass_score: float) -> Labels:
    right = [outcome.value >= pass_score for outcome in outcomes if isinstance(outcome, Scored)]
    rate = sum(right) / len(right) if right else None
    return Labels(outcomes=outcomes, rate=rate, by_majority=False)


def _majority(answers: Sequence[str | None]) -> Labels:
    stripped = [None if answer is None else answer.strip() for answer in answers]
    counts = Counter(answer for answer in stripped if answer)
    votes = [count for _, count in counts.most_common(2)]
    rate = votes[0] / len(answers) if votes else 0.0
    if not votes or (len(votes) > 1 and votes[0] == votes[1]):
        return Labels(outcomes=[None] * len(answers), rate=rate, by_majority=True)
    label = counts.most_common(1)[0][0]
    outcomes = [Scored(value=float(answer == label)) for answer in stripped]
    return Labels(outcomes=outcomes, rate=rate, by_majority=True)


def group_samples(
    config: ChallengerSolverConfig,
    pattern: re.Pattern[str],
    written: Sequence[tuple[Completion, str | None]],
    context_ids: TokenArray,
    solved: dict[str, Solved],
) -> tuple[Sample, ...]:
    """Return the samples of a group.

    Args:
        config: says how answers are labeled.
        pattern: finds the final answer.
        written: the challenger's texts, each with its task.
        context_ids: the conversation that they continue.
        solved: answers by task; a task that is missing is invalid.
    """
    labels = {task: label_answers(config, pattern, each) for task, each in solved.items()}
    first: dict[str, int] = {}
    samples: list[Sample] = []
    for index, (completion, task) in enumerate(written):
        stats = {"valid": 0.0}
        label = None if task is None else labels.get(task)
        if task is not None and label is not None:
            stats = {"valid": 1.0, "first": float(first.setdefault(task, index))}
            if label.rate is not None:
                stats["rate"] = label.rate
        samples.append(
            Sample(
                completion=completion,
                outcome=None,
                kind="task",
                context_ids=context_ids,
                stats=stats,
            )
        )
    for task, parent in first.items():
        label = labels[task]
        assert label is not None
        each = solved[task]
        for answer, outcome, given in zip(each.answers, label.outcomes, each.outcomes, strict=True):
            measured = given if label.by_majority else None
            samples.append(
                Sample(
                    completion=answer,
                    outcome=outcome,
                    context_ids=each.context_ids,
                    parent=parent,
                    stats={"verified": measured.value} if isinstance(measured, Scored) else {},
                )
            )
    return tuple(samples)
