"""MCTS-DPO over a toy language with the real scheduler: answers are three digits, one per line,
and 1, 2, 3 is right.

Two lines end in a line end, the third in the end of the turn.
"""

import asyncio
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeScorer
from pydantic import ValidationError
from stored_groups import stored

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.mcts_dpo import MCTSDPO
from rayhf.algorithms.mcts_dpo_config import MCTSDPOConfig, OutcomeConfig
from rayhf.algorithms.mcts_samples import tree_from_group
from rayhf.algorithms.mcts_search import outcome_value, parse_verdict
from rayhf.errors import ConfigError
from rayhf.exploration.build import build_scheduler
from rayhf.types import (
    Completion,
    Failed,
    Invalid,
    Prompt,
    Sampling,
    Scored,
    float_array,
    token_array,
)

NEWLINE, END = 5, 6
PLAIN = Sampling(max_tokens=20)
TURN = SelectionContext(iteration=1, seed=3, sampling=Sampling(max_tokens=8))


def text_of(tokens):
    return "".join("\n" if t == NEWLINE else str(t - 10) if t >= 10 else "" for t in tokens)


class ToyRollout:
    """Writes a digit, a line end, ..., and its end of turn after `length` digits. What starts with
    900 asks the critic."""

    def __init__(self, digits=(1, 2, 3), length=3, late=False, says="Yes."):
        self.digits, self.length, self.late, self.says, self.requests = (
            digits,
            length,
            late,
            says,
            [],
        )

    async def generate(self, requests, *, version):
        self.requests += requests
        if self.late:
            await asyncio.sleep(random.random() / 300)
        return [tuple(self.write(r, i, seed) for i, seed in enumerate(r.seeds)) for r in requests]

    def write(self, request, index, seed):
        rng, context, tokens, reason = random.Random(seed), list(request.token_ids), [], None
        while reason is None:
            tokens.append(self._next(context + tokens, rng))
            if tokens[-1] == END or any(stop in text_of(tokens) for stop in request.sampling.stop):
                reason = "stop"
            elif len(tokens) == request.sampling.max_tokens:
                reason = "length"
        critic = context[0] == 900
        return Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=seed,
            text=self.says if critic else text_of(tokens),
            token_ids=token_array(tokens),
            logprobs=float_array(-0.1 * (1 + t % 7) for t in tokens),
            finish_reason=reason,
            policy_version=0,
        )

    def _next(self, written, rng):
        if sum(t >= 10 for t in written if t < 900) == self.length:
            return END
        return NEWLINE if 10 <= written[-1] < 900 else 10 + rng.choice(self.digits)


class ToyScorer(FakeScorer):
    def __init__(self, judge=lambda c: Scored(value=float(c.text.split("\n") == ["1", "2", "3"]))):
        self.judge, self.seen = judge, []

    async def score(self, requests):
        self.seen += [c for r in requests for c in r.completions]
        return [tuple(self.judge(c) for c in r.completions) for r in requests]


class ToyChat:
    max_length = 100

    def __init__(self):
        self.rendered = []

    def render(self, messages):
        self.rendered.append(messages[0]["content"])
        return (900, 1)

    def text(self, token_ids):
        return text_of(token_ids)

    def encode_generated(self, messages, text):
        return (*(NEWLINE if c == "\n" else 10 + int(c) for c in text), END)


def prompts(n=1, answer="123"):
    return [
        Prompt(
            prompt_id=f"p{i}",
            messages=({"role": "user", "content": f"q{i}"},),
            token_ids=(1, 2 + i % 2),
            reference_answer=answer,
        )
        for i in range(n)
    ]


def config_of(**more):
    base = {"iterations": 12, "depth": 3, "width": (6, 5), "step_tokens": 8, "expansion": "leaf"}
    return MCTSDPOConfig(**{**base, **more})


def explore(config, **settings):
    """The groups of n prompts."""
    return explored(config, **settings)[0]


