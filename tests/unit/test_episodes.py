"""Episodes: turns of policy and environment as one completion, its limits, errors and resume."""

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fake_environments import FakeEnvironments, TurnChat, rounds
from fakes import FakeLearner, FakeRollout, FakeScorer, make_prompts

from rayhf.algorithms.base import sample_and_score
from rayhf.control.labels import labeled_examples
from rayhf.environments.scorer import EpisodeScorer
from rayhf.episodes import StepResult
from rayhf.exploration.build import build_scheduler
from rayhf.run_dir.tables import example_table, read_examples, sample_table
from rayhf.scorer.none import NoScorer
from rayhf.scorer.rule_arguments import Parameters
from rayhf.tiny.second_try import SecondTryConfig
from rayhf.types import (
    Compared,
    Example,
    Failed,
    Group,
    Invalid,
    Sampling,
    Scored,
    ScoreRequest,
    make_row,
)


class Recording(FakeRollout):
    """Keeps its requests; its completions end with `last`."""

    def __init__(self, last=None, delay=0.0):
        super().__init__(delay)
        self.requests = []
        self.last = last

    def _complete(self, request, index, seed):
        if index == 0:
            self.requests.append(request)
        completion = super()._complete(request, index, seed)
        if self.last is None:
            return completion
        ids = np.append(completion.token_ids[:2], self.last).astype(np.int32)
        return replace(completion, token_ids=ids)


def explore(
    environments,
    *,
    deterministic=True,
    rollout=None,
    scorer=None,
    prompts=2,
    samples=3,
    chat=None,
    max_tokens=100,
    **settings,
):
    """Explore prompts by episodes; return the groups."""
    config = SecondTryConfig(**settings)

    async def go():
        scheduler = build_scheduler(
            {"policy": rollout or FakeRollout()},
            EpisodeScorer(scorer or NoScorer(), [config], is_pairwise=False),
            chat=chat or TurnChat(),
            versions={"policy": 0},
            deterministic=deterministic,
            environments=environments,
            environment_configs=(config,) if environments else (),
        )
        groups = await scheduler.run(
            make_prompts(prompts),
            lambda prompt, context: sample_and_score(prompt, context, samples),
            sampling=Sampling(max_tokens=max_tokens),
            seed=1,
            done=lambda group: None,
        )
        return groups, scheduler

    return asyncio.run(asyncio.wait_for(go(), 30))


def completions(groups):
    return [sample.completion for group in groups for sample in group.samples]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("last", [None, 1])
def test_an_episode_is_one_completion_of_what_the_engine_wrote(deterministic, last):
    rollout = Recording(last)
    groups, scheduler = explore(rounds(3), deterministic=deterministic, rollout=rollout)
    end = (1,) if last is None else ()  # the turn's end, where the policy did not write it
    for group in groups:
        for sample in group.samples:
            completion = sample.completion
            episode = completion.episode
            assert completion.text == episode.turns[-2].content and episode.ended == "done"
            assert [turn.role for turn in episode.turns] == ["assistant", "user"] * 3
            assert [turn.reward for turn in episode.turns] == [1, 0, 2, 0, 3, 0]
            assert sample.outcome == Scored(value=6.0)
            assert len(completion.token_ids) == len(completion.logprobs) == 9
            # The row is the sequence of which the engine read every beginning.
            row = make_row(group, 0, score=0.0)
            assert row.tokens["turn_reward"].tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 3]
            whole = [*group.prompt.token_ids, *row.inserted.fill(row.response_ids).tolist()]
            starts = {tuple(whole[:n]) for n in range(len(whole))}
            assert len(starts & {request.token_ids for request in rollout.requests}) == 3
            reply = scheduler.replies.render(
                [{"role": "user", "content": f"after {episode.turns[0].content}"}], turn=[last or 0]
            )
            assert reply[: len(end)] == end
            start = len(group.prompt.token_ids) + 3
            mine = [*group.prompt.token_ids, *episode.inserted.fill(completion.token_ids).tolist()]
            assert tuple(mine[start : start + len(reply)]) == reply
    assert scheduler.generated_tokens == 9 * 6


def test_both_schedulers_play_the_same_episodes():
    waves, _ = explore(rounds(3), deterministic=True, rollout=FakeRollout(delay=0.003))
    eager, _ = explore(rounds(3), deterministic=False, rollout=FakeRollout(delay=0.003))
    assert waves == eager


