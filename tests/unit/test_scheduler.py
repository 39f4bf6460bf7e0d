"""The request schedulers: when a wave is complete, what a call contains, how errors end a run."""

import asyncio
import random

import pytest
from fakes import FakeChat, FakeRollout, FakeScorer, make_prompts

from rayhf.algorithms.base import sample_and_score
from rayhf.exploration.build import build_scheduler
from rayhf.types import Group, Sample, Sampling

DEPTHS = (0, 1, 7, 40)
"""Levels of gathers or tasks between a request and its coroutine."""


def group(prompt, completions=()):
    samples = tuple(Sample(completion=completion, outcome=None) for completion in completions)
    return Group(prompt=prompt, samples=samples)


def run(
    explore,
    *,
    prompts=3,
    rollout=None,
    scorer=None,
    deterministic=True,
    done=None,
    score_calls=1,
):
    """Explore with fake roles; return the groups and the calls of the rollout."""
    rollout = rollout or FakeRollout()

    async def go():
        scheduler = build_scheduler(
            {"policy": rollout},
            scorer or FakeScorer(),
            chat=FakeChat(),
            versions={"policy": 0},
            deterministic=deterministic,
            score_calls=score_calls,
        )
        return await scheduler.run(
            make_prompts(prompts),
            explore,
            sampling=Sampling(max_tokens=8),
            seed=1,
            done=done or (lambda group: None),
        )

    return asyncio.run(asyncio.wait_for(go(), 30)), rollout.calls


async def through_gathers(depth, coroutine):
    """Await a coroutine through nested gathers: `depth` more turns of the event loop."""
    future = asyncio.ensure_future(coroutine)
    for _ in range(depth):
        future = asyncio.gather(future)
    result = await future
    for _ in range(depth):
        (result,) = result
    return result


async def through_tasks(depth, coroutine):
    """Await a coroutine through nested tasks."""
    if not depth:
        return await coroutine
    return await asyncio.create_task(through_tasks(depth - 1, coroutine))


async def through_events(depth, coroutine):
    """Await a coroutine through tasks that wake each other by events."""
    events = [asyncio.Event() for _ in range(depth + 1)]

    async def pass_on(index):
        await events[index].wait()
        events[index + 1].set()

    tasks = [asyncio.create_task(pass_on(index)) for index in range(depth)]
    result = await coroutine
    events[0].set()
    await events[depth].wait()
    await asyncio.gather(*tasks)
    return result


class RecordingScorer(FakeScorer):
    """Remembers its requests."""

    def __init__(self):
        super().__init__()
        self.requests = []

    async def score(self, requests):
        self.requests += requests
        return await super().score(requests)


def test_completions_of_another_prompt_are_scored_with_it():
    (task,) = make_prompts(9)[8:]

    async def explore(prompt, context):
        completions = await context.sample(2)
        await asyncio.gather(context.score(completions), context.score(completions, prompt=task))
        return group(prompt, completions)

    scorer = RecordingScorer()
    run(explore, prompts=1, scorer=scorer)
    seen = {(request.prompt.prompt_id, request.number) for request in scorer.requests}
    assert seen == {("p000", 0), (task.prompt_id, 1)}


@pytest.mark.parametrize("through", [through_gathers, through_tasks, through_events])
def test_waves_wait_for_every_inner_task(through):
    """Each prompt has chains of three requests at several depths; a wave has one of each chain."""

    async def explore(prompt, context):
        async def chain(depth):
            completions = []
            for _ in range(3):
                completions += await through(depth, context.sample(1))
            return completions

        chains = await asyncio.gather(*map(chain, DEPTHS))
        return group(prompt, [completion for chain in chains for completion in chain])

    groups, calls = run(explore, rollout=FakeRollout(delay=0.002))
    assert [len(call) for call in calls] == [3 * len(DEPTHS)] * 3
    assert all(call == sorted(call) for call in calls)
    assert groups == run(explore)[0]


def test_waves_do_not_depend_on_the_order_of_responses():
    """Scores may return long before generations do; what they lead to belongs to the next wave."""

    class Slow(FakeScorer):
        async def score(self, requests):
            await asyncio.sleep(random.random() * 0.003)
            return await super().score(requests)

    async def explore(prompt, context):
        async def sample_more(depth):
            completions = await context.sample(2)
            await through_tasks(depth, context.score(completions))
            return await through_gathers(depth, context.sample(1))

        samples = await asyncio.gather(*map(sample_more, DEPTHS))
        return group(prompt, [completion for part in samples for completion in part])

    runs = [run(explore, rollout=FakeRollout(delay=0.003), scorer=Slow()) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2] and len(runs[0][1]) == 2


def test_coroutine_that_waits_for_something_else_is_an_error():
    async def forever(prompt, context):
        await asyncio.get_running_loop().create_future()

    async def clock(prompt, context):
        await asyncio.sleep(0.01)

    async def thread(prompt, context):
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="something other than its ExplorationContext"):
        run(forever)
    for explore in (clock, thread):
        with pytest.raises(RuntimeError, match="only wait for its ExplorationContext"):
            run(explore)


@pytest.mark.parametrize("deterministic", [True, False])
def test_first_error_ends_the_run_and_cancels_the_rest(deterministic, caplog):
    canceled = []

    class Stuck(FakeRollout):
        async def generate(self, requests, *, version):
            if any(request.number for request in requests):
                await asyncio.Event().wait()
            return await super().generate(requests, version=version)

    async def explore(prompt, context):
        completions = await context.sample(1)
        try:
            await asyncio.gather(context.sample(1), context.score(completions))
        except asyncio.CancelledError:
            canceled.append(prompt.prompt_id)
            raise
        return group(prompt)

    class Broken(FakeScorer):
        async def score(self, requests):
            raise ValueError("broken scorer")

    with pytest.raises(ValueError, match="broken scorer"):
        run(explore, rollout=Stuck(), scorer=Broken(), deterministic=deterministic)
    assert caplog.records == []

    def full(group):
        raise OverflowError("budget")

    async def sample_twice(prompt, context):
        if prompt.prompt_id == "p000":
            await context.sample(1)
            return group(prompt)
        return await explore(prompt, context)

    with pytest.raises(OverflowError, match="budget"):
        run(sample_twice, rollout=Stuck(), deterministic=deterministic, done=full)
    assert sorted(canceled) == ["p001", "p002"] and caplog.records == []


def test_both_schedulers_give_equal_groups():
    async def explore(prompt, context):
        return await sample_and_score(prompt, context, 3)

    assert run(explore)[0] == run(explore, deterministic=False)[0]


class CountingScorer(FakeScorer):
    """Counts calls in progress and the requests of each call."""

    def __init__(self):
        super().__init__()
        self.running = 0
        self.most = 0
        self.sizes = []

    async def score(self, requests):
        self.running += 1
        self.most = max(self.most, self.running)
        self.sizes.append(len(requests))
        await asyncio.sleep(0.01)
        self.running -= 1
        return await super().score(requests)


@pytest.mark.parametrize("score_calls", [1, 3])
def test_eager_scheduler_has_a_few_score_calls_in_flight(score_calls):
    scorer = CountingScorer()
    explore = lambda prompt, context: sample_and_score(prompt, context, 2)  # noqa: E731
    groups, _ = run(
        explore,
        prompts=40,
        rollout=FakeRollout(delay=0.1),
        scorer=scorer,
        deterministic=False,
        score_calls=score_calls,
    )
    assert scorer.most == score_calls
    assert sum(scorer.sizes) == 40
    expected, _ = run(explore, prompts=40)
    assert groups == expected