def explored(
    config,
    *,
    rollout=None,
    scorer=None,
    chat=None,
    n=1,
    sampling=PLAIN,
    deterministic=True,
    answer="123",
):
    """The groups of n prompts, and the scheduler over which they were explored."""
    algorithm = MCTSDPO(config)

    async def go():
        scheduler = build_scheduler(
            {"policy": rollout or ToyRollout()},
            scorer or ToyScorer(),
            chat=chat or ToyChat(),
            versions={"policy": 0},
            deterministic=deterministic,
        )
        found = await scheduler.run(
            prompts(n, answer),
            algorithm.explore,
            sampling=sampling,
            seed=5,
            done=lambda group: None,
        )
        return found, scheduler

    return asyncio.run(go())


def test_search_finds_the_right_answer():
    groups = explore(config_of(iterations=30, width=(12,)), n=8)
    assert {g.metrics["mcts/solved"] for g in groups} == {1.0}
    # A sampled answer is right one time in 27.
    assert np.mean([g.metrics["mcts/path_correct"] for g in groups]) > 0.8
    path = [s for s in groups[0].samples if s.stats.get("chosen")]
    assert [s.completion.text for s in path] == ["1\n", "2\n", "3"]


@pytest.mark.parametrize("rollouts", [1, 3])
def test_samples_contain_the_tree(rollouts):
    rollout, scorer = ToyRollout(), ToyScorer()
    (group,) = explore(
        config_of(rollouts=rollouts),
        rollout=rollout,
        scorer=scorer,
        sampling=Sampling(max_tokens=9),
    )
    steps = [s for s in group.samples if s.kind == "step"]
    ends = [s for s in group.samples if s.kind == "rollout"]
    assert group.samples == (*steps, *ends) and len(steps) == group.metrics["mcts/nodes"]
    for sample in group.samples:
        above = () if sample.parent is None else group.samples[sample.parent]
        expected = (1, 2) if above == () else (*above.context_ids, *above.completion.token_ids)
        assert tuple(sample.context_ids) == expected
    for sample in steps:
        assert (
            (sample.outcome is not None)
            == bool(sample.stats["terminal"])
            == (END in sample.completion.token_ids)
        )
        assert sample.stats["answered"] == sample.stats["terminal"]
    assert (
        all(isinstance(s.outcome, Scored) for s in ends)
        and len(ends) == group.metrics["mcts/rollouts"]
    )
    # The scorer saw whole answers only, and each exactly once.
    assert len(scorer.seen) == len(ends) + sum(s.outcome is not None for s in steps)
    assert all(
        c.text.count("\n") == 2 and len(c.token_ids) == len(c.logprobs) == 6 for c in scorer.seen
    )
    # Every unfinished step is valued by as many completions as it needs, none longer than the rest
    # of an answer.
    valued = Counter(s.parent for s in ends)
    assert all(s.stats["terminal"] or valued[i] >= rollouts for i, s in enumerate(steps))
    assert {r.sampling.max_tokens + len(r.token_ids) - 2 for r in rollout.requests} == {9}


def test_step_is_generated_together_with_its_first_completion():
    rollout = ToyRollout()
    (group,) = explore(config_of(iterations=1, width=(30,), reroot="never"), rollout=rollout)
    (request,) = rollout.requests
    wholes = [rollout.write(request, i, seed) for i, seed in enumerate(request.seeds)]
    assert group.metrics["mcts/nodes"] == 3 and group.metrics["mcts/rollouts"] == 30
    for at, step in enumerate(group.samples[:3]):
        mine = [w for w in wholes if w.text.startswith(step.completion.text)]
        ends = [s.completion for s in group.samples if s.kind == "rollout" and s.parent == at]
        for name in ("token_ids", "logprobs"):
            begun = getattr(step.completion, name).tolist()
            assert [begun + getattr(e, name).tolist() for e in ends] == [
                getattr(w, name).tolist() for w in mine
            ]
        assert [step.completion.text + e.text for e in ends] == [w.text for w in mine]
        assert (step.completion.text[-1], step.completion.finish_reason, ends[0].finish_reason) == (
            "\n",
            "stop",
            "stop",
        )
        right = np.mean([1.0 if w.text == "1\n2\n3" else -1.0 for w in mine])
        assert step.stats["estimate"] == pytest.approx(right)


