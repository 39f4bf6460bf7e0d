"""Games of random odds, and the loops' own code on a tabular policy."""

import numpy as np
import pytest
import yaml

from rayhf.tiny.exploitability import exploitability
from rayhf.tiny.game import OPENING
from rayhf.tiny.random_games import beats, odds
from tests.bench.games import GAMES, LOOPS, TUNING, figures_of, settings_of, summary
from tests.bench.tabular import Schedule, play

NO_ANSWER = {"prompt": "", "reference_answer": None}


def test_games_are_cyclic_and_different():
    assert len(GAMES) >= 10 and not set(GAMES) & set(TUNING)
    games = [np.array(odds(seed)) for seed in (*GAMES, *TUNING)]
    for game in games:
        assert np.allclose(game + game.T, 1.0)
        assert game[1, 0] > 0.5 and game[2, 1] > 0.5 and game[0, 2] > 0.5
        # A move's share at the equilibrium is the margin between the other two.
        margins = np.array([game[2, 1], game[0, 2], game[1, 0]]) - 0.5
        assert exploitability(margins / margins.sum(), game) == pytest.approx(0.0, abs=1e-9)
    assert len({game.tobytes() for game in games}) == len(games)


def test_the_rule_takes_the_game_from_the_row():
    assert beats("paper", "rock\n", game_seed=3, **NO_ANSWER) == odds(3)[1][0]
    assert beats("rock", "lizard", game_seed=3, **NO_ANSWER) == 1.0


def test_figures_of_a_game():
    preference = np.array(odds(0))
    policies = np.array([[1.0, 0.0, 0.0]] * 9 + [[0.2, 0.5, 0.3]])
    figures = figures_of(policies, preference)
    average = np.array([0.92, 0.05, 0.03])
    assert figures["average"] == pytest.approx(float((preference @ average).max() - 0.5))
    assert figures["rarest"] == pytest.approx(0.2)
    assert figures["last"] == pytest.approx(float(exploitability(policies[-1], preference)))
    died = {"average": 0.1, "last": 0.3, "rarest": 1e-6}
    _, row = summary({"loop": {1: {"average": 0.04, "last": 0.1, "rarest": 0.2}, 2: died}})
    assert row == ["loop", "0.070", "0.100", "1/2", "0.200", "0.300", "1/2"]


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_plays_from_the_same_seed_alike(name):
    schedule = Schedule(iterations=4, batch=8, steps=3)
    settings = yaml.safe_load(yaml.safe_dump(settings_of(LOOPS[name])))
    runs = [play(settings, np.array(odds(1)), OPENING, seed=1, schedule=schedule) for _ in range(2)]
    assert (runs[0] == runs[1]).all() and runs[0].shape == (5, 3)
    # Paper wins against the opening, so that its share grows.
    assert runs[0][0] == pytest.approx(OPENING) and runs[0][-1, 1] > runs[0][0, 1]
