"""The cyclic game: its equilibrium, exploitability, and what the Bradley-Terry model can make of its pairs."""

import json

import numpy as np
import pytest
from fakes import FakeChat, make_prompts

from rayhf.campaign.game import Game, exploitability
from rayhf.errors import ConfigError
from rayhf.tiny import game

PREFERENCE = np.array(game.PREFERENCE)


def test_the_game_is_cyclic_with_an_uneven_equilibrium():
    assert np.allclose(PREFERENCE + PREFERENCE.T, 1.0)
    assert exploitability(np.array(game.EQUILIBRIUM), PREFERENCE) == pytest.approx(0.0, abs=1e-12)
    assert sum(game.EQUILIBRIUM) == pytest.approx(1.0) and max(game.EQUILIBRIUM) - min(game.EQUILIBRIUM) > 0.05
    assert exploitability(np.array(game.OPENING), PREFERENCE) >= 0.2
    assert exploitability(np.eye(3), PREFERENCE) == pytest.approx([0.5, 0.44, 0.38])


def test_no_order_of_the_kinds_predicts_the_labels_but_the_pairs_do():
    rows = game.draw_pairs([f"q{i}" for i in range(20000)], seed=0)
    orders = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)]
    for order in orders:
        rank = {game.ANSWERS[kind]: place for place, kind in enumerate(order)}
        assert np.mean([rank[r["chosen"]] < rank[r["rejected"]] for r in rows]) <= 0.655
    right = [game.beats(r["chosen"], r["rejected"], prompt="", answer=None) > 0.5 for r in rows]
    assert np.mean(right) == pytest.approx(0.935, abs=0.01)


def test_what_is_no_move_loses():
    assert game.beats("paper", "lizard", prompt="", answer=None) == 1.0
    assert game.beats("lizard", "spock", prompt="", answer=None) == 0.5
    assert game.legal(" rock\n", prompt="", answer=None, finish_reason="stop") == 1.0


def make_game(tmp_path, content=None, prompts=2):
    path = tmp_path / "game.json"
    path.write_text(json.dumps(content or {"answers": game.ANSWERS, "preference": game.PREFERENCE}))
    return Game(path, make_prompts(prompts), FakeChat(), key="prompts.game")


def play(board, strategies):
    """Log-probs of every answer's tokens: all of it on the first token."""
    values = []
    for row, p in zip(board.rows, np.concatenate(strategies), strict=True):
        tokens = np.zeros(len(row.response_ids), dtype=np.float32)
        tokens[0] = np.log(max(p, 1e-30))
        values.append(tokens)
    return board.measure(values)


def test_exploitability_of_current_and_average_play(tmp_path):
    board = make_game(tmp_path)
    first = play(board, [[0.5, 0.0, 0.0], [0.25, 0.0, 0.0]])
    assert first["game/exploitability"] == pytest.approx(0.5) and first["game/mass"] == pytest.approx(0.375)
    play(board, [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    third = play(board, [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert third["game/exploitability"] == pytest.approx(0.38)
    assert third["game/exploitability_average"] == pytest.approx(float(exploitability(np.full(3, 1 / 3), PREFERENCE)), abs=1e-6)
    resumed = make_game(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(board.state_dict())))
    again = [[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]
    assert play(resumed, again) == play(board, again)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"answers": ["a", "b"]}, "preference"),
        ({"answers": ["a", "a"], "preference": [[0.5, 1], [0, 0.5]]}, "two different"),
        ({"answers": ["a", "b"], "preference": [[0.5, 0.9], [0.2, 0.5]]}, "must be 1"),
        ({"answers": ["a", "b"], "preference": [[0.5, 0.9]]}, "shape"),
    ],
)
def test_a_file_that_is_no_game_is_refused(tmp_path, content, problem):
    with pytest.raises(ConfigError, match=problem):
        make_game(tmp_path, content)


def test_tabular_self_play_converges_on_average_and_cycles_at_the_end():
    """The exact multiplicative-weights update that SPPO regresses onto, at the preset's step."""
    policy, total, gaps = np.array(game.OPENING), np.zeros(3), []
    for turn in range(80):
        policy = policy * np.exp(2.0 * PREFERENCE @ policy)
        policy /= policy.sum()
        total += policy
        gaps.append(float(exploitability(total / (turn + 1), PREFERENCE)))
    assert gaps[-1] <= 0.05 < gaps[5] and exploitability(policy, PREFERENCE) > 0.05