def test_without_completions_a_step_ends_by_itself():
    rollout = ToyRollout()
    (group,) = explore(config_of(rollouts=0), rollout=rollout, sampling=Sampling(max_tokens=9))
    assert group.metrics["mcts/rollouts"] == 0 and {s.kind for s in group.samples} == {"step"}
    assert all(
        r.sampling.stop == ("\n",) and r.sampling.max_tokens == min(8, 11 - len(r.token_ids))
        for r in rollout.requests
    )


def test_split_character_is_dropped_and_nothing_is_repeated():
    class Bytes(ToyChat):
        def text(self, token_ids):
            return bytes(token_ids).decode(errors="replace")

    class Writes:
        async def generate(self, requests, *, version):
            tokens = tuple("aé\nb".encode())
            whole = Completion(
                prompt_id="p0",
                index=0,
                seed=0,
                text="aé\nb",
                token_ids=token_array(tokens),
                logprobs=float_array((-1.0,) * 5),
                finish_reason="stop",
                policy_version=0,
            )
            return [(whole,) * len(r.seeds) for r in requests]

    config = config_of(iterations=1, width=(1,), step_tokens=2, reroot="never")
    (group,) = explore(config, rollout=Writes(), chat=Bytes())
    assert [s.completion.text for s in group.samples] == ["a\ufffd", "\ufffd\nb"]
    assert [s.completion.finish_reason for s in group.samples] == ["length", "stop"]


@pytest.mark.parametrize("rollouts", [0, 2])
def test_scorer_and_critic_read_the_text_of_all_tokens(rollouts):
    def decode(tokens):  # as SentencePiece: the first token's leading space is stripped
        return "".join(f" {token}" for token in tokens).removeprefix(" ")

    class Spaces(ToyChat):
        def text(self, token_ids):
            return decode(token_ids)

    class Writes:
        async def generate(self, requests, *, version):
            return [tuple(self.write(r) for _ in r.seeds) for r in requests]

        def write(self, request):
            written = len(request.token_ids) - 2
            tokens = (12, 34, 56)[written:][: request.sampling.max_tokens]
            if request.token_ids[0] == 900:
                tokens = (77,)
            return Completion(
                prompt_id="p0",
                index=0,
                seed=0,
                text="yes" if request.token_ids[0] == 900 else decode(tokens),
                token_ids=token_array(tokens),
                logprobs=float_array((-1.0,) * len(tokens)),
                finish_reason="stop" if tokens[-1] in (56, 77) else "length",
                policy_version=0,
            )

    chat, scorer = Spaces(), ToyScorer(lambda c: Scored(value=1.0))
    config = config_of(
        iterations=4,
        width=(1,),
        step_tokens=1,
        reroot="never",
        rollouts=rollouts,
        self_evaluation={"template": "{{ question }}|{{ work }}", "votes": 1},
    )
    explore(config, rollout=Writes(), chat=chat, scorer=scorer)
    assert {c.text for c in scorer.seen} == {"12 34 56"}
    assert chat.rendered == ["q0|12", "q0|12 34", "q0|12 34 56"]


@pytest.mark.parametrize("parallel", [1, 3])
def test_equal_seeds_give_equal_trees_in_any_arrival_order(parallel):
    config = config_of(parallel=parallel, rollouts=2, self_evaluation={"votes": 2})
    waves = explore(config, n=3)
    for _ in range(2):
        assert explore(config, n=3, rollout=ToyRollout(late=True), deterministic=False) == waves


