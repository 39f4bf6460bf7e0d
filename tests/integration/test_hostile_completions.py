"""200 completions that mean harm, against every built-in rule in its real process: judged,
survived, and nothing came of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile import MARK, benign, hostile
from test_scorer_rule import request

from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_process import ProcessLimits
from rayhf.types import Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest

ALL = json.dumps(
    [
        {"kind": "words", "max": 4},
        {"kind": "sentences", "min": 1},
        {"kind": "avoid", "words": ["think"]},
    ]
)
SHARE = json.dumps(
    [
        {"kind": "words", "max": 40},
        {"kind": "json"},
        {"kind": "title"},
        {"kind": "keyword", "word": "4", "min": 1},
    ]
)
RULES = {
    "rules:exact_match": "4",
    "rules:final_number": "4",
    "rules:regex_search": r"\b4\b",
    "rules:regex_match": r"(?s).*4\W*",
    "math_rules:math_equal": "4",
    "constraints:all_constraints": ALL,
    "constraints:share_of_constraints": SHARE,
}


def judged(rule: Rule, texts: list[str], answer: str) -> list[Outcome]:
    asked = request(*texts)
    prompt = Prompt(prompt_id="p", messages=asked.prompt.messages, token_ids=(1,), answer=answer)
    completions: tuple[Completion, ...] = asked.completions
    [outcomes] = rule.score([ScoreRequest(prompt=prompt, completions=completions)])
    return list(outcomes)


@pytest.mark.parametrize("function", RULES)
def test_hostile_completions_come_to_nothing(function: str, tmp_path: Path) -> None:
    answer, good, bad = RULES[function], benign(200), hostile(200)
    rule = Rule(f"rayhf.scorer.{function}", base=tmp_path, limits=ProcessLimits(timeout_s=2.0))
    try:
        before = judged(rule, good, answer)
        assert (
            all(isinstance(outcome, Scored) for outcome in before)
            and len(set(map(str, before))) > 1
        )
        outcomes = judged(rule, bad, answer)
        assert len(outcomes) == 200
        for text, outcome in zip(bad, outcomes, strict=True):
            assert isinstance(outcome, Scored | Invalid | Failed)
            if isinstance(outcome, Scored):
                assert 0.0 <= outcome.value <= 1.0
            else:
                assert outcome.reason and "not judged" not in outcome.reason, text[:80]
        assert judged(rule, good, answer) == before
    finally:
        rule.close()
    assert os.listdir(tmp_path) == [] and not Path(MARK).exists()
