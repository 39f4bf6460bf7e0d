"""Win rates in a campaign, and files of answers."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeChat, FakeRollout, FakeScorer, make_prompts

from rayhf.config.registry import EVALUATIONS
from rayhf.errors import ConfigError, ScorerError
from rayhf.evaluation.answers import read_answers
from rayhf.evaluation.base import EvaluationContext, EvaluationSetup
from rayhf.evaluation.duels import Contest, both_orders, duels_of, merge_orders
from rayhf.evaluation.win_rate import WinRateEvaluation
from rayhf.types import Compared, Failed, Invalid, Sampling
from rayhf.view.evaluations import changes
from rayhf.view.run import Run

RULE = {"type": "pairwise_rule", "function": "a:b"}
PROMPTS = tuple(make_prompts(6))


def evaluation(tmp_path, **settings):
    config = {"evaluations": {"wins": {"type": "win_rate", "scorer": [RULE], **settings}}}
    campaign = make_config(tmp_path, **config)
    setup = EvaluationSetup(
        task="wins",
        base=tmp_path,
        chat=FakeChat(),
        heldout=PROMPTS,
        open_sources=lambda sources, key: [],
        load_prompts=lambda sources, key: (),
    )
    return campaign, EVALUATIONS.build(campaign.evaluations["wins"], setup)


class FirstIsBetter(FakeScorer):
    """Prefers the completion that stands first, and a little one with a larger first token."""

    async def compare(self, requests):
        assert all(len(r.completions) == 2 for r in requests)
        responses = []
        for request in requests:
            one, two = (c.text for c in request.completions)
            win = 0.7 + 0.2 * ((one > two) - (one < two))
            matrix = [[0.5, win], [1 - win, 0.5]]
            responses.append(Compared(win=np.array(matrix), source="pairwise"))
        return responses


class Recording(WinRateEvaluation):
    scorer = FirstIsBetter()

    async def measure(self, context):
        return await super().measure(replace(context, scorer=self.scorer))


def test_position_bias_cancels():
    contests = [Contest(prompt=PROMPTS[0], texts=("5", "5"))]
    wins, reason = merge_orders(asyncio.run(FirstIsBetter().compare(both_orders(contests))))
    assert wins[0][0, 1] == pytest.approx(0.5) and reason == ""


def test_one_order_without_a_verdict_is_no_comparison():
    compared = Compared(win=np.array([[0.5, 1], [0, 0.5]]), source="pairwise")
    contests = [Contest(prompt=p, texts=("ab", "c")) for p in PROMPTS[:2]]
    wins, reason = merge_orders([compared, Invalid(reason="mute"), compared, compared])
    assert wins[0] is None and reason == "mute"
    duels = duels_of(contests, wins)
    assert (
        duels.prompts == 1 and duels.win_D.tolist() == [0.5] and duels.length_gap_D.tolist() == [1]
    )


def test_against_the_start_of_a_campaign(tmp_path):
    """Measured before training (the baseline), and across a restart."""
    for iterations in (2, 4):
        config = make_config(
            tmp_path,
            run={"iterations": iterations},
            evaluations={"wins": {"type": "win_rate", "scorer": [RULE], "every": 2}},
        )
        _, built = evaluation(tmp_path, every=2)
        built.__class__ = Recording
        run_campaign(config, evaluations={"wins": built}, heldout=PROMPTS)
    lines = [line for line in metrics_of(config) if "eval/wins/win_rate" in line]
    assert [line["iteration"] for line in lines] == [2, 4]
    # The fake policy answers by seed alone: the same as before training.
    assert all(line["eval/wins/win_rate"] == pytest.approx(0.5) for line in lines)
    assert all(line["eval/wins/ties"] == 1 for line in lines)
    assert "eval/wins/win_rate_length_controlled_high" in lines[0]
    by_name = {change.metric: change for change in changes(Run(config.run.dir, "run"))}
    wins = by_name["eval/wins/win_rate"]
    assert wins.iterations == (2, 4) and wins.difference.value == 0 and wins.after.count == 6
    controlled = by_name["eval/wins/win_rate_length_controlled"]
    assert controlled.iterations == (2, 4) and controlled.difference.count == 6
    assert controlled.difference.value == controlled.difference.high == 0  # paired: no doubt


def test_against_a_file_of_answers(tmp_path):
    rows = [{"prompt": str(i), "completion": "0"} for i in range(6)]
    (tmp_path / "base.jsonl").write_text("\n".join(map(json.dumps, rows)))
    campaign, built = evaluation(tmp_path, against="base.jsonl")
    built.__class__ = Recording
    roles = run_campaign(campaign, evaluations={"wins": built}, heldout=PROMPTS)
    first = metrics_of(campaign)[0]
    assert roles and first["eval/wins/win_rate"] == pytest.approx(0.7)  # every text is above "0"


def test_file_without_some_answers_is_refused(tmp_path):
    (tmp_path / "base.jsonl").write_text(json.dumps({"prompt": "0", "output": "x"}))
    with pytest.raises(ConfigError, match="5 of 6 prompts have no answer there"):
        evaluation(tmp_path, against="base.jsonl")


def test_judge_that_fails_stops_the_evaluation(tmp_path):
    (tmp_path / "base.jsonl").write_text(
        "\n".join(json.dumps({"prompt": str(i), "output": "0"}) for i in range(6))
    )
    _, built = evaluation(tmp_path, against="base.jsonl")
    context = EvaluationContext(
        roles=SimpleNamespace(rollouts={"policy": FakeRollout()}),
        versions={"policy": 0},
        sampling=Sampling(max_tokens=4),
        seed=0,
        scorer=FakeScorer(outcome=Failed(reason="no judge")),
        complete=None,
        record=lambda values: None,
    )
    with pytest.raises(ScorerError, match=r"none of 6 answers could be compared.*no judge"):
        asyncio.run(built.measure(context))


def test_files_of_other_programs_are_read(tmp_path):
    file = tmp_path / "outputs.json"
    file.write_text(json.dumps([{"instruction": "Hi", "output": "Hello", "generator": "gpt4"}]))
    (answered,) = read_answers(file, key="baseline").values()
    assert answered.texts == ("Hello",) and answered.answer is None
    file.write_text(json.dumps([{"instruction": "Hi", "text": "Hello"}]))
    with pytest.raises(ConfigError, match="expected `completions`"):
        read_answers(file, key="baseline")
