"""Challenger and solver with scripted policies: labels, rewards, training data, resuming."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from campaigns import check_resumed_run, make_config
from pydantic import ValidationError
from scripted_spar import ScriptedContext, make_prompt

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.challenger_solver import ChallengerSolver, uncertainty
from rayhf.algorithms.challenger_solver_config import ChallengerSolverConfig
from rayhf.algorithms.repetition import cluster_shares, repetition_clusters
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.monitoring.catalog import find
from rayhf.tiny.challenges import verified
from rayhf.types import (
    Completion,
    Example,
    Failed,
    Group,
    Outcome,
    Prompt,
    Sampling,
    Scored,
    Skipped,
)

SETTINGS: Mapping[str, object] = {
    "type": "challenger_solver",
    "tasks": 4,
    "samples": 4,
    "label": "verified",
    "challenge_template": "C {{ instruction }}",
    "task_pattern": "^(What is .*)$",
    "solve_template": "S {{ task }}",
    "answer_pattern": "Answer: ([0-9]+)$",
    "repetition": {"similarity": 1.0},
}
RIGHT = {"What is 3+4?": "3+4=7\nAnswer: 7", "What is 9-8?": "9-8=1\nAnswer: 1"}
WRONG = {"What is 3+4?": "3+4=6\nAnswer: 6", "What is 9-8?": "9-8=2\nAnswer: 2"}


def challenger_solver(**changes: object) -> ChallengerSolver:
    return ChallengerSolver(ChallengerSolverConfig.model_validate({**SETTINGS, **changes}))


class Verifying(ScriptedContext):
    """Scores answers by the rule of the tiny task; remembers the prompts that it was given."""

    fails = False

    async def score(
        self, completions: Sequence[Completion], *, prompt: Prompt | None = None
    ) -> tuple[Outcome, ...]:
        assert prompt is not None and prompt.reference_answer is None
        self.scored = [*getattr(self, "scored", []), prompt]
        await asyncio.sleep(0)
        if self.fails:
            return tuple(Failed(reason="down") for _ in completions)
        question = str(prompt.messages[-1]["content"])
        scores = verified([question] * len(completions), [c.text for c in completions])
        return tuple(Skipped(reason="-") if s is None else Scored(value=s) for s in scores)


def context_of(
    tasks: Sequence[str], answers: Mapping[str, Sequence[str]], **settings: object
) -> Verifying:
    """A challenger that writes `tasks` in turn; a solver that gives each task's answers in turn."""

    def script(policy: str, context: str, draw: int) -> str:
        text = context.removeprefix("<user>").removesuffix("<assistant>")
        if text.startswith("C "):
            assert policy == "challenger"
            return tasks[draw]
        assert policy == "policy"
        return answers[text.removeprefix("S ")][draw]

    return Verifying(script, **settings)  # type: ignore[arg-type]


def halves(task: str, right: int, of: int = 4) -> list[str]:
    return [RIGHT[task]] * right + [WRONG[task]] * (of - right)


def explore(algorithm: ChallengerSolver, context: Verifying, text: str = "numbers") -> Group:
    return asyncio.run(algorithm.explore(make_prompt(text), context))


def select(algorithm: ChallengerSolver, *groups: Group) -> Selection:
    context = SelectionContext(iteration=1, seed=1, sampling=Sampling(max_tokens=99))
    return algorithm.select(groups, context)


HARD, EASY = "What is 3+4?", "What is 9-8?"


def test_one_iteration_by_hand():
    algorithm = challenger_solver()
    tasks = [HARD, EASY, "no task here", "What is love?"]
    answers = {HARD: halves(HARD, 2), EASY: halves(EASY, 4), "What is love?": ["?"] * 4}
    context = context_of(tasks, answers)
    group = explore(algorithm, context)
    selection = select(algorithm, group)
    solver = [e for e in selection.examples if e.objective == "policy"]
    challenger = [e for e in selection.examples if e.objective == "challenger"]

    # Only the task that half of the answers solve trains the solver, after the solver's own prompt.
    assert [e.rows[0].scalars["score"] for e in solver] == [1.0, 1.0, 0.0, 0.0]
    assert {context.decode(e.rows[0].prompt_ids) for e in solver} == {f"<user>S {HARD}<assistant>"}
    credited, _ = algorithm.credit(solver)
    advantages = [e.rows[0].tokens["advantage"][0] for e in credited]
    assert advantages == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)

    # One of two valid tasks is half of them: 1 - 1/2 and 0 - 1/2; a text without a task, and one
    # that every scorer skips, are invalid.
    assert [e.rows[0].scalars["score"] for e in challenger] == [0.5, -0.5, -1.0, -1.0]
    assert {context.decode(e.rows[0].prompt_ids) for e in challenger} == {
        "<user>C numbers<assistant>"
    }
    advantages = [e.rows[0].tokens["advantage"][0] for e in challenger]
    assert advantages == pytest.approx([1.414, 0, -0.707, -0.707], abs=1e-3)
    expected = {
        "accepted": 1,
        "valid": 0.5,
        "distinct": 1,
        "rate": 0.75,
        "reward": -0.5,
        "unscored": 0,
        "unlabeled": 0,
    }
    assert selection.metrics == pytest.approx({f"tasks/{k}": v for k, v in expected.items()})
    assert all(find(name) is not None for name in {**selection.metrics, **group.metrics})
    assert selection.no_signal == 0.0


