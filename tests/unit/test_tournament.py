"""Tournaments and anchors over a scorer that records which pairs it is asked about."""

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from pydantic import ValidationError
from score_requests import request, win_of
from test_scorer_judge import FakeGenerator, longest

from rayhf.config.comparisons import Anchors, KnockOut, RoundRobin, Swiss
from rayhf.config.scorers import PairwiseEntryConfig, PointwiseEntryConfig
from rayhf.errors import ConfigError
from rayhf.evaluation.win_rates import fit_strengths
from rayhf.planning.comparisons import comparisons_table
from rayhf.planning.preflight import check_settings
from rayhf.scorer.build import build_scorer, check_entries, check_heldout
from rayhf.scorer.combine import Combined
from rayhf.scorer.judge import Judge
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.judge_model import LocalModel
from rayhf.scorer.parts import Part
from rayhf.scorer.protocol import PairwiseScorer, ScorerSetup
from rayhf.scorer.rule_config import PairwiseRuleConfig
from rayhf.scorer.schedules import knock_out, swiss
from rayhf.scorer.tournament import check_anchors, completed, draw, with_comparisons
from rayhf.types import Compared, Failed, Invalid, JudgeReply, Scored, win_rates

SETUP = ScorerSetup(base=Path())
NAN = math.nan


class Longer(PairwiseScorer):
    """The longer text wins with probability `sure`; remembers the pairs it was asked about."""

    Config = PairwiseEntryConfig

    def __init__(self, sure=1.0, broken=(), failure=None):
        super().__init__(PairwiseEntryConfig(name="longer"), SETUP)
        self.sure = sure
        self.broken = broken
        self.failure = failure or Invalid(reason="no verdict")
        self.asked = []
        self.calls = 0

    def compare(self, requests):
        self.calls += 1
        return [self._compare([c.text for c in r.completions]) for r in requests]

    def _compare(self, texts):
        if len(texts) == 2:
            self.asked.append(frozenset(texts))
            if set(texts) & set(self.broken):
                return self.failure
        lengths = np.array([len(text) for text in texts])
        sign = np.sign(lengths[:, None] - lengths[None, :])
        replies = tuple((JudgeReply(text=text, against=1 - i),) for i, text in enumerate(texts))
        return Compared(
            win=0.5 + (self.sure - 0.5) * sign,
            source="pairwise",
            replies=replies if len(texts) == 2 else (),
        )


def entry(comparisons):
    return PairwiseEntryConfig(name="longer", comparisons=comparisons)


def wrapped(comparisons, engine):
    return with_comparisons(entry(comparisons), SETUP, engine)


def texts_of(number):
    """Different texts, the i-th of length i + 1, in an order of their own."""
    texts = [chr(97 + i) * (i + 1) for i in range(number)]
    random.Random(number).shuffle(texts)
    return texts


