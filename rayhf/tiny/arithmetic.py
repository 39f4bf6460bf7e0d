"""The verifiable task: chains of additions and subtractions, answered one step per line.

In: a seed. Out: prompts with answers, demonstrations with slips, and `correct`, the rule that
scores a completion. A question `What is 3+8-5?` is answered by

    3+8=11
    11-5=6
    Answer: 6

A policy trained on demonstrations that slip now and then (a step off by one or two, carried on)
knows right from wrong but is mediocre when sampled, so there is something to learn at once. Nothing
here imports torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rayhf.errors import ConfigError

SLIP_RATE = 0.26
"""Probability that one step of a demonstration is off by one or two."""

_STEP = re.compile(r"-?[0-9]+[+-][0-9]=-?[0-9]+")
_FINAL = re.compile(r"Answer: (0|-?[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Chain:
    """One question: the first term and the signed terms that follow."""

    terms: tuple[int, ...]
    """Each in -9..9 and never 0; the first is positive."""

    @property
    def prompt(self) -> str:
        return "What is " + "".join(f"{term:+d}" for term in self.terms).removeprefix("+") + "?"

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    def worked(self, slips: Sequence[int]) -> str:
        """The steps, with slips[i] added to the result of step i and carried on: zeros give the
        right answer."""
        lines, total = [], self.terms[0]
        for term, slip in zip(self.terms[1:], slips, strict=True):
            result = total + term + slip
            lines.append(f"{total}{term:+d}={result}")
            total = result
        return "\n".join([*lines, f"Answer: {total}"])


def chains(seed: int) -> Iterator[Chain]:
    """An endless stream of different questions with three or four terms, the same for the same
    seed."""
    rng = random.Random(f"arithmetic chains {seed}")
    seen: set[tuple[int, ...]] = set()
    while True:
        terms = [rng.randint(1, 9)]
        for _ in range(rng.choice((2, 3, 3))):
            terms.append(rng.choice((-1, 1)) * rng.randint(1, 9))
        # Totals stay at or above zero where no step slips: a minus sign is then rare, and the table
        # of facts small.
        if any(sum(terms[: end + 1]) < 0 for end in range(len(terms))) or tuple(terms) in seen:
            continue
        seen.add(tuple(terms))
        yield Chain(tuple(terms))


def draw_slips(chain: Chain, rng: random.Random, *, rate: float = SLIP_RATE) -> list[int]:
    """For each step 0, or with probability `rate` one of -2, -1, 1, 2."""
    return [rng.choice((-2, -1, 1, 2)) if rng.random() < rate else 0 for _ in chain.terms[1:]]


def demonstrations(
    questions: Sequence[Chain], seed: int, *, count: int, rate: float = SLIP_RATE
) -> list[tuple[str, str]]:
    """`count` (prompt, response) pairs over the questions in turn; slips differ between repetitions
    of a question."""
    rng = random.Random(f"arithmetic demonstrations {seed} {rate}")
    picked = (questions[index % len(questions)] for index in range(count))
    return [(chain.prompt, chain.worked(draw_slips(chain, rng, rate=rate))) for chain in picked]


def correct(completion: str, *, prompt: str, answer: str | None, finish_reason: str) -> float:
    """1.0 when the completion is well formed and its final number equals the answer, else 0.0.

    Well formed: it was not cut off, every line but the last is a step `a+b=c` or `a-b=c`, and the
    last line is exactly `Answer: N`, with N in plain digits. Whether the steps are right is not
    checked. Raises ConfigError with no answer.
    """
    if answer is None:
        raise ConfigError(
            f"prompts: arithmetic needs an answer with every prompt, and {prompt!r} has none"
        )
    *steps, final = completion.split("\n")
    match = _FINAL.fullmatch(final)
    if (
        finish_reason == "length"
        or match is None
        or not all(_STEP.fullmatch(step) for step in steps)
    ):
        return 0.0
    return float(match[1] == answer)
