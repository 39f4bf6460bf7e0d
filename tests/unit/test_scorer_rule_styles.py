"""Functions as other libraries write them: their parameters, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from score_requests import make_rule, request

from rayhf.errors import ConfigError
from rayhf.scorer.build import check_entries, check_named_scorers
from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import Failed, Invalid, Outcome, Scored, ScoreRequest, Skipped

RULES = """
import asyncio, os, time
import numpy as np

NUMBER = int.from_bytes(os.urandom(4), "big")

def columns(completion, question, *, level=7, row):
    return {"score": len(completion), "question": len(question), "level": level, "text": "x"}

def trl_length(completions, **kwargs):
    assert set(kwargs) - {"completion_ids", "log_extra", "log_metric"} == {"prompts", "solution"}
    kwargs["log_extra"]("solution", kwargs["solution"])
    kwargs["log_metric"]("length", 1.0)
    return [None if c == "skip" else float(len(c)) for c in completions]

def trl_calls(prompts, completions, completion_ids, solution):
    assert len(prompts) == len(completions) == len(completion_ids) == len(solution)
    return np.full(len(completions), len(completions))

def trl_messages(prompts, completions, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [len(completion[0]["content"]) for completion in completions]

def trl_raises(completions, **kwargs):
    if "bad" in completions: raise ValueError("no")
    if "exit" in completions: os._exit(3)
    return [1.0] * len(completions)

def trl_short(completions, **kwargs): return [1.0]
def trl_scalar(completions, **kwargs): return 1.0

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info) == ("openai/gsm8k", {"index": 3}), (data_source, extra_info)
    return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str}

def numpy_bool(completion, **kwargs): return np.float64(2.5) > 2
def numpy_float(completion, **kwargs): return np.float32(0.5)
def one_element(completion, **kwargs): return np.array([0.25])
def two_elements(completion, **kwargs): return np.array([0.25, 0.5])
def plain_bool(completion, **kwargs): return completion == "yes"

running = 0
async def in_flight(completion, **kwargs):
    global running
    if completion == "hang": await asyncio.sleep(60)
    if completion == "block": time.sleep(60)
    if completion == "exit": os._exit(3)
    if completion == "raise": raise ValueError("no")
    running += 1
    await asyncio.sleep(0.05)
    most = running
    running -= 1
    return most

def process(completion, **kwargs):
    time.sleep(0.01)
    return NUMBER
