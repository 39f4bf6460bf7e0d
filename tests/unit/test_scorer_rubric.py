"""Rubrics: criteria of a config or a row, how answers are read, and what they add up to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import Body, Response, asked, refuse, say, serving
from pydantic import ValidationError
from score_requests import request

from rayhf.errors import ConfigError
from rayhf.scorer.build import build_scorer, check_entries
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.rubric import (
    Criterion,
    RubricConfig,
    criteria_text,
    parse_criteria,
    read_answers,
    rubric_schema,
    weighted_score,
)
from rayhf.types import Failed, Invalid, ScoreRequest

RUBRIC = [
    {"criterion": "Is it polite?", "name": "polite", "weight": 3},
    {"criterion": "How clear is it?", "scale": 5},
    {"criterion": "Does it mention prices?", "weight": -2},
]
YES_NO = parse_criteria(["a", "b"])


def score(respond: Any, *requests: ScoreRequest, **settings: Any) -> Any:
    with serving(respond) as server:
        config = JudgeConfig.model_validate(
            {"endpoint": {"url": server.url, "model": "m"}, **settings}
        )
        judge = build_scorer([config], ScorerSetup(base=Path()))
        try:
            return judge.score(list(requests)), server
        finally:
            judge.close()


def with_row(made: ScoreRequest, **row: Any) -> ScoreRequest:
    return replace(made, prompt=replace(made.prompt, row=row))


def test_the_score_is_the_weighted_mean_and_its_parts_are_kept() -> None:
    def respond(body: Body) -> Response:
        text = asked(body)
        assert "Criterion 1: Is it polite? (yes or no)" in text
        assert "Criterion 2: How clear is it? (1 to 5)" in text
        return say('{"reasoning": "", "criterion_1": "yes", "criterion_2": 4, "criterion_3": "no"}')

    [(outcome,)], server = score(respond, request("Hello"), rubric=RUBRIC)
    assert outcome.value == pytest.approx((3 * 1.0 + 1 * 0.75 + 2 * (1 - 0.0)) / 6)
    assert outcome.parts == {
        "judge": outcome.value,
        "judge/votes": 1.0,
        "judge/unparsable": 0.0,
        "judge/polite": 1.0,
        "judge/2": 0.75,
        "judge/3": 0.0,
    }
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["criterion_2"] == {"enum": [1, 2, 3, 4, 5]}
    assert schema["required"] == ["reasoning", "criterion_1", "criterion_2", "criterion_3"]


def test_one_question_per_criterion() -> None:
    def respond(body: Body) -> Response:
        assert "Criterion 2" not in asked(body)
        return say("Criterion 1: " + ("4" if "clear" in asked(body) else "yes"))

    [(outcome,)], server = score(respond, request("Hello"), rubric=RUBRIC, per_criterion=True)
    assert len(server.bodies) == 3
    assert outcome.value == pytest.approx((3 + 0.75 + 0) / 6)
    assert outcome.parts["judge/3"] == 1.0


def test_votes_are_averaged_by_criterion_and_a_partial_vote_does_not_count() -> None:
    responses = iter(
        [
            "Criterion 1: yes\nCriterion 2: no",
            "Criterion 1: yes",
            "Criterion 1: no\nCriterion 2: no",
        ]
    )
    [(outcome,)], _ = score(
        lambda body: say(next(responses)),
        request("Hello"),
        rubric=["a", "b"],
        votes=3,
        temperature=0.7,
    )
    assert outcome.value == pytest.approx(0.25)
    assert outcome.parts["judge/unparsable"] == 1.0 and outcome.parts["judge/1"] == 0.5


def test_each_row_may_have_a_rubric_of_its_own() -> None:
    def respond(body: Body) -> Response:
        text = asked(body)
        return say(
            "Criterion 1: yes" if "Criterion 2" not in text else "Criterion 1: no\nCriterion 2: no"
        )

    requests = [
        with_row(request("Hello"), rubric=["Is it short?"]),
        with_row(request("Hello"), rubric=json.dumps([{"description": "x", "points": -1}, "y"])),
        with_row(request("Hello"), rubric=None),
        with_row(request("Hello"), rubric=[{"title": "no text"}]),
    ]
    outcomes, _ = score(respond, *requests, rubric={"column": "rubric"})
    values = [outcome for (outcome,) in outcomes]
    assert values[0].value == 1.0
    assert values[1].value == pytest.approx(0.5)  # the fault is absent, the merit missing
    assert isinstance(values[2], Failed) and "no rubric in column 'rubric'" in values[2].reason
    assert isinstance(values[3], Failed) and "criterion 1 of the rubric" in values[3].reason


def test_without_an_answer_there_is_no_score() -> None:
    [(outcome,)], _ = score(lambda body: say("Looks fine."), request("Hello"), rubric=["a"])
    assert isinstance(outcome, Invalid) and "Looks fine." in outcome.reason
    [(outcome,)], _ = score(lambda body: refuse(400, "no"), request("Hello"), rubric=["a"])
    assert isinstance(outcome, Failed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Criterion 1: yes\nCriterion 2: no", (1.0, 0.0)),
        ("criterion 1: **Yes**.\n**Criterion 2**: No", (1.0, 0.0)),
        ("Criterion 1: no\nCriterion 2: no\nSo, again:\nCriterion 1: yes", (1.0, 0.0)),
        ('{"criterion_1": "yes", "criterion_2": "no"}', (1.0, 0.0)),
        (json.dumps({"criterion_1": "yes", "criterion_2": "no"}, indent=1), (1.0, 0.0)),
        ("Criterion 1 (no commas): yes\nCriterion 2: no", None),
        ("Criterion 1: no commas are used, so yes\nCriterion 2: no", None),
        ("Criterion 1: maybe\nCriterion 2: no", None),
        ("Criterion 2: no", None),
        ("", None),
    ],
)
def test_answers_are_read_by_number(text: str, expected: Any) -> None:
    assert read_answers(text, YES_NO) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("1", 0.0), ("5", 1.0), ("3/5", 0.5), ("2.5", 0.375), ("0", None), ("6", None), ("yes", None)],
)
def test_answers_on_a_scale(word: str, expected: Any) -> None:
    read = read_answers(f"Criterion 1: {word}", parse_criteria([{"text": "x", "scale": 5}]))
    assert read == (None if expected is None else (pytest.approx(expected),))


def test_faults_alone_are_a_rubric_and_the_score_stays_within_bounds() -> None:
    faults = parse_criteria([{"text": "x", "weight": -1}, {"text": "y", "weight": -3}])
    assert weighted_score(faults, (0.0, 0.0)) == 1.0
    assert weighted_score(faults, (1.0, 1.0)) == 0.0
    assert weighted_score(faults, (0.0, 1.0)) == 0.25


def test_text_of_criteria_is_one_line_each() -> None:
    text = criteria_text([Criterion(criterion="a\n\nCriterion 7: yes")])
    assert text == "Criterion 1: a Criterion 7: yes (yes or no)"
    schema = rubric_schema(YES_NO)
    assert schema["required"] == ["reasoning", "criterion_1", "criterion_2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "rubric"}, "mode rubric needs a rubric"),
        ({"mode": "rating", "rubric": ["a"]}, "mode rating has no rubric"),
        ({"rubric": []}, "expected a list of criteria"),
        ({"rubric": {}}, "mode|expected a list of criteria"),
        ({"rubric": [{"criterion": "a", "weight": 0}]}, "weight is 0"),
        ({"rubric": [{"criterion": "a", "scale": 1}]}, "greater than or equal to 2"),
        ({"rubric": [{"criterion": "a", "name": "x"}] * 2}, "two criteria are named 'x'"),
        ({"rubric": ["a"], "verdict": "(yes|no)"}, "verdict does not apply"),
        ({"per_criterion": True}, "per_criterion is for mode rubric"),
        ({"rubric": ["a"], "template": "{{ answer }}"}, "does not show criteria"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JudgeConfig.model_validate({"model": "m", **settings})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "is no JSON"),
        (7, "expected a list of criteria"),
        ([], "expected a list of criteria"),
        ([7], "criterion 1 is 7"),
        ([{"criterion": "a", "points": "many"}], "criterion 1 of the rubric: weight"),
    ],
)
def test_rows_that_are_no_rubric_say_why(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_criteria(value)


def test_data_set_names_are_understood() -> None:
    [one] = parse_criteria([{"criterion": "a", "points": 5, "tags": ["x"]}])
    assert one == Criterion(criterion="a", weight=5.0)
    assert RubricConfig(column="r").of(with_row(request("x"), r=["a"]).prompt) == (
        Criterion(criterion="a"),
    )


def test_rows_without_a_rubric_are_refused_before_anything_starts(tmp_path: Path) -> None:
    prompts = [with_row(request("x"), r=["a"]).prompt, with_row(request("x"), q=1).prompt]
    with serving(lambda body: say("yes")) as server:
        endpoint = {"url": server.url, "model": "m"}
        config = JudgeConfig.model_validate({"endpoint": endpoint, "rubric": {"column": "r"}})
        check_entries([config], tmp_path, prompts=prompts[:1])
        with pytest.raises(ConfigError, match=r"the prompt '2\+2\?': the row has no rubric"):
            check_entries([config], tmp_path, prompts=prompts)
