"""Self-rewarding with a scripted policy: judgments, pairs, the judge's quality and training."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from campaigns import check_resumed_run, make_config
from pydantic import ValidationError
from scripted_spar import ScriptedContext, make_prompt

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.self_rewarding import SelfRewarding
from rayhf.algorithms.self_rewarding_config import SelfRewardingConfig
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.monitoring.catalog import find
from rayhf.types import Failed, Group, Invalid, Outcome, Sampling, Scored

SETTINGS: Mapping[str, object] = {
    "type": "self_rewarding",
    "samples": 3,
    "judgments": 3,
    "judge_template": "J {{ instruction }}|{{ response }}",
    "verdict_pattern": "(yes|no)$",
    "verdicts": {"Yes": 1.0, "no": 0.0},
    "pass_verdict": 0.5,
}
GOLD: Mapping[str, Outcome] = {
    "good": Scored(value=1.0),
    "bad": Scored(value=0.0),
    "odd": Scored(value=0.0),
}


def self_rewarding(**changes: object) -> SelfRewarding:
    return SelfRewarding(SelfRewardingConfig.model_validate({**SETTINGS, **changes}))


def context_of(
    answers: Sequence[str],
    judgments: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Outcome] = GOLD,
    judge: str = "policy",
    **settings: object,
) -> ScriptedContext:
    def script(policy: str, context: str, draw: int) -> str:
        if not context:
            return answers[draw]
        assert policy == judge
        return judgments[context.removesuffix("<assistant>").split("|")[1]][draw]

    return ScriptedContext(script, outcomes=outcomes, **settings)  # type: ignore[arg-type]


def explore(algorithm: SelfRewarding, context: ScriptedContext) -> Group:
    return asyncio.run(algorithm.explore(make_prompt(), context))


def select(algorithm: SelfRewarding, *groups: Group) -> Selection:
    context = SelectionContext(iteration=1, seed=1, sampling=Sampling(max_tokens=99))
    return algorithm.select(groups, context)


JUDGMENTS = {
    "good": ["a yes", "b yes", "c no"],
    "bad": ["a no", "b yes", "hm"],
    "odd": ["a no", "b no", "c no..."],
}


def test_the_judge_makes_the_pair_and_the_scorers_measure_it():
    algorithm = self_rewarding()
    group = explore(algorithm, context_of(["good", "bad", "odd"], JUDGMENTS))
    scores = [s.outcome.value for s in group.samples if s.kind == "answer"]
    assert scores == pytest.approx([2 / 3, 1 / 2, 0])
    selection = select(algorithm, group)
    (pair,) = selection.examples
    texts = [group.samples[row.sample].completion.text for row in pair.rows]
    assert texts == ["good", "odd"] and pair.scalars["margin"] == pytest.approx(2 / 3)
    expected = {
        "gold_mean": 1 / 3,
        "gold_missing": 0,
        "gold_margin": 1,
        "judge_unparsable": 2 / 9,  # "hm", and a truncated judgment
        "judge_accuracy": 5 / 7,
        "pair_accuracy": 1,
        "pair_ties": 0,
    }
    measured = {k: v for k, v in selection.metrics.items() if k.startswith("self_rewarding/")}
    assert measured == pytest.approx({f"self_rewarding/{k}": v for k, v in expected.items()})
    assert all(find(name) is not None for name in {**selection.metrics, **group.metrics})


def test_scorers_decide_nothing():
    algorithm = self_rewarding()
    wrong = {"good": Scored(value=0.0), "bad": Scored(value=1.0), "odd": Failed(reason="down")}
    rows = []
    for outcomes in (GOLD, wrong):
        group = explore(algorithm, context_of(["good", "bad", "odd"], JUDGMENTS, outcomes))
        rows.append([row.sample for e in select(algorithm, group).examples for row in e.rows])
    assert rows[0] == rows[1]
    metrics = select(algorithm, group).metrics
    assert metrics["self_rewarding/gold_missing"] == 1
    assert metrics["self_rewarding/pair_accuracy"] == 0


def test_unparsed_verdicts_are_never_scores():
    algorithm = self_rewarding()
    judgments = {"good": ["hm"] * 3, "bad": ["a yes", "hm", "hm"], "odd": ["no", "x", "x"]}
    group = explore(algorithm, context_of(["good", "bad", "odd"], judgments))
    outcomes = [s.outcome for s in group.samples if s.kind == "answer"]
    assert outcomes == [
        Invalid(reason="none of its 3 judgments has a verdict"),
        Scored(value=1.0),
        Scored(value=0.0),
    ]
    assert "verdict" not in group.samples[3].stats


def test_equal_completions_are_judged_once_and_ties_dropped():
    algorithm = self_rewarding()
    context = context_of(["good", "good", "bad"], {"good": ["yes"] * 3, "bad": ["yes"] * 3})
    group = explore(algorithm, context)
    assert [s.kind for s in group.samples] == ["answer"] * 3 + ["judgement"] * 6
    metrics = select(algorithm, group).metrics
    assert metrics["pairs/ties"] > 0 and metrics["self_rewarding/pair_ties"] == 1
    assert "self_rewarding/pair_accuracy" not in metrics


def test_numeric_verdicts_by_default():
    algorithm = SelfRewarding(SelfRewardingConfig())
    judged = ["Score: 4", "about Score: 2 and then\nScore: 3.5", "Score: 9", "4 points"]
    completions = asyncio.run(ScriptedContext(lambda policy, text, draw: judged[draw]).sample(4))
    assert [algorithm.verdict(c) for c in completions] == [4.0, 3.5, None, None]
    anything = SelfRewarding(SelfRewardingConfig(verdict_pattern="^(.*)$"))
    texts = ["nan", "inf", "x", "2"]
    completions = asyncio.run(ScriptedContext(lambda policy, text, draw: texts[draw]).sample(4))
    assert [anything.verdict(c) for c in completions] == [None, None, None, 2.0]


def test_requests_have_the_judges_settings():
    algorithm = self_rewarding(judge_temperature=0.4, judge={"max_tokens": 7})
    context = context_of(["good", "bad", "odd"], JUDGMENTS)
    explore(algorithm, context)
    settings = {(n, s.temperature, s.max_tokens) for _, _, n, s in context.sampled[1:]}
    assert settings == {(3, 0.4, 7)}
    short = context_of(["good", "bad", "odd"], JUDGMENTS, limit=5)
    group = explore(algorithm, short)
    assert group.metrics["self_rewarding/too_long"] == 3
    assert all(isinstance(s.outcome, Invalid) for s in group.samples)


def test_trained_judge_is_rewarded_for_agreement():
    algorithm = self_rewarding(train_judge=True)
    group = explore(algorithm, context_of(["good", "bad", "odd"], JUDGMENTS))
    selection = select(algorithm, group)
    judge = [e for e in selection.examples if e.objective == "judge"]
    rewards = {
        group.samples[e.rows[0].sample].completion.text: e.rows[0].scalars["score"] for e in judge
    }
    # "good": yes yes no; "bad": no yes hm; "odd": no no and a truncated no.
    assert [e.rows[0].scalars["score"] for e in judge] == [1, 1, 0, 1, 0, 0, 1, 1, 0]
    assert rewards["hm"] == 0.0
    prompts = {"".join(map(chr, e.rows[0].prompt_ids)) for e in judge}
    assert prompts == {f"<user>J do it|{text}<assistant>" for text in ("good", "bad", "odd")}
    advantages = [e.rows[0].tokens["advantage"][0] for e in judge[:3]]
    assert advantages == pytest.approx([0.577, 0.577, -1.155], abs=1e-3)
    assert len([e for e in selection.examples if e.objective == "policy"]) == 1
    untrained = select(self_rewarding(), group)
    assert all(e.objective == "policy" for e in untrained.examples)


def test_judgments_without_truth_or_without_contrast_train_nothing():
    algorithm = self_rewarding(train_judge=True)
    outcomes = {**GOLD, "good": Failed(reason="down")}
    judgments = {**JUDGMENTS, "bad": ["a no", "b no", "c no"]}
    group = explore(algorithm, context_of(["good", "bad", "odd"], judgments, outcomes))
    judge = [e for e in select(algorithm, group).examples if e.objective == "judge"]
    assert {"".join(map(chr, e.rows[0].prompt_ids)) for e in judge} == {
        "<user>J do it|odd<assistant>"
    }


def test_policies_and_losses():
    shared = self_rewarding(train_judge=True)
    separate = self_rewarding(train_judge=True, judge={"shared": False})
    assert shared.policies == ("policy",) and separate.policies == ("policy", "judge")
    assert shared.trained_policy("judge") == "policy" and shared.samples == 12
    assert separate.trained_policy("judge") == "judge"
    group = explore(separate, context_of(["good", "bad", "odd"], JUDGMENTS, judge="judge"))
    judge = [e for e in select(separate, group).examples if e.objective == "judge"]
    tokens = sum(len(e.rows[0].response_ids) for e in judge)
    totals = Totals(tokens=tokens, rows=len(judge), examples=len(judge))
    out = separate.loss("judge")(
        torch.full((tokens,), -1.0, requires_grad=True), build_micro_batch(judge, totals, "cpu")
    )
    assert math.isfinite(out.loss.item()) and separate.loss().config.type == "sigmoid"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_judge": True, "judgments": 1}, "at least 2"),
        ({"judge": {"shared": False}}, "a scorer of type judge"),
        ({"judge_template": "{{ task }}"}, "unknown variable task"),
        ({"judge_loss": {"aggregate": "constant_length"}}, "not for judgments"),
    ],
)
def test_invalid_settings_are_refused(changes, expected):
    with pytest.raises(ValidationError, match=expected):
        self_rewarding(**changes)


@pytest.mark.parametrize(
    ("algorithm", "sections", "expected"),
    [
        ({}, {"run": {"max_staleness": 1}}, "run.max_staleness is 1"),
        ({}, {"learner": {"schedule": "cosine"}}, "expected constant"),
        ({"judge_temperature": 0.7}, {}, "judgments are sampled at 0.7"),
        ({}, {"rollout": {"temperature": 0.9}}, "judgments are sampled at 0.9"),
    ],
)
def test_contradicting_sections_are_refused(tmp_path, algorithm, sections, expected):
    settings = {**SETTINGS, **algorithm}
    trained = make_config(tmp_path, algorithm={**settings, "train_judge": True}, **sections)
    with pytest.raises(ConfigError, match=expected):
        trained.algorithm.check_campaign(trained)
    plain = make_config(tmp_path, algorithm=settings, **sections)
    plain.algorithm.check_campaign(plain)


@pytest.mark.parametrize("shared", [False, True])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, shared):
    """Fake policies write three numbers: the last digit of a judgment is its verdict."""
    algorithm = {
        **SETTINGS,
        "verdict_pattern": r"(\d)$",
        "verdicts": None,
        "pass_verdict": 4.5,
        "train_judge": True,
        "judge": {"shared": shared, "examples_per_step": 8},
    }
    assert check_resumed_run(tmp_path, algorithm)[-1]["judge/steps"] > 0
