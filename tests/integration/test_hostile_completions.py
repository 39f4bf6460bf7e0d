"""200 hostile completions against every built-in rule in its real process: scored, harmless."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile import MARK, benign, hostile
from score_requests import make_rule, request

from rayhf.scorer.rule import Rule
from rayhf.types import Failed, Invalid, Outcome, Scored

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


def outcomes_of(rule: Rule, texts: list[str], answer: str) -> list[Outcome]:
    [outcomes] = rule.score([request(*texts, answer=answer)])
    return list(outcomes)


@pytest.mark.parametrize("function", RULES)
def test_hostile_completions_do_no_harm(function: str, tmp_path: Path) -> None:
    answer, good, bad = RULES[function], benign(200), hostile(200)
    rule = make_rule(f"rayhf.scorer.{function}", tmp_path, timeout_s=3.0)
    try:
        before = outcomes_of(rule, good, answer)
        assert (
            all(isinstance(outcome, Scored) for outcome in before)
            and len(set(map(str, before))) > 1
        )
        outcomes = outcomes_of(rule, bad, answer)
        assert len(outcomes) == 200
        for text, outcome in zip(bad, outcomes, strict=True):
            assert isinstance(outcome, Scored | Invalid | Failed)
            if isinstance(outcome, Scored):
                assert 0.0 <= outcome.value <= 1.0
            else:
                assert outcome.reason and "skipped" not in outcome.reason, text[:80]
        assert outcomes_of(rule, good, answer) == before
    finally:
        rule.close()
    assert os.listdir(tmp_path) == [] and not Path(MARK).exists()
