"""Tree search over turns: branches are replayed, rows have no reply, the stored tree suffices."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fake_environments import FakeEnvironments, TurnChat, rounds
from fakes import FakeRollout, FakeScorer, make_prompts
from stored_groups import stored

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.mcts_dpo import MCTSDPO
from rayhf.algorithms.mcts_dpo_config import MCTSDPOConfig
from rayhf.algorithms.tpo import TPO, TPOConfig
from rayhf.environments.scorer import EpisodeScorer
from rayhf.episodes import StepResult
from rayhf.exploration.build import build_scheduler
from rayhf.exploration.episode_metrics import episode_metrics
from rayhf.run_dir.tables import sample_table
from rayhf.scorer.none import NoScorer
from rayhf.tiny.second_try import SecondTryConfig
from rayhf.types import Failed, Invalid, Sampling, Scored, float_array, token_array

SELECTION = SelectionContext(iteration=1, seed=3, sampling=Sampling(max_tokens=100))
TREE = {"iterations": 8, "depth": 3, "width": (4, 3), "outcome": {"threshold": None}}
EVERY_PAIR = {"levels": "all", "pairs": "all", "min_visits": 0, "labels": "hard", "max_pairs": 99}
UNREPEATED = "environment second_try: it does not repeat itself"


class Words(FakeRollout):
    """Turns of one to three tokens, few of them different; keeps its requests."""

    def __init__(self, words=5, delay=0.0):
        super().__init__(delay)
        self.words = words
        self.requests = []

    async def generate(self, requests, *, version):
        self.requests += requests
        return await super().generate(requests, version=version)

    def _complete(self, request, index, seed):
        word = random.Random(seed).randrange(self.words)
        whole = [2 + word] * (1 + word % 3)
        tokens = whole[: request.sampling.max_tokens]
        return replace(
            super()._complete(request, index, seed),
            text=f"w{word}",
            token_ids=token_array(tokens),
            logprobs=float_array([-0.5] * len(tokens)),
            finish_reason="stop" if tokens == whole else "length",
        )


def told(turn, text):
    """Three turns; the reward is that of the word."""
    message = {"role": "user", "content": f"after {text}"}
    return StepResult(messages=(message,), reward=int(text[1:]) % 5 / 4, done=turn == 3)


def explore(
    environments,
    *,
    algorithm=None,
    rollout=None,
    deterministic=True,
    prompts=2,
    max_tokens=100,
    scorer=None,
    **settings,
):
    """Explore prompts by trees of turns; return the groups."""
    algorithm = algorithm or MCTSDPO(MCTSDPOConfig(**TREE, **EVERY_PAIR))
    config = SecondTryConfig(**settings)

    async def go():
        scheduler = build_scheduler(
            {"policy": rollout or Words()},
            EpisodeScorer(scorer or NoScorer(), [config], is_pairwise=False),
            chat=TurnChat(),
            versions={"policy": 0},
            deterministic=deterministic,
            environments=environments,
            environment_configs=(config,),
        )
        return await scheduler.run(
            make_prompts(prompts),
            algorithm.explore,
            sampling=Sampling(max_tokens=max_tokens),
            seed=1,
            done=lambda group: None,
        )

    return asyncio.run(asyncio.wait_for(go(), 30))


def path_of(group, index):
    """Return the samples from the root to a sample."""
    path = []
    while index is not None:
        path.insert(0, group.samples[index])
        index = group.samples[index].parent
    return path


def test_a_step_is_a_turn_and_its_context_is_what_the_engine_read():
    rollout = Words()
    environments = FakeEnvironments(told)
    groups = explore(environments, rollout=rollout)
    read = {(r.prompt_id, r.token_ids) for r in rollout.requests}
    replies = set()
    for group in groups:
        assert {s.stats["depth"] for s in group.samples if s.kind == "step"} == {1, 2, 3}
        for index, sample in enumerate(group.samples):
            context = tuple(group.context_ids(index).tolist())
            assert (group.prompt.prompt_id, context) in read
            before = (*group.prompt.token_ids,)
            if sample.parent is not None:
                parent = group.samples[sample.parent]
                own = parent.completion.token_ids.tolist()
                before = (*group.context_ids(sample.parent).tolist(), *own)
                replies.add((parent.completion.text, context[len(before) :]))
            assert context[: len(before)] == before
            whole = [part.completion.episode for part in path_of(group, index)]
            if sample.outcome is None:
                assert whole[-1].ended is None and "estimate" in sample.stats
            else:
                assert sample.outcome == Scored(value=sum(part.reward for part in whole))
                assert [part.ended for part in whole] == [None] * (len(whole) - 1) + ["done"]
    assert dict(replies).keys() == {f"w{word}" for word in range(5)} and len(replies) == 5
    # One seed of the environment per tree; each episode has its own object, and ends it.
    assert len(set(environments.seeds)) == 2 and len(environments.seeds) > 20
    metrics = episode_metrics(groups)
    assert metrics["environment/turns"] == 3 and metrics["environment/ended/done"] == 1
    scores = [s.outcome.value for g in groups for s in g.samples if s.outcome is not None]
    assert metrics["environment/reward_mean"] == pytest.approx(np.mean(scores))


def test_both_schedulers_grow_the_same_trees():
    waves = explore(FakeEnvironments(told), rollout=Words(delay=0.002))
    eager = explore(FakeEnvironments(told), rollout=Words(delay=0.002), deterministic=False)
    assert waves == eager


def test_first_messages_replace_the_prompt():
    def first(request):
        return StepResult(messages=({"role": "user", "content": str(request.seed % 7)},))

    rollout = Words()
    groups = explore(FakeEnvironments(told, first=first), rollout=rollout)
    read = {r.token_ids for r in rollout.requests}
    selection = MCTSDPO(MCTSDPOConfig(**TREE, **EVERY_PAIR)).select(groups, SELECTION)
    for group in groups:
        assert {tuple(group.context_ids(i).tolist()) for i in range(len(group.samples))} <= read
    rows = [row for example in selection.examples for row in example.rows]
    prompts = {group.prompt.token_ids for group in groups}
    assert rows and not {tuple(row.prompt_ids.tolist()[:2]) for row in rows} & prompts


def test_pairs_train_on_the_turn_alone():
    groups = explore(FakeEnvironments(told))
    by_prompt = {group.prompt.prompt_id: group for group in groups}
    selection = MCTSDPO(MCTSDPOConfig(**TREE, **EVERY_PAIR)).select(groups, SELECTION)
    depths = set()
    for example in selection.examples:
        for row in example.rows:
            group = by_prompt[row.prompt_id]
            sample = group.samples[row.sample]
            depths.add(sample.stats["depth"])
            whole = [*group.context_ids(row.sample), *sample.completion.token_ids]
            assert [*row.prompt_ids, *row.response_ids] == whole
            assert 0 < len(row.response_ids) <= len(sample.completion.token_ids)
            assert row.inserted is None
    assert depths == {1.0, 2.0, 3.0}


def test_lists_train_on_branches_without_the_replies():
    rollout = Words()
    algorithm = TPO(TPOConfig(**TREE))
    groups = explore(FakeEnvironments(told), rollout=rollout, algorithm=algorithm)
    read = {r.token_ids for r in rollout.requests}
    selection = algorithm.select(groups, SELECTION)
    turns = set()
    by_prompt = {group.prompt.prompt_id: group for group in groups}
    for row in (row for example in selection.examples for row in example.rows):
        path = path_of(by_prompt[row.prompt_id], row.sample)
        own = [token for part in path for token in part.completion.token_ids.tolist()]
        assert row.response_ids.tolist() == own
        response = row.inserted.fill(row.response_ids) if row.inserted else row.response_ids
        assert (row.inserted is None) == (len(path) == 1)
        whole = (*row.prompt_ids.tolist(), *response.tolist())
        last = len(path[-1].completion.token_ids)
        assert whole[:-last] in read
        turns.add(len(path))
    assert max(turns) == 3
    again = algorithm.select([stored(group) for group in groups], SELECTION)
    assert again.examples == selection.examples


def test_the_stored_tree_gives_the_same_pairs():
    groups = explore(FakeEnvironments(told))
    algorithm = MCTSDPO(MCTSDPOConfig(**TREE, **EVERY_PAIR))
    first = algorithm.select(groups, SELECTION)
    again = algorithm.select([stored(group) for group in groups], SELECTION)
    assert len(first.examples) > 10 and again == first
    rows = sample_table(1, groups).to_pylist()
    texts = {
        row["text"]: [turn["content"] for turn in row["turns"]]
        for row in rows
        if row["kind"] == "step" and row["ended"] is None
    }
    assert all(turns == [text, f"after {text}"] for text, turns in texts.items()) and texts


def changing(kind):
    """Return an environment that does not repeat itself."""
    calls = count()

    def answer(turn, text):
        result = told(turn, text)
        if kind == "reply" and turn == 1:
            return replace(result, messages=({"role": "user", "content": str(next(calls))},))
        if kind == "reward" and turn == 1:
            return replace(result, reward=float(next(calls)))
        if kind == "last" and turn == 3:
            return replace(result, reward=float(next(calls)))
        if kind == "done" and turn == 1:
            return replace(result, done=next(calls) % 4 == 3)
        return result

    def first(request):
        messages = ({"role": "user", "content": str(next(calls))},)
        return StepResult(messages=messages if kind == "first" else ())

    return FakeEnvironments(answer, first=first)


@pytest.mark.parametrize("kind", ["reply", "reward", "last", "done", "first"])
@pytest.mark.parametrize("words", [1, 1000])
def test_an_environment_that_does_not_repeat_itself_is_named(kind, words):
    if kind == "last" and words > 1:
        return  # No message is given twice.
    environments = changing(kind)
    groups = explore(environments, rollout=Words(words), prompts=1)
    (group,) = groups
    reasons = [s.outcome.reason for s in group.samples if isinstance(s.outcome, Invalid)]
    assert reasons and all(reason.startswith(UNREPEATED) for reason in reasons)
    for sample in group.samples:
        if isinstance(sample.outcome, Invalid):
            assert sample.completion.episode.ended == "failed"
            assert "estimate" not in sample.stats
    refused = {i for i, s in enumerate(group.samples) if isinstance(s.outcome, Invalid)}
    assert kind != "first" or len(refused) == len(group.samples)
    selection = MCTSDPO(MCTSDPOConfig(**TREE, **EVERY_PAIR)).select(groups, SELECTION)
    assert not {row.sample for e in selection.examples for row in e.rows} & refused


def test_an_environment_that_fails_gives_its_reason():
    lost = Failed(reason="environment x: its process exited")
    groups = explore(FakeEnvironments(told, first=lambda request: lost))
    assert [s.outcome for group in groups for s in group.samples] == [lost] * 2

    def answer(turn, text):
        return Invalid(reason="environment x: no") if text == "w1" else told(turn, text)

    (group,) = explore(FakeEnvironments(answer), prompts=1)
    for index, sample in enumerate(group.samples):
        failed = "w1" in [part.completion.text for part in path_of(group, index)]
        assert not failed or sample.outcome == Invalid(reason="environment x: no")
    assert any(isinstance(s.outcome, Scored) for s in group.samples)
    assert episode_metrics([group])["environment/ended/failed"] > 0
    sample_table(1, [group])


def test_a_lost_episode_keeps_its_reason_where_others_are_refused():
    lost = Failed(reason="environment x: its process exited")
    calls = count()

    def first(request):
        number = next(calls)
        return (
            lost
            if number == 0
            else StepResult(messages=({"role": "user", "content": "ab"[number % 2]},))
        )

    (group,) = explore(FakeEnvironments(told, first=first), prompts=1)
    outcomes = [sample.outcome for sample in group.samples]
    assert lost in outcomes
    assert any(isinstance(o, Invalid) and o.reason.startswith(UNREPEATED) for o in outcomes)


@pytest.mark.parametrize(
    ("settings", "max_tokens", "ended", "depth", "answered"),
    [
        ({"max_turns": 2}, 100, "turns", 2, 1.0),
        ({}, 4, "tokens", None, 0.0),
        ({"reply_tokens": 20}, 100, "reply_tokens", 2, 0.0),
    ],
)
def test_limits_are_those_of_episodes(settings, max_tokens, ended, depth, answered):
    groups = explore(rounds(9), max_tokens=max_tokens, **settings)
    for group in groups:
        ends = [s for s in group.samples if s.stats.get("terminal")]
        assert ends and {s.completion.episode.ended for s in ends} == {ended}
        assert {s.stats["answered"] for s in ends} == {answered}
        lengths = {s.completion.finish_reason == "length" for s in ends}
        assert lengths == {not answered}
        assert depth is None or {s.stats["depth"] for s in ends} == {depth}
        for index in range(len(group.samples)):
            path = path_of(group, index)
            assert sum(len(part.completion.token_ids) for part in path) <= max_tokens


def test_prompts_without_an_environment_have_trees_of_text():
    groups = explore(FakeEnvironments(told), scorer=FakeScorer(), sources=("other",))
    assert {s.completion.episode for group in groups for s in group.samples} == {None}


def test_equal_turns_share_their_rollouts():
    (group,) = explore(
        FakeEnvironments(told),
        prompts=1,
        rollout=Words(2),
        algorithm=MCTSDPO(MCTSDPOConfig(**{**TREE, "width": (9,)}, **EVERY_PAIR)),
    )
    first = {i: s.completion.text for i, s in enumerate(group.samples) if s.parent is None}
    rollouts = Counter(s.parent for s in group.samples if s.kind == "rollout")
    assert sorted(first.values()) == ["w0", "w1"] and sum(rollouts[i] for i in first) == 9


def test_resume_within_a_tree_equals_the_uninterrupted_run(tmp_path):
    """The journal has the turns that were generated; the environment plays them again."""

    class Killed(Words):
        def __init__(self, at=None):
            super().__init__()
            self.at = at

        async def generate(self, requests, *, version):
            if len(self.calls) == self.at:
                raise RuntimeError("killed")
            return await super().generate(requests, version=version)

    def play(directory, at=None):
        config = make_config(
            directory,
            algorithm={"type": "mcts_dpo", **TREE, **EVERY_PAIR},
            environment={"type": "second_try"},
        )
        scorer = EpisodeScorer(FakeScorer(), config.environment, is_pairwise=False)
        rollout = Killed(at)
        run_campaign(
            config,
            scorer=scorer,
            rollout=rollout,
            environments=FakeEnvironments(told),
            chat=TurnChat(),
        )
        return config, rollout

    whole, rollout = play(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        play(tmp_path / "broken", at=10)
    broken, again = play(tmp_path / "broken")
    assert metrics_of(broken) == metrics_of(whole)
    for i in range(1, 5):
        name = f"samples/iteration-{i:06d}.parquet"
        assert pq.read_table(whole.run.dir / name).equals(pq.read_table(broken.run.dir / name))
    # Evaluations, 6 calls, are repeated; of the first tree's turns, 4 calls are not.
    assert again.calls == [*rollout.calls[:6], *rollout.calls[10:]]
