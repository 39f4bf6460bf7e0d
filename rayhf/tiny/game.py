"""The cyclic task: moves that beat each other in a cycle, which no score per move can express.

In: a seed. Out: prompts, the untrained policy's distribution of moves, preference pairs, and
`beats`, the pairwise rule. Paper beats rock, scissors beat paper, rock beats scissors, with
different probabilities: the only equilibrium mixes all three, unevenly. Nothing here imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rayhf.errors import ConfigError

ANSWERS = ("rock", "paper", "scissors")
PREFERENCE = ((0.5, 0.0, 0.88), (1.0, 0.5, 0.06), (0.12, 0.94, 0.5))
"""PREFERENCE[i][j] = P(ANSWERS[i] beats ANSWERS[j])."""
EQUILIBRIUM = (0.44 / 1.32, 0.38 / 1.32, 0.5 / 1.32)
"""Shares in the Nash equilibrium. A move's share is proportional to the margin between the other
two, so that every move wins 1/2 against the mixture."""
OPENING = (0.72, 0.18, 0.1)
"""Shares in the untrained policy's play; paper wins 0.77 against it."""
PAIR_WEIGHTS = {(1, 0): 1 / 0.5, (2, 1): 1 / 0.44, (0, 2): 1 / 0.38}
"""Relative frequency of each comparison in the pairs file: the inverse of its margin. The best
Bradley-Terry scores are then equal, and no ranking of the moves predicts more than 65 % of the
labels."""

_PLACES = ("park", "beach", "forest", "tavern", "harbour", "market", "castle", "desert")
_PLAYERS = ("Ann", "Ben", "Cem", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June")


def prompts(seed: int) -> Iterator[str]:
    """Yield every prompt once, in an order that depends on the seed."""
    questions = [
        f"{one} plays {two} in the {place}. Your move?"
        for one in _PLAYERS
        for two in _PLAYERS
        if one != two
        for place in _PLACES
    ]
    random.Random(f"game prompts {seed}").shuffle(questions)
    yield from questions


def beats(first: str, second: str, *, prompt: str, reference_answer: str | None) -> float:
    """Return P(first beats second).

    A text that is not a move loses to every move; two such texts draw.
    """
    moves = [
        ANSWERS.index(text.strip()) if text.strip() in ANSWERS else None for text in (first, second)
    ]
    if moves[0] is None or moves[1] is None:
        return 0.5 + 0.5 * ((moves[0] is not None) - (moves[1] is not None))
    return PREFERENCE[moves[0]][moves[1]]


def legal(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 for a move, else 0.0."""
    return float(completion.strip() in ANSWERS)


def draw_pairs(questions: list[str], seed: int) -> list[dict[str, str]]:
    """Return one labeled comparison per question; the label is drawn from PREFERENCE."""
    if not questions:
        raise ConfigError("game: no questions to draw pairs for")
    rng = random.Random(f"game pairs {seed}")
    comparisons = list(PAIR_WEIGHTS)
    weights = list(PAIR_WEIGHTS.values())
    rows = []
    for question in questions:
        better, worse = rng.choices(comparisons, weights)[0]
        if rng.random() >= PREFERENCE[better][worse]:
            better, worse = worse, better
        rows.append({"prompt": question, "chosen": ANSWERS[better], "rejected": ANSWERS[worse]})
    return rows