def test_one_turn_is_what_there_is_without_an_environment():
    rollout = Recording()
    played, _ = explore(rounds(1), rollout=rollout, scorer=FakeScorer())
    plain_rollout = Recording()
    plain, _ = explore(None, rollout=plain_rollout, scorer=FakeScorer())
    assert rollout.requests == plain_rollout.requests
    assert [replace(c, episode=None) for c in completions(played)] == completions(plain)
    for ours, theirs in zip(played, plain, strict=True):
        row = make_row(ours, 0, score=1.0)
        expected = make_row(theirs, 0, score=1.0)
        assert row.inserted is None and np.array_equal(row.fed_ids, expected.fed_ids)
        assert np.array_equal(row.predicted_at, expected.predicted_at)
        outcome = ours.samples[0].outcome
        assert outcome.value == theirs.samples[0].outcome.value + 1.0
        assert outcome.parts == {"environment": 1.0}


@pytest.mark.parametrize(
    ("settings", "max_tokens", "ended", "turns", "reason"),
    [
        ({"max_turns": 2}, 100, "turns", 2, "stop"),
        ({}, 6, "tokens", 2, "length"),
        ({"reply_tokens": 20}, 100, "reply_tokens", 2, "length"),
    ],
)
def test_limits_end_an_episode(settings, max_tokens, ended, turns, reason):
    environments = rounds(9)
    groups, _ = explore(environments, max_tokens=max_tokens, **settings)
    for completion in completions(groups):
        episode = completion.episode
        assert (episode.ended, completion.finish_reason) == (ended, reason)
        assert sum(turn.role == "assistant" for turn in episode.turns) == turns
        assert len(completion.token_ids) == 3 * turns
        assert len(set(episode.inserted.before.tolist())) == turns - 1
    assert len(environments.closed) == 6


def test_a_turn_that_is_cut_ends_the_episode():
    class Cut(FakeRollout):
        def _complete(self, request, index, seed):
            return replace(super()._complete(request, index, seed), finish_reason="length")

    groups, _ = explore(rounds(3), rollout=Cut())
    assert {c.episode.ended for c in completions(groups)} == {"tokens"}
    assert [s.outcome for g in groups for s in g.samples] == [Scored(value=0.0)] * 6


def test_an_environment_that_fails_gives_its_reason_and_no_score():
    def answer(turn, text):
        if turn == 2:
            return Invalid(reason="environment x: ValueError: no")
        return StepResult(messages=({"role": "user", "content": "go on"},), reward=5.0)

    groups, _ = explore(FakeEnvironments(answer), scorer=FakeScorer())
    for group in groups:
        for sample in group.samples:
            assert sample.outcome == Invalid(reason="environment x: ValueError: no")
            assert sample.completion.episode.ended == "failed"
    lost = Failed(reason="environment x: its process exited")
    groups, _ = explore(FakeEnvironments(answer, first=lambda request: lost))
    assert [len(c.token_ids) for c in completions(groups)] == [0] * 6
    assert {s.outcome for g in groups for s in g.samples} == {lost}
    sample_table(1, groups)


def test_first_messages_replace_the_prompt():
    def first(request):
        return StepResult(messages=({"role": "user", "content": str(request.seed % 7)},))

    environments = FakeEnvironments(rounds(2)._answer, first=first)
    rollout = Recording()
    groups, _ = explore(environments, rollout=rollout)
    assert len(set(environments.seeds)) == 6
    for group in groups:
        for index, sample in enumerate(group.samples):
            row = make_row(group, index, score=0.0)
            context = sample.completion.episode.context_ids
            assert row.prompt_ids is context
            assert tuple(context) in {request.token_ids for request in rollout.requests}


def test_rules_get_the_messages_of_an_episode():
    groups, _ = explore(rounds(2))
    completion = groups[0].samples[0].completion
    both = {"required": (), "takes_any": False, "is_async": False}
    ours = Parameters(style="rayhf", names=("completion", "episode"), **both)
    call = [(groups[0].prompt, (completion,))]
    given = ours.arguments(call, conversational=None)
    assert given["completion"] == given["episode"][2]["content"] == completion.text
    assert [m["reward"] for m in given["episode"]] == [1.0, 0.0, 2.0, 0.0]
    trl = Parameters(style="trl", names=("completions",), **both)
    ((*messages,),) = trl.arguments(call, conversational=True)["completions"]
    assert messages == [{k: m[k] for k in ("role", "content")} for m in given["episode"]]


def test_comparison_is_that_of_rewards():
    groups, _ = explore(rounds(2))
    scorer = EpisodeScorer(NoScorer(), [SecondTryConfig()], is_pairwise=False)
    own = [s.completion for s in groups[0].samples]
    better = replace(own[0], episode=replace(own[0].episode, turns=()))
    request = ScoreRequest(prompt=groups[0].prompt, completions=(better, own[1]))
    (compared,) = asyncio.run(scorer.compare([request]))
    assert isinstance(compared, Compared) and compared.source == "pointwise"
    assert compared.win[0, 1] == pytest.approx(1 / (1 + np.exp(3.0)))