def test_samples_hold_tasks_answers_and_labels():
    tasks = [HARD, "nothing", HARD, EASY]
    context = context_of(tasks, {HARD: halves(HARD, 1), EASY: halves(EASY, 3)})
    group = explore(challenger_solver(), context)
    kinds = [sample.kind for sample in group.samples]
    assert kinds == ["task"] * 4 + ["answer"] * 8  # equal tasks are solved once
    assert [s.stats["rate"] for s in group.samples if "rate" in s.stats] == [0.25, 0.25, 0.75]
    assert [s.parent for s in group.samples if s.kind == "answer"] == [0] * 4 + [3] * 4
    ids = [prompt.prompt_id for prompt in context.scored]
    assert len(set(ids)) == 2 and "numbers" not in ids  # tasks are prompts of their own
    assert [s.outcome for s in group.samples[:4]] == [None] * 4


def test_each_task_is_a_group_of_its_own():
    algorithm = challenger_solver(scale="none")
    tasks = [HARD, EASY, "-", "-"]
    context = context_of(tasks, {HARD: halves(HARD, 2), EASY: halves(EASY, 3)})
    solver = [
        e
        for e in select(algorithm, explore(algorithm, context)).examples
        if e.objective == "policy"
    ]
    credited, _ = algorithm.credit(solver)
    advantages = [float(e.rows[0].tokens["advantage"][0]) for e in credited]
    assert advantages == [0.5, 0.5, -0.5, -0.5, 0.25, 0.25, 0.25, -0.75]


def test_repeated_tasks_are_penalized_over_the_whole_iteration():
    algorithm = challenger_solver()
    answers = {HARD: halves(HARD, 2), EASY: halves(EASY, 2)}
    first = explore(algorithm, context_of([HARD, HARD, EASY, "-"], answers), "a")
    second = explore(algorithm, context_of([HARD, "-", "-", "-"], answers), "b")
    rewards = [
        e.rows[0].scalars["score"]
        for e in select(algorithm, first, second).examples
        if e.objective == "challenger"
    ]
    assert rewards == [0.25, 0.25, 0.75, -1.0, 0.25, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("answers", "scores", "rate"),
    [
        ("7 7 7 5", [1, 1, 1, 0], 0.75),
        ("7 7 5 -", [1, 1, 0, 0], 0.5),
        ("7 7 5 5", None, 0.5),
        ("- - - -", None, 0.0),
    ],
)
def test_majority_labels(answers, scores, rate):
    algorithm = challenger_solver(label="majority", min_rate=0.4)
    texts = ["I do not know" if a == "-" else f"so\nAnswer: {a}" for a in answers.split()]
    group = explore(algorithm, context_of([HARD, "-", "-", "-"], {HARD: texts}))
    outcomes = [s.outcome for s in group.samples if s.kind == "answer"]
    assert group.samples[0].stats["rate"] == rate
    assert outcomes == ([None] * 4 if scores is None else [Scored(value=s) for s in scores])
    selection = select(algorithm, group)
    solver = [e for e in selection.examples if e.objective == "policy"]
    assert len(solver) == (0 if scores is None else 4)
    assert selection.metrics["tasks/unlabeled"] == (scores is None)
    assert ("tasks/label_accuracy" in selection.metrics) is (scores is not None)


def test_majority_labels_what_the_scorers_skip():
    task = "What is love?"
    for label, valid in (("verified", 0.0), ("verified_or_majority", 1.0)):
        algorithm = challenger_solver(label=label)
        texts = ["Answer: 1", "Answer: 1", "Answer: 2", "?"]
        group = explore(algorithm, context_of([task, "-", "-", "-"], {task: texts}))
        assert group.samples[0].stats["valid"] == valid


def test_wrong_majority_is_measured_but_trained_on():
    algorithm = challenger_solver(label="majority")
    context = context_of([HARD, "-", "-", "-"], {HARD: halves(HARD, 1)})
    selection = select(algorithm, explore(algorithm, context))
    scores = [e.rows[0].scalars["score"] for e in selection.examples if e.objective == "policy"]
    assert scores == [0, 1, 1, 1] and selection.metrics["tasks/label_accuracy"] == 0