"""
ROW = {"question": "2+2?", "solution": "4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("styles")
    (directory / "styles.py").write_text(RULES)
    return directory


@pytest.fixture
def rule(base: Path) -> Iterator[Callable[..., Rule]]:
    """Return a function that starts rules."""
    started: list[Rule] = []

    def start(function: str, **settings: Any) -> Rule:
        started.append(make_rule(f"styles:{function}", base, **settings))
        return started[-1]

    yield start
    for each in started:
        each.close()


def rows(*texts: str, row: dict[str, object] | None = None, **prompt: Any) -> ScoreRequest:
    made = request(*texts, prompt_id=str(row))
    return replace(made, prompt=replace(made.prompt, row=ROW if row is None else row, **prompt))


def values(outcomes: list[tuple[Outcome, ...]]) -> list[object]:
    return [
        outcome.value if isinstance(outcome, Scored) else type(outcome).__name__
        for row in outcomes
        for outcome in row
    ]


def test_columns_by_name_and_parts(rule: Callable[..., Rule]) -> None:
    [(outcome, _), (leveled,), (missing,)] = rule("columns").score(
        [rows("abc", "d"), rows("abc", row={**ROW, "level": 2}), rows("abc", row={"n": 1})]
    )
    assert outcome == Scored(value=3.0, parts={"question": 4.0, "level": 7.0})
    assert isinstance(leveled, Scored) and leveled.parts["level"] == 2.0
    assert isinstance(missing, Failed)
    assert missing.reason.startswith("nothing provides its parameter 'question'")
    assert "expected names among completion, prompt, messages, " in missing.reason
    assert missing.reason.endswith(" and the row's columns (n)")


def test_parameter_without_a_value_is_refused_by_the_check(base: Path) -> None:
    entry = RuleConfig(function="styles:columns")
    good = rows("").prompt
    check_entries([entry], base, prompts=[good])
    check_entries([entry], base, prompts=[replace(good, row={}, scorers=("other",))])
    with pytest.raises(
        ConfigError,
        match=r"^scorer\.train\[0\]: rule styles:columns: nothing provides its parameter "
        r"'question'; did you mean questions\?.* for the prompt '2\+2\?'$",
    ):
        check_entries([entry], base, prompts=[replace(good, row={"questions": "x"})])


def test_trl_function(rule: Callable[..., Rule]) -> None:
    function = rule("trl_length", batch=3)
    assert function.pool.parameters.style == "trl"
    outcomes = function.score([rows("a", "skip", row={"prompt": "?", "solution": "4"})])
    assert values(outcomes) == [1.0, "Skipped"]
    assert isinstance(outcomes[0][1], Skipped)


def test_trl_function_gets_whole_prompts_up_to_a_batch(rule: Callable[..., Rule]) -> None:
    requests = [rows(*["x"] * size, row={**ROW, "n": n}) for n, size in enumerate((2, 2, 3, 7))]
    counts = values(rule("trl_calls", batch=4).score(requests))
    assert counts == [4.0] * 4 + [3.0] * 3 + [4.0] * 4 + [3.0] * 3


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": []}, {}),
        ({"prompt": [{"role": "user", "content": "?"}]}, {}),
        ({"prompt": "?"}, {"conversational": True}),
    ],
)
def test_trl_function_of_conversations(
    rule: Callable[..., Rule], row: dict[str, object], settings: dict[str, bool]
) -> None:
    assert values(rule("trl_messages", **settings).score([rows("abc", row=row)])) == [3.0]


def test_one_completion_of_a_batch_does_not_affect_the_others(rule: Callable[..., Rule]) -> None:
    function = rule("trl_raises")
    outcomes = function.score([rows("a", "bad", "exit", "b"), rows("c", row={"prompt": ""})])
    assert values(outcomes) == [1.0, "Failed", "Failed", 1.0, 1.0]
    reasons = [o.reason for row in outcomes for o in row if isinstance(o, Failed)]
    assert reasons[0].startswith("ValueError: no (styles.py:")
    assert reasons[1] == "the rule's process exited (exit code 3)"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("trl_short", "the rule returned 1 numbers for 2 completions"),
        ("trl_scalar", "the rule returned a float, not a list of 2 numbers"),
    ],
)
def test_trl_function_with_a_wrong_result(
    rule: Callable[..., Rule], function: str, reason: str
) -> None:
    assert rule(function).score([rows("a", "b")]) == [(Invalid(reason=reason),) * 2]


@pytest.mark.parametrize(
    "prompt",
    [
        {"row": {"data_source": "openai/gsm8k", "reward_model": {"ground_truth": "4"}}},
        {"row": {}, "source": "openai/gsm8k", "reference_answer": "4"},
    ],
)
def test_verl_function(rule: Callable[..., Rule], prompt: dict[str, Any]) -> None:
    prompt["row"]["extra_info"] = {"index": 3}
    function = rule("compute_score")
    assert function.pool.parameters.style == "verl"
    [(right, wrong)] = function.score([rows("4", "5", **prompt)])
    assert right == Scored(value=1.0, parts={"acc": 1.0})
    assert wrong == Scored(value=0.0, parts={"acc": 1.0})


@pytest.mark.parametrize(
    ("function", "value"),
    [("numpy_bool", 1.0), ("numpy_float", 0.5), ("one_element", 0.25), ("plain_bool", 0.0)],
)
def test_kinds_of_numbers(rule: Callable[..., Rule], function: str, value: float) -> None:
    assert rule(function).score([rows("no")]) == [(Scored(value=value),)]


def test_array_is_not_a_number(rule: Callable[..., Rule]) -> None:
    [(outcome,)] = rule("two_elements").score([rows("no")])
    assert outcome == Invalid(reason="the rule returned a ndarray, not a number")


def test_coroutine_function_runs_several_calls_at_a_time(rule: Callable[..., Rule]) -> None:
    most = values(rule("in_flight", concurrency=4).score([rows(*["x"] * 8)]))
    assert max(value for value in most if isinstance(value, float)) == 4.0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("hang", "no response within 0.5 s"),
        ("block", "no response within 2.5 s"),
        ("exit", "the rule's process exited (exit code 3)"),
        ("raise", "ValueError: no"),
    ],
)
def test_bad_completion_of_a_coroutine_function(
    rule: Callable[..., Rule], bad: str, reason: str
) -> None:
    """The calls that were in flight with it are repeated."""
    outcomes = rule("in_flight", concurrency=4, timeout_s=0.5).score([rows("a", bad, "b", "c")])
    assert [type(outcome) for outcome in outcomes[0]] == [Scored, Failed, Scored, Scored]
    assert isinstance(outcomes[0][1], Failed) and outcomes[0][1].reason.startswith(reason)


def test_coroutine_function_that_hangs_is_given_up(rule: Callable[..., Rule]) -> None:
    function = rule("in_flight", concurrency=2, timeout_s=0.1)
    requests = [rows(*["hang"] * 4, row={"n": n}) for n in range(200)]
    outcomes = function.score(requests)
    last = outcomes[-1][-1]
    assert isinstance(last, Failed)
    assert last.reason == "skipped: all calls of 4 prompts were lost: no response within 0.1 s"


def test_workers_share_the_calls(rule: Callable[..., Rule]) -> None:
    processes = values(
        rule("process", workers=3).score([rows("x", row={"n": n}) for n in range(60)])
    )
    assert len(set(processes)) == 3


def test_prompt_must_name_scorers_that_there_are() -> None:
    train = [RuleConfig(function="m:math")]
    evaluate = [RuleConfig(function="m:chat")]
    prompt = rows("").prompt
    check_named_scorers(
        [prompt, replace(prompt, scorers=("math", "chat"))], train, evaluate, where="scorer.train"
    )
    for named, message in (
        (("maths",), r"^the prompt '2\+2\?': no scorer is named 'maths'; did you mean math\?"),
        (("chat",), "none of the scorers chat is in scorer.train"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_named_scorers(
                [replace(prompt, scorers=named)], train, evaluate, where="scorer.train"
            )


def test_unusable_reference_answers_are_found_by_the_check(base: Path) -> None:
    entry = RuleConfig(function="rayhf.scorer.rules:final_number")
    prompts = [
        replace(rows("").prompt, reference_answer=answer) for answer in ("4", "$1,250", None, "one")
    ]
    check_entries([entry], base, prompts=prompts[:2])
    with pytest.raises(
        ConfigError,
        match=r"^scorer\.train\[0\]: rule .*:final_number cannot use 2 of 4 reference answers: "
        r"None of the prompt '2\+2\?' \(ValueError: the prompt has no reference answer\); 'one' of",
    ):
        check_entries([entry], base, prompts=prompts)


def test_user_folder_shadows_nothing(tmp_path: Path) -> None:
    for name in ("random", "types", "rayhf", "numpy", "rules"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "mine.py").write_text(
        "import random, types, numpy, rayhf\ndef score(completion): return random.random() < 2\n"
    )
    rule = make_rule("mine:score", tmp_path)
    assert rule.score([request("a")]) == [(Scored(value=1.0),)]
    rule.close()


def test_limit_on_importing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)\n")
    with pytest.raises(ConfigError, match=r"no response within 0.2 s \(import_timeout_s, in"):
        Rule.check(RuleConfig(function="slow:f", import_timeout_s=0.2), tmp_path)
