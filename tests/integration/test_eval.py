"""`rayhf eval` and `rayhf rank` with the real engine, rules and a reward model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from chat_server import Body, Response, asked, say, serving
from taught_reward_model import make_reward_model
from typer.testing import CliRunner

from launch.cli import app
from rayhf.tiny import build

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("RAYHF_TINY_DIR") or ROOT / ".tiny")


def rayhf(*words: object) -> str:
    shown = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown.output


def prefers_the_shorter(body: Body) -> Response:
    """Judge a pair of answers, as an OpenAI-compatible server does."""
    places = ("first", "second")
    found = [
        re.search(rf"\[{place} begins \w+\]\n(.*?)\n\[{place} ends", asked(body), re.DOTALL)
        for place in places
    ]
    if None in found:  # the request with which the endpoint is checked
        return say("hello")
    lengths = [len(match[1]) for match in found if match]
    return say(f"Verdict: {'A' if lengths[0] < lengths[1] else 'B'}")


def test_policy_against_its_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine: figures, a baseline from a file, a judge, best of n; then a ranking."""
    monkeypatch.chdir(tmp_path)
    task = build(DIRECTORY, tasks=["arithmetic"])["arithmetic"]
    rows = [json.loads(line) for line in task.heldout.read_text().splitlines()[:8]]
    given = [{"prompt": r["prompt"], "completion": f"{r['answer']}\n"} for r in rows]
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    rule = "{type: rule, function: 'rayhf.scorer.rules:final_number'}"
    with serving(prefers_the_shorter) as server:
        judge = f"{{type: judge, mode: pairwise, endpoint: {{url: '{server.url}', model: m}}}}"
        shown = rayhf(
            "eval",
            task.policy,
            "--suite",
            task.heldout,
            "--baseline",
            "gold.jsonl",
            "policy.dtype=float32",
            "rollout.max_tokens=48",
            "suites.heldout.limit=8",
            "samples=2",
            "seeds=[0, 1]",
            f"scorer=[{rule}]",
            f"judge=[{judge}]",
            f"best_of={{proxy: [{rule}], judge: [{rule}]}}",
        )
    assert len(server.bodies) > 2 * 8  # both orders of every pair; equal ones are asked once
    assert "8 prompts x 4 of" in shown and "difference" in shown and "best of n" in shown
    (file,) = Path("evals").glob("*-heldout.json")
    results = json.loads(file.read_text())
    metrics = results["metrics"]
    assert metrics["final_number/mean@4"]["count"] == 8
    assert metrics["final_number/mean@4"]["value"] == metrics["final_number/pass@1"]["value"]
    assert metrics["final_number/pass@4"]["value"] >= metrics["final_number/pass@2"]["value"] > 0
    baseline = results["baseline"]
    assert baseline["differences"]["final_number/mean@4"]["high"] <= 0
    assert results["win_rate"]["comparisons"] == 8 * 4
    assert results["win_rate"]["win_rate"]["value"] < 0.1  # the policy works it out, line by line
    assert set(results["by_seed"]["final_number"]) == {"0", "1"}
    curve = results["best_of"]
    assert [point["n"] for point in curve] == [1, 2, 4] and curve[0]["kl"] == 0
    assert curve[-1]["judge"]["value"] == metrics["final_number/pass@4"]["value"]

    (answers,) = Path("evals").glob("*.answers.jsonl")
    Path("judge.yaml").write_text(f"judge: [{rule}]")
    rayhf("rank", answers, "gold.jsonl", "--judge", "judge.yaml", "--out", "rank.json")
    ranking = json.loads(Path("rank.json").read_text())["ranking"]
    assert ranking[0]["name"] == "gold" and ranking[0]["strength"]["low"] > 0


def test_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, pairs = make_reward_model(tmp_path)
    shown = rayhf(
        "eval",
        model,
        "--suite",
        pairs,
        "suites.pairs_test.limit=80",
        "policy.dtype=float32",
    )
    assert "reliability" in shown
    (file,) = Path("evals").glob("*-pairs_test.json")
    results = json.loads(file.read_text())
    assert results["pairs"] == 80
    assert results["metrics"]["total"]["accuracy"]["low"] > 0.6
    assert results["metrics"]["category"]["all"] == results["metrics"]["total"]["accuracy"]
    assert "excess_longer" in results["metrics"]["length"]
