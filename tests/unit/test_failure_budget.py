"""Completions without a score: which count, and how a message names them."""

import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeScorer, SilentObserver, make_prompts
from score_requests import make_rule, request

from rayhf.errors import ScorerError
from rayhf.exploration.metrics import FailureBudget, exploration_metrics
from rayhf.run_dir.tables import read_examples
from rayhf.types import Failed, Group, Invalid, Sample, Scored, Skipped

HUNG = Failed(reason="no response within 2 s")


def group(index, *outcomes):
    completions = request(*["x"] * len(outcomes)).completions
    return Group(
        prompt=make_prompts(20)[index],
        samples=tuple(
            Sample(completion=completion, outcome=outcome)
            for completion, outcome in zip(completions, outcomes, strict=True)
        ),
    )


def test_summary_names_the_prompts_with_most_failures():
    budget = FailureBudget(limit=1.0, expected=100)
    assert budget.summary() == ""
    budget.count(group(3, HUNG, Scored(value=1.0)))
    for index in (5, 6, 7, 8):
        budget.count(group(index, HUNG, HUNG))
    assert budget.summary() == (
        "9 of 10 completions could not be scored: "
        + "; ".join(f"2 of the prompt '{n}': Failed: no response within 2 s" for n in (5, 6, 7))
        + "; and of 2 other prompts"
    )


def test_error_names_the_prompt():
    budget = FailureBudget(limit=0.1, expected=10)
    budget.count(group(1, HUNG))
    with pytest.raises(ScorerError, match=r"2 of 2 .* the last: the prompt '2': Invalid: NaN$"):
        budget.count(group(2, Invalid(reason="NaN")))


def test_skipped_completions_do_not_count():
    budget = FailureBudget(limit=0.0, expected=10)
    groups = [group(0, Skipped(reason="None"), Scored(value=1.0), Invalid(reason="NaN"))]
    with pytest.raises(ScorerError, match="1 of 3 completions"):
        budget.count(groups[0])
    metrics = exploration_metrics(groups, version=0)
    counts = [metrics[f"scorer/{kind}"] for kind in ("skipped", "invalid", "failed")]
    assert counts == [1.0, 1.0, 0.0]


class HangsFor(FakeScorer):
    """A scorer that has no response for the completions of one prompt."""

    def __init__(self, prompt):
        super().__init__()
        self.prompt = prompt

    async def score(self, requests):
        rows = await super().score(requests)
        return [
            (HUNG,) * len(row) if request.prompt.prompt_id == self.prompt.prompt_id else row
            for request, row in zip(requests, rows, strict=True)
        ]


class Events(SilentObserver):
    def __init__(self):
        self.warnings = []

    def event(self, kind, message):
        if kind == "warn":
            self.warnings.append(message)


def test_prompt_that_cannot_be_judged_is_left_out_and_named(tmp_path):
    rule = {"type": "rule", "function": "a:b"}
    config = make_config(
        tmp_path, run={"iterations": 1}, scorer={"train": [rule], "max_failed": 0.25},
        prompts={"train": "t", "batch": 12},
    )  # fmt: skip
    bad = make_prompts(12)[4]
    events = Events()
    run_campaign(config, scorer=HangsFor(bad), observer=events)
    assert events.warnings == [
        "iteration 1: 4 of 48 completions could not be scored: 4 of the prompt '4': Failed: no "
        "response within 2 s"
    ]
    examples = read_examples(config.run.dir / "examples/iteration-000001.parquet")
    trained = {example.rows[0].prompt_id for example in examples}
    assert trained and bad.prompt_id not in trained


class RuleScorer(FakeScorer):
    """A rule in its real process."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    async def score(self, requests):
        return self.rule.score(requests)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no such answer')", "ValueError: no such answer"),
        ("return float('nan')", "the rule returned nan"),
    ],
)
def test_rule_without_a_score_stops_the_run(tmp_path, body, reason):
    signature = "completion, *, prompt, reference_answer, finish_reason"
    (tmp_path / "bad_rules.py").write_text(f"def bad({signature}):\n    {body}\n")
    config = make_config(tmp_path, run={"eval_every": 0})
    rule = make_rule("bad_rules:bad", tmp_path)
    try:
        with pytest.raises(ScorerError, match=reason) as error:
            run_campaign(config, scorer=RuleScorer(rule), heldout=())
    finally:
        rule.close()
    assert error.value.exit_code == 9 and "\n" not in str(error.value)
    assert metrics_of(config) == [{"iteration": 0, "policy/version": 0}]
