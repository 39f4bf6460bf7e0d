"""Comparisons of a policy's answers with others: both orders, ties, and which prompts they are of.

A scorer sees every pair in both orders, because some prefer the answer that stands first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayhf.evaluation.statistics import Array
from rayhf.evaluation.win_rates import Duels
from rayhf.types import (
    NO_LOGPROBS,
    NO_TOKENS,
    Compared,
    Comparison,
    Completion,
    Prompt,
    ScoreRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Answers of several policies to one prompt, one each, in a fixed order of the policies."""

    prompt: Prompt
    texts: tuple[str, ...]


def both_orders(contests: Sequence[Contest]) -> list[ScoreRequest]:
    """Return two requests per contest: its answers, and the same in reverse order."""
    return [
        ScoreRequest(
            prompt=contest.prompt,
            completions=tuple(
                given_completion(contest.prompt, text, index) for index, text in enumerate(texts)
            ),
        )
        for contest in contests
        for texts in (contest.texts, contest.texts[::-1])
    ]


def merge_orders(responses: Sequence[Comparison]) -> tuple[list[Array | None], str]:
    """Return the mean of both orders for each contest, and the first reason for a missing one.

    (M, M) matrices of win probabilities in the contest's order; None where an order has no verdict.
    """
    merged: list[Array | None] = []
    reason = ""
    for there, back in zip(responses[0::2], responses[1::2], strict=True):
        for response in (there, back):
            if not isinstance(response, Compared):
                reason = reason or response.reason
        if isinstance(there, Compared) and isinstance(back, Compared):
            merged.append((there.win + back.win[::-1, ::-1]) / 2)
        else:
            merged.append(None)
    return merged, reason


def duels_of(
    contests: Sequence[Contest],
    wins: Sequence[Array | None],
    difficulty: Sequence[float] | None = None,
) -> Duels:
    """Return the comparisons of each contest's first answer with its second.

    Contests without a verdict are left out; so are prompts without any.
    """
    numbers: dict[str, int] = {}
    rows: list[tuple[float, int, int, float]] = []
    for index, (contest, win) in enumerate(zip(contests, wins, strict=True)):
        if win is None or not np.isfinite(win[0, 1]):
            continue
        number = numbers.setdefault(contest.prompt.prompt_id, len(numbers))
        gap = len(contest.texts[0]) - len(contest.texts[1])
        hard = 0.0 if difficulty is None else difficulty[index]
        rows.append((float(win[0, 1]), gap, number, hard))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Duels(
        win_D=columns[:, 0],
        length_gap_D=columns[:, 1],
        prompt_D=columns[:, 2].astype(np.int64),
        difficulty_D=None if difficulty is None else columns[:, 3],
    )


def given_completion(prompt: Prompt, text: str, index: int = 0) -> Completion:
    """Return a text as a completion that was not sampled here: no tokens, no log-probs."""
    return Completion(
        prompt_id=prompt.prompt_id,
        index=index,
        seed=0,
        text=text,
        token_ids=NO_TOKENS,
        logprobs=NO_LOGPROBS,
        finish_reason="stop",
        policy_version=0,
    )