def test_answers_without_a_score_give_no_reward():
    algorithm = challenger_solver()
    context = context_of([HARD, "-", "-", "-"], {HARD: halves(HARD, 2)})
    context.fails = True
    group = explore(algorithm, context)
    selection = select(algorithm, group)
    assert selection.examples == () and selection.metrics["tasks/unscored"] == 1
    assert all(isinstance(s.outcome, Failed) for s in group.samples if s.kind == "answer")
    assert not algorithm.has_signal(group) and selection.no_signal == 1.0


def test_truncated_and_long_texts():
    algorithm = challenger_solver()
    long = "What is 1" + "+1" * 60 + "?"
    context = context_of([f"{HARD}...", long, EASY, "-"], {EASY: halves(EASY, 2)}, limit=60)
    group = explore(algorithm, context)
    assert [s.stats["valid"] for s in group.samples[:4]] == [0, 0, 1, 0]
    assert group.metrics["tasks/too_long"] == 1
    nothing = explore(algorithm, context_of([], {}, limit=3))
    assert nothing.samples == () and select(algorithm, nothing).examples == ()


def test_policies_and_losses():
    separate, shared = challenger_solver(), challenger_solver(challenger={"shared": True})
    assert separate.policies == ("policy", "challenger") and shared.policies == ("policy",)
    assert separate.samples == 4 * 5
    assert separate.trained_policy("challenger") == "challenger"
    assert shared.trained_policy("challenger") == "policy"
    assert separate.other_policy("challenger").lr == 1e-6
    assert separate.train_schedule("challenger").examples_per_step == 128
    context = context_of([HARD, EASY, "-", "-"], {HARD: halves(HARD, 2), EASY: halves(EASY, 3)})
    examples = select(separate, explore(separate, context)).examples
    for objective in ("policy", "challenger"):
        own = [e for e in examples if e.objective == objective]
        if objective == "policy":
            own, _ = separate.credit(own)
            own = [_with_reference(e) for e in own]
        tokens = sum(len(e.rows[0].response_ids) for e in own)
        totals = Totals(tokens=tokens, rows=len(own), examples=len(own))
        out = separate.loss(objective)(
            torch.full((tokens,), -1.0, requires_grad=True), build_micro_batch(own, totals, "cpu")
        )
        assert math.isfinite(out.loss.item())
        assert ("ppo/kl_loss" in out.metrics) is (objective == "policy")


def _with_reference(example: Example) -> Example:
    row = example.rows[0]
    return replace(example, rows=(row.with_tokens(ref_logp=row.tokens["behavior_logp"]),))


def test_reward_is_largest_where_half_succeed():
    assert [uncertainty(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


def test_clusters_of_similar_texts():
    texts = ["What is 3+4?", "what is 3 + 4 ?", "What is 3+5?", "Who are you?"]
    assert repetition_clusters(texts, 1.0) == [0, 0, 1, 2]
    assert repetition_clusters(texts, 0.5) == [0, 0, 0, 1]
    assert cluster_shares([0, 0, 0, 1]) == [0.75, 0.75, 0.75, 0.25]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"min_rate": 0.8, "max_rate": 0.3}, "expected min_rate to be smaller"),
        ({"solve_template": "{{ instruction }}"}, "unknown variable instruction"),
        ({"task_pattern": "What"}, "expected a group"),
        ({"tasks": 1}, "greater than or equal to 2"),
        ({"challenger": {"shared": True, "model": "m"}}, "model must be null"),
    ],
)
def test_invalid_settings_are_refused(changes, expected):
    with pytest.raises(ValidationError, match=expected):
        challenger_solver(**changes)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"run": {"max_staleness": 1}}, "run.max_staleness is 1"),
        ({"learner": {"schedule": "linear"}}, "expected constant"),
    ],
)
def test_contradicting_sections_are_refused(tmp_path, sections, expected):
    config = make_config(
        tmp_path, algorithm={**SETTINGS, "challenger": {"shared": True}}, **sections
    )
    with pytest.raises(ConfigError, match=expected):
        config.algorithm.check_campaign(config)


@pytest.mark.parametrize("shared", [False, True])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, shared):
    """Fake policies write three numbers: the first digit of an answer is its final answer."""
    algorithm = {
        **SETTINGS,
        "label": "majority",
        "task_pattern": "^(.*)$",
        "answer_pattern": r"^(\d)",
        "kl": {"coef": 0.0},
        "challenger": {"shared": shared, "examples_per_step": 8},
    }
    assert check_resumed_run(tmp_path, algorithm)[-1]["challenger/steps"] > 0