def values(outcomes):
    assert all(isinstance(outcome, Scored) for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def play(schedule, seed):
    """Play a schedule with random results, some without a verdict; return its pairs by round."""
    rng = random.Random(seed)
    rounds = []
    try:
        pairs = next(schedule)
        while True:
            rounds.append(pairs)
            pairs = schedule.send([rng.choice([0.0, 0.5, 1.0, None]) for _ in pairs])
    except StopIteration:
        return rounds


# --------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("players", range(2, 20))
def test_swiss_asks_the_stated_number_and_no_pair_twice(players):
    for rounds in range(1, math.ceil(players / 2) + 1):
        for seed in range(5):
            played = play(swiss(players, rounds), seed)
            pairs = [frozenset(pair) for each in played for pair in each]
            assert [len(each) for each in played] == [players // 2] * rounds
            assert len(set(pairs)) == len(pairs) == Swiss(rounds=rounds).asked(players)
            for each in played:  # nobody plays twice in a round
                assert len({player for pair in each for player in pair}) == 2 * len(each)


@pytest.mark.parametrize("players", range(2, 20))
def test_a_knock_out_loser_does_not_play_again(players):
    for seed in range(5):
        rng = random.Random(seed)
        schedule = knock_out(players)
        out = set()
        asked = 0
        waited = set()
        try:
            pairs = next(schedule)
            while True:
                here = {player for pair in pairs for player in pair}
                assert not here & out
                absent = set(range(players)) - out - here
                assert len(absent) <= 1 and not absent & waited
                waited = absent
                asked += len(pairs)
                results = [rng.choice([0.2, 0.5, 0.9, None]) for _ in pairs]
                out |= {
                    first if result is not None and result < 0.5 else second
                    for (first, second), result in zip(pairs, results, strict=True)
                }
                pairs = schedule.send(results)
        except StopIteration:
            assert len(out) == asked == players - 1 == KnockOut().asked(players)


def test_default_rounds_are_the_logarithm():
    assert [Swiss().rounds_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 16)] == [0, 1, 2, 2, 3, 3, 4, 4]
    assert [Swiss().asked(8), RoundRobin().asked(8), Anchors(count=2).asked(8)] == [12, 28, 16]


# ------------------------------------------------------------------------------------- tournaments


@pytest.mark.parametrize("comparisons", ["round_robin", "knock_out", "swiss"])
@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_a_sure_judge_finds_the_best_with_the_stated_comparisons(comparisons, number):
    engine = Longer()
    scorer = wrapped(comparisons, engine)
    requests = [request(*texts_of(number), prompt_id=f"p{i}") for i in range(3)]
    for each, outcomes in zip(requests, scorer.score(requests), strict=True):
        rates = values(outcomes)
        lengths = [len(completion.text) for completion in each.completions]
        assert np.argmax(rates) == np.argmax(lengths)
        assert np.mean(rates) == pytest.approx(0.5)
    stated = scorer.config.comparisons.asked(number)
    assert scorer.take_counts() == {"comparisons": 3.0 * stated}
    assert scorer.take_counts() == {"comparisons": 0.0}
    if comparisons == "round_robin":
        assert engine.calls == 1
    else:
        assert len(engine.asked) == 3 * stated


def test_all_requests_share_the_calls_of_a_round():
    engine = Longer()
    wrapped({"type": "swiss", "rounds": 2}, engine).compare(
        [request(*texts_of(n), prompt_id=f"p{n}") for n in (1, 2, 4, 8)]
    )
    assert engine.calls == 2


@pytest.mark.parametrize("comparisons", ["knock_out", "swiss"])
def test_scores_follow_from_the_prompt_and_the_texts_alone(comparisons):
    """Neither earlier calls nor the order of the completions matters."""
    texts = texts_of(7)
    engine = Longer(0.8)
    scorer = wrapped(comparisons, engine)
    [first] = scorer.compare([request(*texts)])
    asked = list(engine.asked)
    [again] = wrapped(comparisons, Longer(0.8)).compare([request(*texts)])
    np.testing.assert_array_equal(win_of(first), win_of(again))
    scorer.compare([request(*texts, prompt_id="other"), request("x", "yy")])
    order = [3, 0, 6, 1, 5, 2, 4]
    engine.asked.clear()
    [moved] = scorer.compare([request(*(texts[i] for i in order))])
    assert engine.asked == asked
    np.testing.assert_array_equal(win_of(moved), win_of(first)[np.ix_(order, order)])


def test_the_draw_depends_on_the_prompt_and_on_the_group():
    texts = texts_of(6)
    assert draw("p", texts) == draw("p", texts[::-1] + texts)
    assert draw("p", texts) != draw("q", texts)
    assert [t for t in draw("p", [*texts, "new"]) if t != "new"] != draw("p", texts)
    assert sorted(draw("p", ["\ud800", "a"])) == ["a", "\ud800"]


@pytest.mark.parametrize("comparisons", ["knock_out", "swiss"])
def test_equal_texts_tie_without_a_question(comparisons):
    engine = Longer()
    scorer = wrapped(comparisons, engine)
    [compared] = scorer.compare([request("bb", "a", "bb", "ccc", "a")])
    assert scorer.take_counts()["comparisons"] == scorer.config.comparisons.asked(3)
    win = win_of(compared)
    assert win[0, 2] == win[2, 0] == win[1, 4] == 0.5
    np.testing.assert_array_equal(win[0], win[2])
    np.testing.assert_array_equal(win[:, 1], win[:, 4])
    [outcomes] = scorer.score([request("a", "a", "a")])
    assert values(outcomes) == [0.5] * 3 and scorer.take_counts()["comparisons"] == 0
    [(alone,)] = scorer.score([request("a")])
    assert isinstance(alone, Invalid) and "at least two completions" in alone.reason


def test_verdicts_stay_and_other_pairs_are_fitted():
    engine = Longer(0.9)
    [compared] = wrapped("swiss", engine).compare([request(*texts_of(8))])
    texts = texts_of(8)
    win = win_of(compared)
    np.testing.assert_array_equal(win + win.T, 1.0)
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            if frozenset((one, other)) in engine.asked:
                assert win[i, j] == (0.9 if len(one) > len(other) else 1 - 0.9)
            elif i != j:
                assert 0.0 < win[i, j] < 1.0


def test_mean_win_probabilities_rank_as_the_strengths():
    """A player's expected wins in the fit are its wins, see the module's docstring."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        wins = np.full((6, 6), NAN)
        np.fill_diagonal(wins, 0.5)
        for _ in range(8):
            i, j = rng.choice(6, 2, replace=False)
            wins[i, j] = rng.choice([0.0, 0.25, 0.5, 1.0])
            wins[j, i] = 1.0 - wins[i, j]
        known = np.isfinite(wins) & ~np.eye(6, dtype=bool)
        rated = known.any(axis=1)
        prior = np.full((7, 7), 0.5)
        prior[:6, :6] = np.where(known, wins, 0.0)
        prior[6, 6] = 0.0
        index = [*np.flatnonzero(rated), 6]
        strength = fit_strengths(prior[np.ix_(index, index)])[:-1]
        rates = win_rates(completed(wins), include_self=False)
        assert np.isfinite(rates).tolist() == rated.tolist()
        rates = rates[rated]
        order = np.argsort(strength)
        assert (np.diff(rates[order]) > -1e-8).all()
        assert rates.mean() == pytest.approx(0.5)


def test_a_pair_without_a_verdict_leaves_the_others():
    engine = Longer(broken={"b"})
    [outcomes] = wrapped({"type": "swiss", "rounds": 2}, engine).score(
        [request("aa", "b", "ccc", "dddd")]
    )
    assert isinstance(outcomes[1], Invalid) and "no verdict" in outcomes[1].reason
    rates = values([outcomes[0], outcomes[2], outcomes[3]])
    assert max(rates) == rates[2] and len(engine.asked) == 4


def test_a_judge_that_is_down_is_not_asked_for_the_next_round():
    down = Failed(reason="down", transient=True)
    engine = Longer(broken={"a", "bb", "ccc", "dddd"}, failure=down)
    scorer = wrapped("swiss", engine)
    assert scorer.compare([request("a", "bb", "ccc", "dddd")]) == [down]
    assert engine.calls == 1
    [outcomes] = scorer.score([request("a", "bb", "ccc", "dddd")])
    assert outcomes == (down,) * 4
    assert scorer.compare([request("a", "a", "bb")]) == [down]  # the tie of the copies is none


def test_replies_name_the_completions_of_the_whole_request():
    texts = texts_of(4)
    engine = Longer()
    [compared] = wrapped("swiss", engine).compare([request(*texts)])
    for i, replies in enumerate(compared.replies):
        assert len(replies) == 2
        for reply in replies:
            assert reply.text == texts[i]
            assert frozenset((texts[i], texts[reply.against])) in engine.asked


def test_a_language_model_sees_every_pair_in_both_orders():
    generator = FakeGenerator(longest)
    config = JudgeConfig(model=Path("j"), mode="pairwise", comparisons="swiss", keep_replies=3)
    judge = with_comparisons(config, SETUP, Judge(config, LocalModel(config, generator)))
    [outcomes] = judge.score([request(*texts_of(4))])
    assert np.argmax(values(outcomes)) == np.argmax([len(text) for text in texts_of(4)])
    counts = judge.take_counts()
    assert counts == {"comparisons": 4.0, "pairs": 4.0, "pairs_order_dependent": 0.0}
    assert len(generator.requests) == 2 * 4 == config.calls_per_comparison * 4
    assert all(1 <= len(outcome.replies) <= 3 for outcome in outcomes)


# ------------------------------------------------------------------------------------------ anchors


def anchored(*texts, anchors):
    plain = request(*texts)
    return replace(plain, prompt=replace(plain.prompt, row={"prompt": "?", "anchors": anchors}))


def test_a_score_is_the_win_rate_against_the_anchors():
    engine = Longer(0.8)
    scorer = wrapped({"type": "anchors", "count": 2}, engine)
    [outcomes, alone] = scorer.score(
        [
            anchored("aa", "b", "cccc", "b", anchors=["dd", "eee", "never asked"]),
            anchored("eee", anchors=["dd", "eee"]),
        ]
    )
    assert values(outcomes) == pytest.approx([0.35, 0.2, 0.8, 0.2])
    assert values(alone) == pytest.approx([0.65])
    assert scorer.take_counts() == {"comparisons": 3 * 2 + 1.0}  # equal texts are asked once
    assert not scorer.config.is_pairwise  # so that it may score a single completion
    parts = [(reply.part, reply.against) for reply in outcomes[0].replies]
    assert parts[:2] == [("anchor 1", None), ("anchor 2", None)]
    assert parts[2:] == [("anchor 1, shown first", None), ("anchor 2, shown first", None)]


def test_an_anchor_without_a_verdict_does_not_count():
    scorer = wrapped({"type": "anchors", "count": 2}, Longer(broken={"dd"}))
    [outcomes] = scorer.score([anchored("aaa", anchors=["dd", "b"])])
    assert values(outcomes) == [1.0]
    scorer = wrapped("anchors", Longer(broken={"dd"}, failure=Failed(reason="down")))
    assert scorer.score([anchored("aaa", anchors="dd")]) == [(Failed(reason="down"),)]
    [(missing,)] = scorer.score([request("aaa")])
    assert isinstance(missing, Failed) and "no anchors in column 'anchors'" in missing.reason


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "?"}, "the row has no anchors in column 'anchors'.*its columns: prompt"),
        ({"anchors": [1]}, r"expected a text or a list of texts, got \[1\]"),
        ({"anchors": "one"}, "the row has 1 anchors in column 'anchors', and .*count is 2"),
    ],
)
def test_rows_without_anchors_are_refused(row, expected):
    prompt = replace(request("x").prompt, row=row)
    with pytest.raises(ConfigError, match=f"the prompt '2.2.'.*{expected}"):
        check_anchors(entry({"type": "anchors", "count": 2}), [prompt])
    check_anchors(entry(None), [prompt])


def test_built_scorers_are_asked_as_their_entries_say(tmp_path):
    """Through the factory and a rule in a process of its own."""
    function = "rayhf.tiny.arithmetic:prefer"
    swiss = PairwiseRuleConfig(name="swiss", function=function, comparisons="swiss")
    given = PairwiseRuleConfig(name="given", function=function, comparisons="anchors")
    scorer = build_scorer([swiss, given], ScorerSetup(base=tmp_path))
    texts = ["Answer: 4", "Answer: 5", "2+2=4\nAnswer: 4", "nonsense"]
    try:
        outcomes = scorer.score([anchored(*texts, anchors="Answer: 6")])[0]
        assert scorer.take_counts() == {"swiss/comparisons": 4.0, "given/comparisons": 4.0}
    finally:
        scorer.close()
    assert [outcome.parts["given"] for outcome in outcomes] == [1.0, 0.5, 1.0, 0.5]
    right, wrong, worked, nonsense = (outcome.parts["swiss"] for outcome in outcomes)
    assert min(right, worked) > 0.5 > max(wrong, nonsense)
    check_heldout([given], where="scorer.evaluate")
    with pytest.raises(ConfigError, match=r"scorer.train\[0\]: the prompt '2.2.': the row has no"):
        check_entries([given], tmp_path, prompts=[request("x").prompt])


# ------------------------------------------------------------------------------------ configuration


def test_comparisons_are_for_scorers_that_compare():
    with pytest.raises(ValidationError, match="is for a scorer that compares"):
        PointwiseEntryConfig(name="rule", comparisons="swiss")
    with pytest.raises(ValidationError, match="is for a scorer that compares"):
        JudgeConfig(model=Path("j"), mode="rating", comparisons="swiss")
    judge = JudgeConfig(model=Path("j"), mode="pairwise", comparisons="anchors", normalize=True)
    assert judge.compares and not judge.is_pairwise
    with pytest.raises(ValidationError, match="normalize are for scores"):
        JudgeConfig(model=Path("j"), mode="pairwise", comparisons="swiss", normalize=True)


def scorer_section(comparisons):
    scorer = {"type": "pairwise_rule", "function": "a:b", "comparisons": comparisons}
    return {"train": [scorer]}


@pytest.mark.parametrize(
    ("algorithm", "comparisons", "expected"),
    [
        ({"type": "sppo"}, "knock_out", "is knock_out, but sppo regresses .* round_robin or swiss"),
        ({"type": "inpo"}, "anchors", "is anchors, but inpo regresses"),
        ({"type": "mcts_dpo"}, "swiss", "mcts_dpo scores completions one by one"),
        ({"type": "ppo", "samples": 1}, "swiss", "samples is 1; expected at least 2, or comparis"),
        (
            {"type": "grpo", "samples": 6},
            {"type": "swiss", "rounds": 4},
            "rounds is 4, and a prompt has 6 completions; expected at most 3, or round_robin",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(tmp_path, algorithm, comparisons, expected):
    config = make_config(tmp_path, algorithm=algorithm, scorer=scorer_section(comparisons))
    with pytest.raises(ConfigError, match=expected):
        check_settings(config)


@pytest.mark.parametrize(
    ("algorithm", "comparisons"),
    [
        ({"type": "ppo", "samples": 1}, "anchors"),
        ({"type": "mcts_dpo"}, "anchors"),
        ({"type": "sppo"}, "swiss"),
        ({"type": "online_dpo"}, "knock_out"),
    ],
)
def test_combinations_that_work(tmp_path, algorithm, comparisons):
    check_settings(make_config(tmp_path, algorithm=algorithm, scorer=scorer_section(comparisons)))


def test_the_plan_has_the_comparisons_of_an_iteration(tmp_path):
    judge = {"type": "judge", "mode": "pairwise", "model": "m", "votes": 3, "temperature": 0.7}
    train = [judge | {"comparisons": "swiss"}, {"type": "pairwise_rule", "function": "a:b"}]
    config = make_config(
        tmp_path, algorithm={"type": "grpo", "samples": 8}, scorer={"train": train}
    )
    algorithm, derived = check_settings(config)
    assert comparisons_table(config, algorithm, derived.samples_per_iteration) == [
        (
            "comparisons per iteration, judge",
            "at most 48: swiss, 12 for the 8 completions of a prompt; 288 calls of the judge",
        ),
        (
            "comparisons per iteration, b",
            "at most 112: round_robin, 28 for the 8 completions of a prompt",
        ),
    ]


# ---------------------------------------------------------------------------------------- campaigns


class InProcess:
    """The scorer role around scorers in this process."""

    def __init__(self, scorer):
        self.scorer = scorer

    async def score(self, requests):
        await asyncio.sleep(0)
        return self.scorer.score(requests)

    async def compare(self, requests):
        await asyncio.sleep(0)
        return self.scorer.compare(requests)

    async def state_dict(self):
        return {}

    async def load_state_dict(self, state): ...

    async def take_counts(self):
        return self.scorer.take_counts()


@pytest.mark.parametrize(
    "algorithm", ["grpo", "rloo", "online_dpo", "iterative_dpo", "sppo", "inpo"]
)
def test_loops_learn_from_a_tournament(tmp_path, algorithm):
    config = make_config(
        tmp_path,
        algorithm={"type": algorithm, "samples": 4},
        run={"iterations": 1},
        scorer=scorer_section("swiss"),
    )
    scorer = wrapped("swiss", Longer(0.9))
    roles = run_campaign(
        config, scorer=InProcess(Combined([Part(scorer.config, scorer)])), heldout=()
    )
    metrics = metrics_of(config)[-1]
    assert metrics["scorer/longer/comparisons"] == 4 * Swiss().asked(4)  # prompts of an iteration
    assert metrics["scorer/reward_mean"] == pytest.approx(0.5)
    assert metrics["scorer/reward_std"] > 0.05 and roles.learners["policy"].steps > 0
