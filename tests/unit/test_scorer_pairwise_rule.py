"""A pairwise rule in a real child process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from score_requests import request, win_of

from rayhf.errors import ConfigError
from rayhf.scorer.build import build_scorer, check_entries
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.rule import PairwiseRule
from rayhf.scorer.rule_config import PairwiseRuleConfig
from rayhf.types import Failed, Invalid, Outcome, Scored

NAN = float("nan")
RULES = """
import os, time

ORDER = {"rock": "scissors", "scissors": "paper", "paper": "rock"}

def game(first, second, *, prompt, reference_answer):
    for text in (first, second):
        if text == "raise": raise ValueError("no")
        if text == "nan": return float("nan")
        if text == "more": return 1.5
        if text == "none": return None
        if text == "exit": os._exit(3)
        if text == "sleep": time.sleep(60)
    return 0.9 if ORDER[first] == second else 0.1

def context(first, second, *, prompt, reference_answer, messages):
    assert (first, second, prompt, reference_answer, len(messages)) == ("a", "b", "2+2?", "4", 1)
    return 1

def biased(first, second, *, prompt, reference_answer): return 0.75

def pointwise(completion, *, prompt, reference_answer, finish_reason): return 0.5
"""


def make_rule(function: str, base: Path, **settings: Any) -> PairwiseRule:
    config = PairwiseRuleConfig(function=f"games:{function}", **settings)
    return PairwiseRule(config, ScorerSetup(base=base))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pairs")
    (directory / "games.py").write_text(RULES)
    return directory


@pytest.fixture(scope="module")
def game(base: Path) -> Iterator[PairwiseRule]:
    rule = make_rule("game", base, timeout_s=0.8)
    yield rule
    rule.close()


def test_cycle_is_preserved(game: PairwiseRule) -> None:
    [compared, other] = game.compare(
        [request("rock", "scissors", "paper"), request("paper", "scissors")]
    )
    np.testing.assert_allclose(
        win_of(compared), [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]
    )
    np.testing.assert_allclose(win_of(other), [[0.5, 0.1], [0.9, 0.5]])
    [outcomes] = game.score([request("rock", "scissors", "paper")])
    assert [outcome.value for outcome in outcomes if isinstance(outcome, Scored)] == pytest.approx(
        [0.5] * 3
    )


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        ("raise", Failed, "ValueError: no"),
        ("nan", Invalid, "the rule returned nan"),
        ("more", Invalid, "the rule returned 1.5, not a probability"),
        ("none", Invalid, "the rule returned None, not a number"),
        ("exit", Failed, "the rule's process exited (exit code 3)"),
        ("sleep", Failed, "no response within 0.8 s"),
    ],
)
def test_bad_pair_does_not_affect_others(
    game: PairwiseRule, bad: str, kind: type[Outcome], reason: str
) -> None:
    [compared, alone] = game.compare([request("rock", bad, "scissors"), request("rock", bad)])
    np.testing.assert_allclose(
        win_of(compared), [[0.5, NAN, 0.9], [NAN, 0.5, NAN], [0.1, NAN, 0.5]]
    )
    assert isinstance(alone, kind) and not isinstance(alone, Scored)
    assert alone.reason.startswith(reason)
    [outcomes] = game.score([request("rock", bad, "scissors")])
    assert outcomes[0] == Scored(value=pytest.approx(0.9)) and isinstance(outcomes[1], Invalid)


def test_prompt_whose_calls_hang_is_given_up(base: Path) -> None:
    rule = make_rule("game", base, timeout_s=0.2)
    [compared, other] = rule.compare(
        [
            request("sleep", *(f"text {i}" for i in range(40))),
            request("rock", "paper", prompt_id="other"),
        ]
    )
    rule.close()
    assert compared == Failed(reason="no response within 0.2 s")
    assert win_of(other)[0, 1] == pytest.approx(0.1)


def test_equal_texts_one_completion_and_none(base: Path, game: PairwiseRule) -> None:
    biased = make_rule("biased", base)
    [same] = biased.compare([request("a", "a", "b", "a")])
    biased.close()
    np.testing.assert_array_equal(win_of(same)[[0, 0, 1], [1, 3, 3]], 0.5)
    assert win_of(same)[0, 2] == 0.75 and win_of(same)[2, 3] == 0.75
    one, none = game.compare([request("rock"), request()])
    assert win_of(one).tolist() == [[0.5]] and win_of(none).shape == (0, 0)


def test_context_and_messages(base: Path) -> None:
    rule = make_rule("context", base)
    assert win_of(rule.compare([request("a", "b")])[0]).tolist() == [[0.5, 1.0], [0.0, 0.5]]
    rule.close()


def test_rule_for_one_completion_is_refused(base: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^scorer\.train\[0\]: rule games:pointwise cannot be called in style pairwise; "
        r"expected first, second, .*: it has no parameter 'first'",
    ):
        check_entries([PairwiseRuleConfig(function="games:pointwise")], base)
    check_entries([PairwiseRuleConfig(function="games:game")], base)


def test_built_from_a_config_entry(base: Path) -> None:
    engine = build_scorer([PairwiseRuleConfig(function="games:game")], ScorerSetup(base=base))
    [compared] = engine.compare([request("rock", "paper")])
    [outcomes] = engine.score([request("rock", "paper")])
    engine.close()
    np.testing.assert_allclose(win_of(compared), [[0.5, 0.1], [0.9, 0.5]])
    assert outcomes[0] == Scored(value=pytest.approx(0.1), parts={"game": pytest.approx(0.1)})
