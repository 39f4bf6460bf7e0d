"""The tiny environment of two rounds: only what is read after the first one wins the second."""

import asyncio
from collections import Counter
from itertools import product

import pytest

from rayhf.tiny.game import ANSWERS
from rayhf.tiny.rematch import Rematch, RematchConfig

BEATS = {"rock": "paper", "paper": "scissors", "scissors": "rock"}
SEEDS = range(300)


def play(seed, first, second, **settings):
    """Play an episode; `second` is chosen from what is read after the first round."""

    async def go():
        environment = Rematch(RematchConfig(**settings))
        assert await environment.reset({}, seed=seed) is None
        read = await environment.step({"role": "assistant", "content": first})
        text = read.messages.removesuffix(". Your move?")
        move = {"role": "assistant", "content": second(text)}
        return read, await environment.step(move)

    return asyncio.run(go())


def win_rate(first, second, **settings):
    return sum(play(seed, first, second, **settings)[1].reward for seed in SEEDS) / len(SEEDS)


def test_a_policy_that_reads_the_move_always_wins():
    assert win_rate("rock", BEATS.get) == win_rate("a word", BEATS.get) == 1.0


def test_a_policy_that_does_not_read_wins_a_third():
    told = Counter(play(seed, "rock", lambda text: "rock")[0].messages for seed in SEEDS)
    assert len(told) == 3 and min(told.values()) > 0.25 * len(SEEDS)
    for first, second in product(ANSWERS, repeat=2):
        assert win_rate(first, lambda text, second=second: second) == pytest.approx(1 / 3, abs=0.08)


def test_a_hidden_move_is_not_told():
    read = {play(seed, "rock", lambda text: "rock", hidden=True)[0].messages for seed in SEEDS}
    assert read == {"again. Your move?"}


def test_the_first_round_is_worth_nothing():
    for seed in SEEDS[:9]:
        read, last = play(seed, "paper", lambda text: "no idea")
        assert read.reward == 0.0 and not read.done
        assert last.reward == 0.0 and last.done and last.metrics == {"won": 0.0}