@pytest.mark.parametrize("pairs", ["worst", "random", "all"])
@pytest.mark.parametrize("levels", ["path", "all"])
def test_stored_tree_gives_the_same_pairs(pairs, levels):
    def unclear(completion):
        right = completion.text.split("\n")[:2] == ["1", "2"]
        return Invalid(reason="?") if completion.text[0] == "4" else Scored(value=float(right))

    config = config_of(pairs=pairs, levels=levels)
    groups = explore(config, n=4, scorer=ToyScorer(unclear))
    algorithm = MCTSDPO(config)
    first, again = (algorithm.select(gs, TURN) for gs in (groups, [stored(g) for g in groups]))
    assert first.metrics == again.metrics and first.metrics["pairs/kept"] > 3
    for a, b in zip(first.examples, again.examples, strict=True):
        assert a.scalars == b.scalars
        for x, y in zip(a.rows, b.rows, strict=True):
            assert x.prompt_ids.tolist() == y.prompt_ids.tolist() and x.sample == y.sample
            assert x.response_ids.tolist() == y.response_ids.tolist()
            assert x.tokens["behavior_logp"].tolist() == y.tokens["behavior_logp"].tolist()
    trees = [(tree_from_group(g), tree_from_group(stored(g))) for g in groups]
    for a, b in trees:
        assert [(n.id, n.parent, n.visits, n.q, n.value, n.children) for n in a.nodes] == [
            (n.id, n.parent, n.visits, n.q, n.value, n.children) for n in b.nodes
        ]


def test_pairs_are_siblings_and_loss_covers_the_difference():
    config = config_of(iterations=30, pairs="all", max_pairs=50)
    (group,) = explore(config)
    selection = MCTSDPO(config).select([group], TURN)
    assert selection.examples and selection.metrics["mcts/label_smoothing"] > 0
    for example in selection.examples:
        better, worse = (group.samples[row.sample] for row in example.rows)
        assert (
            better.parent == worse.parent
            and better.stats["q"] - worse.stats["q"] == example.scalars["margin"] > 0
        )
        assert min(better.stats["visits"], worse.stats["visits"]) >= 1
        ratio = better.stats["visits"] / worse.stats["visits"]
        assert example.scalars["label_smoothing"] == pytest.approx(min(0.5, 1 / (ratio + 1)))
        for row, sample in zip(example.rows, (better, worse), strict=True):
            assert [*row.prompt_ids, *row.response_ids] == [
                *sample.context_ids,
                *sample.completion.token_ids,
            ]
            assert len(row.tokens["behavior_logp"]) == len(row.response_ids)
        assert example.rows[0].response_ids[0] != example.rows[1].response_ids[0]


def test_tree_without_answers_is_counted_and_not_trained_on():
    rollout = ToyRollout(length=99)
    scorer = ToyScorer(lambda c: Scored(value=float(c.finish_reason == "stop")))
    groups = explore(
        config_of(max_steps=16, reroot="step"),
        rollout=rollout,
        scorer=scorer,
        sampling=Sampling(max_tokens=8),
    )
    metrics = groups[0].metrics
    assert (
        metrics["mcts/no_answer"] == 1.0
        and metrics["mcts/solved"] == 0.0
        and metrics["mcts/path_correct"] == 0.0
    )
    last = [s for s in groups[0].samples if s.stats.get("chosen")][-1]
    assert (
        last.stats["terminal"] == 1.0
        and last.stats["answered"] == 0.0
        and isinstance(last.outcome, Scored)
    )
    assert max(len(c.token_ids) for c in scorer.seen) == 8 and {
        c.finish_reason for c in scorer.seen
    } == {"length"}
    selection = MCTSDPO(config_of()).select(groups, TURN)
    assert (
        selection.examples == ()
        and selection.metrics["pairs/ties"] > 0
        and "pairs/margin_mean" not in selection.metrics
    )