def test_tables_keep_turns_and_inserted_tokens(tmp_path):
    groups, _ = explore(rounds(3))
    table = sample_table(1, groups).to_pylist()
    assert [turn["role"] for turn in table[0]["turns"]] == ["assistant", "user"] * 3
    assert table[0]["ended"] == "done" and table[0]["environment"] == "second_try"
    examples = [Example(rows=(make_row(group, i, score=1.0),)) for group in groups for i in (0, 1)]
    plain = Group(
        prompt=groups[0].prompt,
        samples=tuple(
            replace(s, completion=replace(s.completion, episode=None)) for s in groups[0].samples
        ),
    )
    examples.append(Example(rows=(make_row(plain, 0, score=1.0),)))
    pq.write_table(example_table(1, examples), tmp_path / "e.parquet")
    read = read_examples(tmp_path / "e.parquet")
    assert [e.rows[0].inserted for e in read] == [e.rows[0].inserted for e in examples]
    assert read[0].rows[0].inserted is not None and read[-1].rows[0].inserted is None


def test_labels_of_episodes_keep_what_was_inserted(tmp_path):
    groups, _ = explore(rounds(2))
    (tmp_path / "samples").mkdir()
    pq.write_table(sample_table(1, groups), tmp_path / "samples/iteration-000001.parquet")
    prompt = groups[0].prompt.prompt_id
    label = {"pair_id": f"1/{prompt}/1/0", "verdict": "first", "source": "me", "place": "here"}
    ((chosen, rejected),) = [e.rows for e in labeled_examples(tmp_path, [label], warn=print)]
    for row, sample in ((chosen, 1), (rejected, 0)):
        expected = make_row(groups[0], sample, score=0.0)
        assert row.inserted == expected.inserted is not None
        assert np.array_equal(row.fed_ids, expected.fed_ids)


GRPO = {"type": "grpo", "samples": 2, "kl": {"coef": 0.0}}


def test_resume_within_an_episode_equals_the_uninterrupted_run(tmp_path):
    """The journal has the turns that were generated; the environment plays them again."""

    class Killed(FakeRollout):
        def __init__(self, at):
            super().__init__()
            self.at = at

        async def generate(self, requests, *, version):
            if len(self.calls) == self.at:
                raise RuntimeError("killed")
            return await super().generate(requests, version=version)

    def play(directory, **roles):
        config = make_config(directory, algorithm=GRPO, environment={"type": "second_try"})
        scorer = EpisodeScorer(FakeScorer(), config.environment, is_pairwise=False)
        rollout = roles.pop("rollout", None) or FakeRollout()
        run_campaign(
            config,
            scorer=scorer,
            rollout=rollout,
            environments=rounds(3),
            chat=TurnChat(),
            **roles,
        )
        return config, rollout

    whole, rollout = play(tmp_path / "whole")
    # Before the first iteration, 3 turns of sampled and 3 of greedy; then turns 1 and 2.
    with pytest.raises(RuntimeError, match="killed"):
        play(tmp_path / "broken", rollout=Killed(8))
    broken, again = play(tmp_path / "broken")
    assert metrics_of(broken) == metrics_of(whole)
    for i in range(1, 5):
        name = f"samples/iteration-{i:06d}.parquet"
        assert pq.read_table(whole.run.dir / name).equals(pq.read_table(broken.run.dir / name))
    # Evaluations are repeated, turns 1 and 2 are not.
    assert again.calls == [*rollout.calls[:6], *rollout.calls[8:]]
    metrics = metrics_of(whole)[1]
    assert metrics["environment/turns"] == 3 and metrics["environment/ended/done"] == 1
    assert metrics["environment/own/rounds"] == 3
    assert metrics["rollout/length_mean"] == 9
    assert "eval/toy/sampled" in metrics_of(whole)[0]


def test_a_learner_gets_the_inserted_tokens(tmp_path):
    config = make_config(
        tmp_path,
        algorithm={**GRPO, "type": "ppo"},
        run={"iterations": 1},
        environment={"type": "second_try"},
        scorer={},
    )
    learner = FakeLearner()
    scorer = EpisodeScorer(NoScorer(), config.environment, is_pairwise=False)
    run_campaign(
        config,
        scorer=scorer,
        learner=learner,
        critic=FakeLearner(),
        environments=rounds(2),
        chat=TurnChat(),
    )
    rows = [row for batch in learner.batches for e in batch.examples for row in e.rows]
    assert rows and all(len(row) > len(row.prompt_ids) + 6 for row in rows)
    assert all(len(row.tokens["advantage"]) == len(row.response_ids) == 6 for row in rows)
