"""Figures of the suites agree with other implementations on the same texts.

eval_parity/expected.json has their figures, and a note on how they were made.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from rayhf.evaluation.suites import gsm8k, ifeval, math
from rayhf.evaluation.suites.ifeval_instructions import INSTRUCTIONS
from rayhf.evaluation.win_rates import Duels, length_controlled, logistic_fit

EXPECTED = json.loads((Path(__file__).parent / "eval_parity/expected.json").read_text())


@pytest.mark.parametrize("metric", ["strict_match", "flexible_extract"])
def test_gsm8k_is_lm_eval_harness(metric):
    case = EXPECTED["gsm8k"]
    score = getattr(gsm8k, metric)
    figures = [[score(t, reference_answer=a) for t in case["texts"]] for a in case["answers"]]
    assert figures == case[metric]
    assert 0 < np.mean(figures) < 1


def test_math_is_lm_eval_harness():
    case = EXPECTED["math"]
    figures = [
        [
            math.math_verify(text, reference_answer=None, row={"solution": s})
            for text in case["texts"]
        ]
        for s in case["solutions"]
    ]
    assert figures == case["math_verify"]


@pytest.mark.parametrize("level", ["strict", "loose"])
@pytest.mark.parametrize(
    "row", EXPECTED["ifeval"]["rows"], ids=lambda row: "+".join(row["instruction_id_list"])
)
def test_ifeval_is_lm_eval_harness(level, row):
    if set(row["instruction_id_list"]) & ifeval.NEEDS_LANGUAGE:
        pytest.importorskip("langdetect", reason="the extra ifeval is not installed")
    case = EXPECTED["ifeval"]
    theirs = case[f"inst_level_{level}_acc"][case["rows"].index(row)]
    ours = [
        "".join(str(int(x)) for x in ifeval._followed(text, row, loose=level == "loose"))
        for text in case["texts"]
    ]
    wrong = [t for t, a, b in zip(case["texts"], ours, theirs, strict=True) if a != b]
    assert wrong == []


def test_ifeval_fixture_has_all_instructions():
    named = {name for row in EXPECTED["ifeval"]["rows"] for name in row["instruction_id_list"]}
    assert named == set(INSTRUCTIONS) and len(named) == 25


@pytest.mark.parametrize("name", ["without", "with"])
def test_length_controlled_fit_is_scikit_learn(name):
    case = EXPECTED["length_controlled"]
    gap = np.array(case["gap"], dtype=float)
    win = np.array(case["win"])
    difficulty = np.array(case["difficulty"]) if name == "with" else None
    terms = [np.ones(len(gap)), np.tanh(gap / gap.std(ddof=1))]
    design = np.stack(terms if difficulty is None else [*terms, difficulty], axis=1)
    fitted = logistic_fit(design, win, ridge=0.0)
    np.testing.assert_allclose(fitted, case[name]["coefficients"], atol=1e-4)
    duels = Duels(
        win_D=win, length_gap_D=gap, prompt_D=np.arange(len(gap)), difficulty_D=difficulty
    )
    estimate = length_controlled(duels)
    assert estimate.value == pytest.approx(case[name]["win_rate"], abs=2e-3)  # the ridge
    assert estimate.low < estimate.value < estimate.high
