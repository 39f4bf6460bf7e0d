"""The verifiable task: chains of additions and subtractions, worked one step per line.

In: a seed. Out: prompts with reference answers, demonstrations with errors, and `correct`, the rule
that scores a completion. The correct completion of `What is 3+8-5?` is

    3+8=11
    11-5=6
    Answer: 6

In a demonstration with slips, some steps are off by one or two, and the wrong result is carried on.
A policy trained on such demonstrations decodes well greedily but is mediocre when sampled, so a
campaign can improve it within a few iterations. Nothing here imports torch.
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
    """A question: the first term and the signed terms that follow."""

    terms: tuple[int, ...]
    """Numbers from -9 to 9 without 0; the first is positive."""

    @property
    def prompt(self) -> str:
        """Text of the question."""
        return "What is " + "".join(f"{term:+d}" for term in self.terms).removeprefix("+") + "?"

    @property
    def answer(self) -> str:
        """Reference answer."""
        return str(sum(self.terms))

    def worked(self, slips: Sequence[int]) -> str:
        """Return a completion with slips[i] added to the result of step i and carried on.

        With zeros it is correct.
        """
        lines = []
        total = self.terms[0]
        for term, slip in zip(self.terms[1:], slips, strict=True):
            result = total + term + slip
            lines.append(f"{total}{term:+d}={result}")
            total = result
        return "\n".join([*lines, f"Answer: {total}"])


def chains(seed: int) -> Iterator[Chain]:
    """Yield different questions with three or four terms without end; the seed fixes them."""
    rng = random.Random(f"arithmetic chains {seed}")
    seen: set[tuple[int, ...]] = set()
    while True:
        terms = [rng.randint(1, 9)]
        for _ in range(rng.choice((2, 3, 3))):
            terms.append(rng.choice((-1, 1)) * rng.randint(1, 9))
        # Totals of a correct completion are never negative, which keeps minus signs rare and the
        # number of facts to learn small.
        if any(sum(terms[: end + 1]) < 0 for end in range(len(terms))) or tuple(terms) in seen:
            continue
        seen.add(tuple(terms))
        yield Chain(tuple(terms))


def draw_slips(chain: Chain, rng: random.Random, *, rate: float = SLIP_RATE) -> list[int]:
    """Return for each step 0, or with probability `rate` one of -2, -1, 1, 2."""
    return [rng.choice((-2, -1, 1, 2)) if rng.random() < rate else 0 for _ in chain.terms[1:]]


def demonstrations(
    questions: Sequence[Chain], seed: int, *, count: int, rate: float = SLIP_RATE
) -> list[tuple[str, str]]:
    """Return `count` pairs (prompt, response), cycling through the questions.

    The slips differ between repetitions of a question.
    """
    rng = random.Random(f"arithmetic demonstrations {seed} {rate}")
    repeated = (questions[index % len(questions)] for index in range(count))
    return [(chain.prompt, chain.worked(draw_slips(chain, rng, rate=rate))) for chain in repeated]


def correct(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 if the completion is well formed and ends with the reference answer, else 0.0.

    Well formed: it is not truncated, every line but the last is a step `a+b=c` or `a-b=c`, and the
    last line is exactly `Answer: N`, with N in plain digits. Whether the steps are correct is not
    checked. Raises ConfigError for a prompt without a reference answer.
    """
    if reference_answer is None:
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
    return float(match[1] == reference_answer)


def prefer(first: str, second: str, *, prompt: str, reference_answer: str | None) -> float:
    """Return P(first is better): 1.0 or 0.0 where one of the two is correct, otherwise a tie.

    Raises ConfigError as `correct`.
    """
    one, other = (
        correct(text, prompt=prompt, reference_answer=reference_answer, finish_reason="stop")
        for text in (first, second)
    )
    return 0.5 + 0.5 * (one - other)