def test_model_length_ends_an_answer():
    chat = ToyChat()
    chat.max_length = 6
    (group,) = explore(config_of(step_tokens=3), chat=chat, rollout=ToyRollout(length=99))
    assert max(len(s.context_ids) + len(s.completion.token_ids) for s in group.samples) == 6
    assert group.metrics["mcts/no_answer"] == 1.0


def test_long_steps_are_split():
    (group,) = explore(config_of(step_tokens=1, depth=6, iterations=20))
    assert group.metrics["mcts/cut_steps"] > 0 and {
        len(s.completion.token_ids) for s in group.samples if s.kind == "step"
    } == {1}
    path = [s.completion.text for s in group.samples if s.stats.get("chosen")]
    assert len(path) == 6 and path[1] == path[3] == "\n" and path[5] == ""


@pytest.mark.parametrize("outcome", [Invalid(reason="nan"), Failed(reason="late")])
def test_unscored_answers_are_not_wrong_answers(outcome):
    def half(completion):
        return (
            outcome
            if completion.text.startswith("2")
            else Scored(value=float(completion.text[0] == "1"))
        )

    (group,) = explore(config_of(reroot="never"), scorer=ToyScorer(half))
    first = {s.completion.text: s for s in group.samples if s.kind == "step" and s.parent is None}
    assert (
        "estimate" not in first["2\n"].stats
        and first["2\n"].stats["visits"] == 0
        and first["1\n"].stats["q"] == 1.0
    )
    assert group.metrics["mcts/unscored"] > 0
    (group,) = explore(config_of(), scorer=ToyScorer(lambda c: outcome))
    assert group.metrics["mcts/nodes"] == len([s for s in group.samples if s.kind == "step"]) <= 3
    assert MCTSDPO(config_of()).select([group], TURN).examples == ()


def test_all_ties_train_nothing():
    groups = explore(config_of(), n=2, scorer=ToyScorer(lambda c: Scored(value=1.0)))
    for rule in ("worst", "random", "all"):
        selection = MCTSDPO(config_of(pairs=rule)).select(groups, TURN)
        assert selection.examples == () and selection.metrics["pairs/ties"] > 0


def test_duplicates_are_counted():
    (group,), scheduler = explored(config_of(iterations=1, width=(30,), reroot="never"))
    assert group.metrics["mcts/duplicates"] == 27 and group.metrics["mcts/nodes"] == 3
    assert scheduler.generated_tokens == 30 * 6
    assert scheduler.prompt_tokens == 30 * len(group.prompt.token_ids)


def test_self_evaluation_adds_the_share_of_yes():
    def nodes(says, **more):
        chat = ToyChat()
        config = config_of(
            iterations=1,
            rollouts=0,
            reroot="never",
            self_evaluation={"votes": 3, "weight": 0.5, **more},
        )
        (group,) = explore(config, chat=chat, rollout=ToyRollout(says=says))
        return group, chat.rendered

    group, questions = nodes("Yes, it is")
    assert {s.stats["estimate"] for s in group.samples} == {0.5} and group.metrics[
        "mcts/rollouts"
    ] == 0
    assert (
        all("Question: q0" in text and "123" not in text for text in questions)
        and len(questions) == group.metrics["mcts/nodes"]
    )
    assert {s.stats["estimate"] for s in nodes(" no")[0].samples} == {0.0}
    group, _ = nodes("42")
    assert all("estimate" not in s.stats for s in group.samples)
    assert (
        group.metrics["mcts/mute_votes"] == 3 * group.metrics["mcts/nodes"]
        and group.metrics["mcts/unscored"] > 0
    )
    template = "{{ question }} {{ work }} {{ answer }}"
    _, questions = nodes("yes", template=template, gold_conditioned_critic=True)
    assert all(text.endswith(" 123") for text in questions)
    with pytest.raises(ValidationError, match="leak"):
        nodes("yes", template=template)
    with pytest.raises(ValidationError, match="line 1"):
        nodes("yes", template="{{ work")
    with pytest.raises(ConfigError, match="p0 has no reference answer"):
        explore(
            config_of(self_evaluation={"template": template, "gold_conditioned_critic": True}),
            answer=None,
        )


