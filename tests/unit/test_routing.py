"""Hybrid routing: which pairs wait for people, and what becomes of them."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner
from test_policy_gradient import CONTEXT

from rayhf.algorithms.routing import PeopleConfig, route
from rayhf.control.commands import FileControl
from rayhf.control.labels import unanswered
from rayhf.episodes import Inserted
from rayhf.errors import ConfigError
from rayhf.monitoring.audit import audit
from rayhf.planning.preflight import check_settings
from rayhf.types import GIVEN, PEOPLE, Example, given_row, token_array

PEOPLE_SETTINGS = {"margin": 10.0, "budget": 2, "expire": 2}
"""Every pair is uncertain."""


def config_of(directory, *, people=PEOPLE_SETTINGS, iterations=4, name="online_dpo"):
    algorithm = {"type": name, "samples": 4, "people": people}
    return make_config(
        directory, algorithm=algorithm, run={"iterations": iterations, "checkpoint_every": 1}
    )


def pairs_of(*margins):
    row = given_row("p", (1,), (2,))
    return [Example(rows=(row, row), scalars={"margin": margin}) for margin in margins]


def test_least_certain_pairs_within_margin_and_budget_are_for_people():
    config = PeopleConfig(margin=1.0, budget=2, expire=3)
    routed = route(pairs_of(0.9, 5.0, 0.2, 1.0, 0.5), config, CONTEXT)
    assert [pair.scalars["margin"] for pair in routed.scorer] == [0.9, 5.0, 1.0]
    assert [pair.scalars for pair in routed.people] == [
        {"margin": 0.2, "expires": 4.0},
        {"margin": 0.5, "expires": 4.0},
    ]
    assert {pair.objective for pair in routed.people} == {PEOPLE} and not routed.expired


def test_expired_pair_of_episodes_keeps_the_tokens_of_the_environment():
    config = PeopleConfig(margin=1.0, expire=2)
    inserted = Inserted(token_ids=token_array([7, 8]), before=token_array([1, 1]))
    row = given_row("p", (1,), (2, 3), score=0.5, inserted=inserted)
    waits = Example(rows=(row, row), scalars={"margin": 0.1}, objective=PEOPLE)
    routed = route([], config, replace(CONTEXT, unanswered=lambda iteration: (waits,)))
    assert [row.inserted for row in routed.expired[0].rows] == [inserted, inserted]


def stored(config, iteration, objective=PEOPLE):
    file = config.run.dir / f"examples/iteration-{iteration:06d}.parquet"
    rows = pq.read_table(file).to_pylist()
    return [
        tuple(tuple(ids) for ids in row["response_ids"])
        for row in rows
        if row["objective"] == objective
    ]


def trained(roles):
    """The pairs of each optimizer step, as token ids, and whether they count as given."""
    return [
        {
            tuple(tuple(row.response_ids.tolist()) for row in e.rows): e.rows[0].sample == GIVEN
            for e in batch.examples
        }
        for batch in roles.learners["policy"].batches
    ]


def test_pair_without_a_verdict_comes_back_as_the_scorer_judged_it(tmp_path):
    config = config_of(tmp_path)
    check_settings(config)
    steps = trained(run_campaign(config))
    waiting = [stored(config, iteration) for iteration in (1, 2, 3, 4)]
    assert [len(pairs) for pairs in waiting] == [2] * 4
    for step, pairs in zip(steps, waiting, strict=True):
        assert not set(pairs) & set(step)
    for back in (0, 1):  # of iterations 1 and 2, in 3 and 4
        assert {pair for pair, given in steps[back + 2].items() if given} == set(waiting[back])
    lines = metrics_of(config)[1:]
    assert [line["pairs/routed"] for line in lines] == [2] * 4
    assert [line["pairs/expired"] for line in lines] == [0, 0, 2, 2]
    assert [line["pairs/kept"] for line in lines] == [
        sum(not given for given in step.values()) for step in steps
    ]
    assert [f for f in audit(config.run.dir, deep=True) if f.problem] == []


@pytest.mark.parametrize("name", ["online_dpo", "iterative_dpo"])
def test_judged_pair_is_trained_on_once_as_people_judged_it(tmp_path, name):
    run_campaign(config_of(tmp_path, iterations=1, name=name))
    config = config_of(tmp_path, name=name)
    control = FileControl(config.run.dir)
    shown = control.uncertain_pairs(100)
    waiting = stored(config, 1)
    assert len(shown) > 2 and len({pair.pair_id for pair in shown}) == len(shown)
    texts = [{" ".join(map(str, ids)) for ids in pair} for pair in waiting]
    assert all({pair.first, pair.second} in texts for pair in shown[:2])  # those that wait first
    control.label([{"pair_id": shown[0].pair_id, "verdict": "second"}], source="ann")
    steps = trained(run_campaign(config))  # iterations 2 to 4
    preferred = tuple(map(int, shown[0].second.split()))
    other = tuple(map(int, shown[0].first.split()))
    assert steps[0][preferred, other]
    judged = {preferred, other}
    (expired,) = (pair for pair in waiting if set(pair) != judged)
    assert {pair for pair, given in steps[1].items() if given} == {expired}
    lines = metrics_of(config)[1:]
    assert [line.get("pairs/human", 0) for line in lines] == [0, 1, 0, 0]
    assert [line["pairs/expired"] for line in lines] == [0, 0, 1, 2]


def test_expired_pairs_are_no_longer_shown(tmp_path):
    config = config_of(tmp_path)
    run_campaign(config)
    shown = FileControl(config.run.dir).uncertain_pairs(100)
    assert [pair.pair_id.split("/")[0] for pair in shown[:5]] == ["4", "4", "3", "3", "4"]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = config_of(tmp_path / "a")
    broken = config_of(tmp_path / "b")
    run_campaign(whole)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=FakeLearner(fail_at=2))
    run_campaign(broken)
    assert metrics_of(whole) == metrics_of(broken)
    for file in sorted((whole.run.dir / "examples").glob("*.parquet")):
        assert file.read_bytes() == (broken.run.dir / "examples" / file.name).read_bytes()


def test_a_label_judges_a_pair_in_either_order():
    row = given_row("p", (1,), (2,))
    pair = Example(rows=(replace(row, sample=3), replace(row, sample=1)))
    assert unanswered(7, [pair], [{"pair_id": "7/p/1/2"}, {"pair_id": "6/p/1/3"}]) == (pair,)
    for pair_id in ("7/p/1/3", "7/p/3/1"):
        assert unanswered(7, [pair], [{"pair_id": pair_id}]) == ()


@pytest.mark.parametrize("every", [0, 2, 20])
def test_pairs_that_expire_before_people_see_them_are_refused(tmp_path, every):
    config = make_config(
        tmp_path,
        algorithm={"type": "online_dpo", "people": PEOPLE_SETTINGS},
        run={"checkpoint_every": every},
    )
    with pytest.raises(ConfigError, match=r"people\.expire is 2 .* checkpoint_every from 1 to 1"):
        check_settings(config)
