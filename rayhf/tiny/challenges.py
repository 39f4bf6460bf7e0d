"""The task whose questions are generated too: a challenger asks for sums, a solver works them.

In: a seed. Out: topics (prompts of the challenger), held-out questions, demonstrations of both
skills, and `verified`, the rule that scores an answer to any question. To the topic `Ask about 3+8`
the challenger writes a question such as

    What is 3+8-5+2?

which the solver works as in the arithmetic task (arithmetic.py). The more terms a question has, the
harder it is for a policy whose steps slip. Demonstrated questions are mostly short; a challenger
that is rewarded for questions at the edge of the solver's ability learns to choose their length.
Nothing here imports torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from rayhf.tiny.arithmetic import Chain, correct, draw_slips

MOST_STEPS = 5
"""Longest demonstrated question, in additions and subtractions."""
ASKED_STEPS = (8, 5, 3, 2, 1)
"""Weights of questions with 1, 2, ... steps in demonstrations of asking: mostly easy ones."""

_QUESTION = re.compile(r"What is ([1-9](?:[+-][1-9])+)\?")


def parse(question: str) -> Chain | None:
    """Return the chain of a question; None for a text that is not one."""
    match = _QUESTION.fullmatch(question)
    return None if match is None else Chain(tuple(map(int, re.findall(r"-?[0-9]", match[1]))))


def draw_chain(steps: int, rng: random.Random, start: Sequence[int] = ()) -> Chain:
    """Return a chain of `steps` steps that begins with `start`; its totals are never negative."""
    terms = list(start) or [rng.randint(1, 9)]
    while len(terms) <= steps:
        term = rng.choice((-1, 1)) * rng.randint(1, 9)
        if sum(terms) + term >= 0:
            terms.append(term)
    return Chain(tuple(terms))


def topics() -> list[tuple[int, int]]:
    """Return all pairs of terms that a question can begin with."""
    terms = [sign * term for sign in (1, -1) for term in range(1, 10)]
    return [(first, second) for first in range(1, 10) for second in terms if first + second >= 0]


def topic_prompt(topic: tuple[int, int]) -> str:
    """Return the challenger's prompt."""
    return f"Ask about {topic[0]}{topic[1]:+d}"


def heldout_chains(seed: int) -> Iterator[Chain]:
    """Yield different questions without end, as many of each number of steps from 2 on."""
    rng = random.Random(f"challenges heldout {seed}")
    seen: set[Chain] = set()
    while True:
        chain = draw_chain(rng.randint(2, MOST_STEPS), rng)
        if chain not in seen:
            seen.add(chain)
            yield chain


def ask_demonstrations(seed: int, count: int) -> list[tuple[str, str]]:
    """Return pairs (topic prompt, question)."""
    rng = random.Random(f"challenges ask {seed}")
    pairs = topics()
    rows = []
    for _ in range(count):
        topic = rng.choice(pairs)
        (steps,) = rng.choices(range(1, MOST_STEPS + 1), weights=ASKED_STEPS)
        rows.append((topic_prompt(topic), draw_chain(steps, rng, topic).prompt))
    return rows


def solve_demonstrations(
    seed: int, count: int, *, rate: float, without: Sequence[Chain]
) -> list[tuple[str, str]]:
    """Return pairs (question, worked answer) with slips at `rate`, none of a chain in `without`."""
    rng = random.Random(f"challenges solve {seed} {rate}")
    excluded = set(without)
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        chain = draw_chain(rng.randint(1, MOST_STEPS), rng)
        if chain not in excluded:
            rows.append((chain.prompt, chain.worked(draw_slips(chain, rng, rate=rate))))
    return rows


def verified(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float | None]:
    """Return for each completion 1.0 if it answers its question correctly, 0.0 if it does not.

    None, which means that the rule does not apply, where the prompt is not a question. In the style
    of TRL's reward functions.
    """
    scores: list[float | None] = []
    for question, completion in zip(prompts, completions, strict=True):
        chain = parse(question)
        scores.append(
            None
            if chain is None
            else correct(
                completion, prompt=question, reference_answer=chain.answer, finish_reason="stop"
            )
        )
    return scores