def test_verdicts():
    assert parse_verdict("Yes") is True and parse_verdict(' "no"') is False
    assert [parse_verdict(text) for text in ("yesterday", "", "maybe yes", "1")] == [None] * 4


def test_gold_steps_are_added_only_if_configured():
    config = config_of(iterations=20, width=(4,), inject_gold=True)
    (group,) = explore(config, rollout=ToyRollout(digits=(7, 8)), answer="1\n2\n3")
    gold = [s for s in group.samples if s.stats.get("gold")]
    assert [s.completion.text for s in gold] == ["1\n", "2\n", "3"] and group.metrics[
        "mcts/gold_steps"
    ] == 3
    assert (
        tuple(gold[-1].completion.token_ids) == (13, END)
        and gold[-1].stats["answered"]
        and gold[0].stats["prior"] == 1.0
    )
    assert tuple(gold[1].context_ids) == (1, 2, 11, NEWLINE)
    examples = MCTSDPO(config).select([group], TURN).examples
    rows = [row for e in examples for row in e.rows if group.samples[row.sample].stats["gold"]]
    assert rows and all(np.isnan(row.tokens["behavior_logp"]).all() for row in rows)
    for answer, inject in (("123", True), (None, True), ("1\n2\n3", False)):
        (group,) = explore(config_of(inject_gold=inject), answer=answer)
        assert group.metrics["mcts/gold_steps"] == 0


def test_outcomes():
    plain, graded = OutcomeConfig(), OutcomeConfig(threshold=None)
    assert [outcome_value(Scored(value=v), plain) for v in (1.0, 0.5, 0.49, -3.0)] == [
        1.0,
        1.0,
        -1.0,
        -1.0,
    ]
    assert outcome_value(Scored(value=0.3), graded) == 0.3
    assert (
        outcome_value(Invalid(reason=""), plain) is None
        and outcome_value(Failed(reason=""), graded) is None
        and outcome_value(None, plain) is None
    )


# --- the algorithm ------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    """K 5, depth 4, breadth 4 then 2, c 1, gamma 1, prior exponent 1.25, outcome
    +-1, beta 0.1, 8 pairs."""
    config = MCTSDPOConfig()
    expected = {
        "iterations": 5,
        "expansion": "path",
        "depth": 4,
        "width": (4, 2),
        "exploration": 1.0,
        "gamma": 1.0,
        "length_exponent": 1.25,
        "max_pairs": 8,
        "step_tokens": 128,
        "step_stop": ("\n",),
        "reroot": "step",
        "pairs": "worst",
        "labels": "soft",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.loss.type, config.loss.beta) == ("sigmoid", 0.1)
    assert (config.outcome.correct, config.outcome.wrong) == (1.0, -1.0)
    assert config.reference.type == "initial"
    assert not config.inject_gold and config.self_evaluation is None


def test_hard_labels_and_other_losses():
    config = config_of(labels="hard", loss="ipo")
    selection = MCTSDPO(config).select(explore(config), TURN)
    assert selection.examples and all(set(e.scalars) == {"margin"} for e in selection.examples)
    with pytest.raises(
        ValidationError,
        match="labels: soft needs a loss that accepts them, for example sigmoid, got ipo",
    ):
        MCTSDPO(config_of(loss="ipo"))
    with pytest.raises(ValidationError, match="wrong: 0 must be below correct"):
        MCTSDPO(config_of(outcome={"correct": 0.0, "wrong": 0.0}))


def test_samples_out_of_order_are_refused():
    (group,) = explore(config_of())
    with pytest.raises(ValueError, match="out of order"):
        tree_from_group(replace(group, samples=group.samples[::-1]))


def test_no_groups():
    selection = MCTSDPO(config_of()).select([], TURN)
    assert selection.examples == () and all(math.isfinite(v) for v in selection.metrics.values())
