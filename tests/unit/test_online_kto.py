"""Online KTO: thumbs from scores and people, the KL estimate, balanced weights."""

from dataclasses import replace

import numpy as np
import pytest
from test_losses_kto import CONFIG, expected, micro_of
from test_policy_gradient import CONTEXT, build, group_of

from rayhf.algorithms.base import TakesLabels
from rayhf.losses.kto import KTOLoss
from rayhf.types import GIVEN, Example, float_array, given_row

SCORES = [0.0, 1.0, 2.0, 9.0]


def selected(scores, labels=(), **settings):
    algorithm = build(type="online_kto", **settings)
    context = replace(CONTEXT, labels=labels)
    return algorithm, algorithm.select([group_of(scores)], context)


def thumbs(selection):
    return [example.scalars["desirable"] for example in selection.examples]


@pytest.mark.parametrize(
    ("threshold", "ups"),
    [(1.0, [0, 1, 1, 1]), ("mean", [0, 0, 0, 1]), ("median", [0, 0, 1, 1]), (10.0, [0, 0, 0, 0])],
)
def test_thumbs_of_scores(threshold, ups):
    _, selection = selected(SCORES, threshold=threshold)
    assert thumbs(selection) == ups
    assert selection.metrics["kto/desirable"] == np.mean(ups)
    assert selection.no_signal == float(sum(ups) == 0)


def test_equal_scores_have_thumbs_only_by_a_number():
    assert thumbs(selected([0.1] * 3, threshold="mean")[1]) == []
    assert thumbs(selected([0.1] * 3, threshold=0.0)[1]) == [1.0] * 3


def test_truncated_completions_are_penalized():
    algorithm = build(type="online_kto", threshold=0.5, missing_eos_penalty=1.0)
    selection = algorithm.select([group_of([1.0, 1.0], truncated=[1])], CONTEXT)
    assert thumbs(selection) == [1.0, 0.0]


def test_pairs_of_people_are_two_thumbs():
    pair = Example(rows=(given_row("q", [1], [2, 3]), given_row("q", [1], [4])))
    algorithm, selection = selected(SCORES, [pair], threshold=5.0)
    assert isinstance(algorithm, TakesLabels) and selection.metrics["pairs/human"] == 1
    human = [e for e in selection.examples if e.rows[0].sample == GIVEN]
    assert [(e.rows[0].response_ids.tolist(), e.scalars["desirable"]) for e in human] == [
        ([2, 3], 1.0),
        ([4], 0.0),
    ]


def annotated(examples, ref):
    return [
        replace(e, rows=(e.rows[0].with_tokens(ref_logp=float_array([ref] * n)),))
        for e in examples
        for n in (len(e.rows[0].response_ids),)
    ]


@pytest.mark.parametrize(("ref", "kl"), [(-1.5, 1.0), (-0.5, 0.0)])
def test_kl_is_the_mean_log_ratio_of_the_policys_samples_at_least_0(ref, kl):
    pair = Example(rows=(given_row("q", [1], [2, 3]), given_row("q", [1], [4])))
    algorithm, selection = selected(SCORES, [pair], threshold=5.0)
    # Two tokens of log-prob -1 each; completions of pairs from people have none.
    examples, _ = algorithm.credit(annotated(selection.examples, ref))
    assert len(examples) == 6 and {e.scalars["kl"] for e in examples} == {kl}


@pytest.mark.parametrize(
    ("threshold", "balance", "weights"),
    [
        (5.0, 10.0, (4.5, 0.5)),  # one up, three down
        (1.0, 10.0, (1.5, 1.5)),  # three up, one down
        (5.0, 2.0, (3.0, 0.5)),
        (5.0, None, (1.5, 0.5)),
        (10.0, 10.0, (1.5, 0.5)),  # nothing to balance
    ],
)
def test_weights_are_balanced_up_to_a_limit(threshold, balance, weights):
    loss = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    algorithm, selection = selected(SCORES, threshold=threshold, balance=balance, loss=loss)
    _, metrics = algorithm.credit(annotated(selection.examples, -1.0))
    config = algorithm.loss().config
    assert (config.desirable_weight, config.undesirable_weight) == weights
    assert tuple(metrics.values()) == weights


def test_loss_on_samples_has_the_same_value_and_more_metrics():
    logp_T, micro = micro_of(range(4))
    tokens = {**micro.tokens, "behavior_logp": logp_T.detach() - 0.25}
    out = KTOLoss(CONFIG, sampled=True)(logp_T, replace(micro, tokens=tokens))
    assert out.loss.item() == pytest.approx(expected(), abs=1e-12)
    assert out.metrics["rollout/mismatch_kl"].item() == pytest.approx(-0.25)
    assert "reference/kl" in out.metrics
