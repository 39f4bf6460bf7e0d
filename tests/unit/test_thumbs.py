"""Thumbs of people on single completions: asked, answered later, trained on once, expired."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner
from test_online_kto import SCORES, thumbs
from test_policy_gradient import CONTEXT, build, group_of
from typer.testing import CliRunner

from launch.cli import app
from rayhf.algorithms.base import TakesThumbs
from rayhf.config.registry import ALGORITHMS
from rayhf.config.schema import CampaignConfig
from rayhf.control.commands import FileControl
from rayhf.control.labels import check_labels, labeled_examples, unanswered
from rayhf.errors import ConfigError
from rayhf.monitoring.audit import audit
from rayhf.planning.preflight import check_settings
from rayhf.run_dir.inbox import Inbox
from rayhf.types import GIVEN, PEOPLE, Example, given_row
from rayhf.view.run import Run

PEOPLE_SETTINGS = {"margin": 10.0, "budget": 2, "expire": 2}
"""Every completion is uncertain."""


def config_of(
    directory: Path, *, iterations: int = 4, people: Any = PEOPLE_SETTINGS, **sections: Any
) -> CampaignConfig:
    return make_config(
        directory,
        algorithm={"type": "online_kto", "samples": 2, "threshold": 0.5, "people": people},
        run={"iterations": iterations, "checkpoint_every": 1},
        **sections,
    )


def trained(roles: Any) -> list[list[tuple[tuple[int, ...], float, bool]]]:
    """Of each optimizer step: tokens, thumb, and whether the row counts as given."""
    return [
        [
            (tuple(row.response_ids.tolist()), example.scalars["desirable"], row.sample == GIVEN)
            for example in batch.examples
            for row in example.rows
        ]
        for batch in roles.learners["policy"].batches
    ]


def stored(config: CampaignConfig, iteration: int, objective: str) -> list[Any]:
    file = config.run.dir / f"examples/iteration-{iteration:06d}.parquet"
    return [row for row in pq.read_table(file).to_pylist() if row["objective"] == objective]


def test_completions_near_the_threshold_are_for_people() -> None:
    algorithm = build(
        type="online_kto", threshold=1.5, people={"margin": 0.5, "budget": 1, "expire": 3}
    )
    selection = algorithm.select([group_of(SCORES)], CONTEXT)
    waiting = [e for e in selection.examples if e.objective == PEOPLE]
    assert [e.scalars for e in waiting] == [{"desirable": 0.0, "margin": 0.5, "expires": 4.0}]
    rest = [e for e in selection.examples if e.objective != PEOPLE]
    assert [e.scalars for e in rest] == [{"desirable": x} for x in (0.0, 1.0, 1.0)]
    assert selection.metrics["kto/routed"] == 1 and selection.metrics["kto/expired"] == 0


def test_thumbs_of_people_are_examples() -> None:
    algorithm = build(type="online_kto", threshold=5.0)
    thumb = Example(rows=(given_row("q", [1], [2, 3]),), scalars={"desirable": 1.0})
    selection = algorithm.select([group_of(SCORES)], replace(CONTEXT, thumbs=[thumb]))
    assert thumbs(selection) == [0, 0, 0, 1, 1] and selection.metrics["kto/human"] == 1
    assert isinstance(algorithm, TakesThumbs) and not isinstance(
        ALGORITHMS.build(ALGORITHMS.config_type("online_dpo")()), TakesThumbs
    )


def test_thumb_is_trained_on_once_and_an_unanswered_completion_expires(tmp_path: Path) -> None:
    first = run_campaign(config_of(tmp_path, iterations=1))
    config = config_of(tmp_path)
    check_settings(config)
    waiting = stored(config, 1, PEOPLE)
    control = FileControl(config.run.dir)
    shown = control.uncertain_completions(100)
    assert len(waiting) == 2 and len({each.completion_id for each in shown}) == len(shown) > 2
    texts = {" ".join(map(str, row["response_ids"][0])): row for row in waiting}
    assert {each.completion for each in shown[:2]} == texts.keys()  # those that wait first
    answered = shown[0]
    scorer_s = dict(texts[answered.completion]["scalars"])["desirable"]
    verdict = {"completion_id": answered.completion_id, "verdict": "down" if scorer_s else "up"}
    assert "1 labels submitted" in control.label([verdict], source="ann")
    assert "0 labels submitted" in control.label([verdict], source="ann")
    assert answered not in control.uncertain_completions(100)
    tokens = {tuple(map(int, each.completion.split())) for each in shown[:2]}
    assert not any(tokens & {t for t, _, _ in step} for step in trained(first))
    steps = trained(run_campaign(config))  # iterations 2 to 4
    own = tuple(map(int, answered.completion.split()))
    (other,) = tokens - {own}
    given = [[(t, up) for t, up, given in step if given] for step in steps]
    other_s = dict(texts[" ".join(map(str, other))]["scalars"])["desirable"]
    assert given[0] == [(own, 1.0 - scorer_s)] and given[1] == [(other, other_s)]
    lines = metrics_of(config)[1:]
    assert [line["kto/routed"] for line in lines] == [2] * 4
    assert [line.get("kto/human", 0) for line in lines] == [0, 1, 0, 0]
    assert [line["kto/expired"] for line in lines] == [0, 0, 1, 2]
    assert [f for f in audit(config.run.dir, deep=True) if f.problem] == []


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = config_of(tmp_path / "a")
    broken = config_of(tmp_path / "b")
    for config in (whole, broken):
        run_campaign(config_of(config.run.dir.parent, iterations=1))
        shown = FileControl(config.run.dir).uncertain_completions(2)
        verdicts = [{"completion_id": each.completion_id, "verdict": "up"} for each in shown[:1]]
        FileControl(config.run.dir).label(verdicts, source="ann")
    run_campaign(whole)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=FakeLearner(fail_at=2))
    run_campaign(broken)
    assert metrics_of(whole) == metrics_of(broken)
    assert sum(line.get("kto/human", 0) for line in metrics_of(broken)) == 1
    for file in sorted((whole.run.dir / "examples").glob("*.parquet")):
        assert file.read_bytes() == (broken.run.dir / "examples" / file.name).read_bytes()


def test_contradicting_and_repeated_thumbs(tmp_path: Path) -> None:
    config = config_of(tmp_path, iterations=2)
    run_campaign(config)
    control = FileControl(config.run.dir)
    name = control.uncertain_completions(1)[0].completion_id
    control.label([{"completion_id": name, "verdict": "up"}], source="ann")
    said = control.label([{"completion_id": name, "verdict": "down"}], source="ann")
    assert "1 replace an earlier verdict of yours" in said and "contradict" not in said
    said = control.label([{"completion_id": name, "verdict": "up"}], source="bob")
    assert f"on 1 completions; the first is '{name}': down and up" in said
    rows = Inbox(config.run.dir).take("labels", 3)
    warnings: list[str] = []
    examples = labeled_examples(config.run.dir, rows, warn=warnings.append)
    assert [e.scalars["desirable"] for e in examples] == [0.0, 1.0] and "contradict" in warnings[0]
    sample = Run(config.run.dir, "run").labeled()
    iteration, prompt, index = name.split("/")
    assert sample == {(int(iteration), prompt, int(index)): "thumb up"}


def test_thumb_on_an_unknown_completion_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, iterations=2)
    run_campaign(config)
    run = config.run.dir
    prompt = FileControl(run).uncertain_completions(1)[0].completion_id.split("/")[1]
    for name in (
        f"9/{prompt}/0",
        f"2/{prompt}/7",
        f"2/{prompt}/0/1",
        "2/nobody/0",
        f"../{prompt}/0",
    ):
        with pytest.raises(ConfigError, match="no completion"):
            check_labels(run, [{"completion_id": name, "verdict": "up"}])
    both = {"pair_id": f"2/{prompt}/0/1", "completion_id": f"2/{prompt}/0", "verdict": "up"}
    for label, expected in (
        ({"completion_id": f"2/{prompt}/0", "verdict": "tie"}, "expected up, down"),
        ({"pair_id": f"2/{prompt}/0/1", "verdict": "up"}, "expected first, second, tie"),
        (both, "expected one of pair_id and completion_id"),
        ({"verdict": "up"}, "expected one of pair_id and completion_id"),
    ):
        with pytest.raises(ConfigError, match=expected):
            check_labels(run, [label])


def test_algorithm_of_pairs_refuses_thumbs_and_skips_those_written_by_hand(tmp_path: Path) -> None:
    settings = {"iterations": 2, "checkpoint_every": 1}
    config = make_config(tmp_path, algorithm={"type": "online_dpo", "samples": 2}, run=settings)
    run_campaign(config)
    control = FileControl(config.run.dir)
    name = control.uncertain_completions(1)[0].completion_id
    verdict = {"completion_id": name, "verdict": "up"}
    with pytest.raises(ConfigError, match="online_dpo trains on pairs, not on single completions"):
        control.label([verdict], source="ann")
    inbox = config.run.dir / "inbox/labels.jsonl"
    inbox.parent.mkdir(exist_ok=True)
    inbox.write_text(json.dumps({"id": "hand", "source": "me", **verdict}) + "\n")
    more = {**settings, "iterations": 3}
    again = make_config(tmp_path, algorithm={"type": "online_dpo", "samples": 2}, run=more)
    run_campaign(again)
    assert "pairs/human" not in metrics_of(again)[3]


def test_a_label_judges_one_completion() -> None:
    waits = Example(rows=(replace(given_row("p", (1,), (2,)), sample=3),))
    others = [{"completion_id": name} for name in ("6/p/3", "7/p/2", "7/q/3")]
    assert unanswered(7, [waits], [*others, {"pair_id": "7/p/3/1"}]) == (waits,)
    assert unanswered(7, [waits], [{"completion_id": "7/p/3"}]) == ()


def test_thumbs_in_the_terminal(tmp_path: Path) -> None:
    config = config_of(tmp_path, iterations=2)
    run_campaign(config)
    run = str(config.run.dir)
    result = CliRunner().invoke(app, ["label", run, "--count", "4"], input="u\ns\nd\nq\n")
    assert result.exception is None and "2 labels submitted" in result.output
    shown = CliRunner().invoke(app, ["completions", run, "--count", "1"])
    row = json.loads(shown.output)
    assert row.keys() == {"completion_id", "messages", "completion", "certainty"}
    file = tmp_path / "verdicts.jsonl"
    file.write_text(json.dumps({"completion_id": row["completion_id"], "verdict": "down"}) + "\n")
    assert (
        "1 labels submitted" in CliRunner().invoke(app, ["label", run, "--file", str(file)]).output
    )
    rows = [json.loads(line) for line in (config.run.dir / "inbox/labels.jsonl").open()]
    assert [row["verdict"] for row in rows] == ["up", "down", "down"]


def test_completions_that_expire_before_people_see_them_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, people={"margin": 1.0, "expire": 2}).model_copy()
    late = config.model_copy(update={"run": config.run.model_copy(update={"checkpoint_every": 2})})
    with pytest.raises(ConfigError, match=r"algorithm\.people\.expire is 2 iterations"):
        check_settings(late)
