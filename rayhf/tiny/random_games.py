"""Games of random odds: a seed decides how often rock, paper and scissors beat each other.

In: the seed of a game, which a pairwise rule gets as the column game_seed of the prompts' rows.
Out: the win probabilities. Every game is cyclic, so that its only equilibrium mixes all moves.
"""

from __future__ import annotations

import random
from functools import cache

from rayhf.tiny.game import ANSWERS
from rayhf.tiny.game import beats as beats_by_default_odds

LOWEST = 0.55
HIGHEST = 1.0

Preference = tuple[tuple[float, ...], ...]


@cache
def odds(game_seed: int) -> Preference:
    """Return P(ANSWERS[i] beats ANSWERS[j]): each move beats the one before it in the cycle.

    Its probability of that is uniform between LOWEST and HIGHEST.
    """
    rng = random.Random(f"game odds {game_seed}")
    size = len(ANSWERS)
    preference = [[0.5] * size for _ in ANSWERS]
    for loser in range(size):
        winner = (loser + 1) % size
        preference[winner][loser] = round(rng.uniform(LOWEST, HIGHEST), 2)
        preference[loser][winner] = round(1.0 - preference[winner][loser], 2)
    return tuple(map(tuple, preference))


def beats(
    first: str, second: str, *, prompt: str, reference_answer: str | None, game_seed: int
) -> float:
    """Return P(first beats second); a text that is not a move loses to every move."""
    moves = [text.strip() for text in (first, second)]
    if not all(move in ANSWERS for move in moves):
        return beats_by_default_odds(
            first, second, prompt=prompt, reference_answer=reference_answer
        )
    return odds(game_seed)[ANSWERS.index(moves[0])][ANSWERS.index(moves[1])]
