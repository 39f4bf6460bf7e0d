"""A pairwise scorer that is asked about some pairs only: a tournament, or fixed answers.

In: ScoreRequests, and a scorer that compares (a judge, a rule, a model, a service). Out: the same
interface. The scorer gets two completions at a time; a judge sees each pair in both orders, as
always. Equal texts are one player and tie, without a question.

The draw follows from the prompt and the texts alone, and the rounds from the draw and the verdicts:
neither the order of the completions nor a restart changes them.

Score of a tournament: an incomplete matrix has no fair row means, because opponents differ: in a
Swiss tournament the good ones meet the good ones. So a Bradley-Terry model is fitted to the
verdicts, and a pair without one has its probability; verdicts stay as they are. A completion's
score is, as in a full matrix, its mean win probability against the others. Prior: each player has
one tie with an average player, which keeps strengths finite and connects players that no chain of
comparisons does. In the fit a player's expected wins are its wins, so that these means rank as the
strengths do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from rayhf.config.comparisons import Anchors, KnockOut, RoundRobin, Swiss
from rayhf.config.scorers import ScorerEntryConfig
from rayhf.errors import ConfigError
from rayhf.evaluation.duels import given_completion
from rayhf.evaluation.win_rates import fit_strengths, sigmoid
from rayhf.scorer.comparisons import (
    Matrix,
    Problem,
    check_comparisons,
    compare_scores,
    has_verdict,
    mean_wins,
)
from rayhf.scorer.protocol import BaseScorer, ScorerSetup
from rayhf.scorer.replies import MAX_REPLIES, Replies, moved, select_replies
from rayhf.scorer.schedules import schedule
from rayhf.types import (
    Compared,
    Comparison,
    Failed,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
    derive_seed,
    quoted,
)


def with_comparisons(
    config: ScorerEntryConfig, setup: ScorerSetup, engine: BaseScorer[Any]
) -> BaseScorer[ScorerEntryConfig]:
    """Return the scorer of an entry, asked as its `comparisons` say."""
    match config.comparisons:
        case None:
            return engine
        case Anchors() as anchors:
            return Anchored(config, setup, engine, anchors)
        case tournament:
            return Tournament(config, setup, engine, tournament)


class _Asked(BaseScorer[ScorerEntryConfig]):
    """A scorer that asks another one, and counts its comparisons."""

    def __init__(
        self, config: ScorerEntryConfig, setup: ScorerSetup, engine: BaseScorer[Any]
    ) -> None:
        super().__init__(config, setup)
        self._engine = engine
        self._comparisons = 0
        self._lock = threading.Lock()

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call: comparisons, and the scorer's own."""
        with self._lock:
            counts = {"comparisons": float(self._comparisons)}
            self._comparisons = 0
        return self._engine.take_counts() | counts

    def close(self) -> None:
        """Release the scorer."""
        self._engine.close()

    def _ask(self, pairs: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the verdict on each request of two completions."""
        self._count(len(pairs))
        return check_comparisons(self._engine.compare(pairs), pairs) if pairs else []

    def _count(self, comparisons: int) -> None:
        with self._lock:
            self._comparisons += comparisons

    def _kept(self, by_question: Sequence[Replies]) -> Replies:
        """Return the replies about one completion that the run keeps."""
        limit = getattr(self.config, "keep_replies", MAX_REPLIES)
        return select_replies(by_question, limit)


# ------------------------------------------------------------------------------------ tournaments


class Tournament(_Asked):
    """A scorer that compares the completions of a request round by round."""

    def __init__(
        self,
        config: ScorerEntryConfig,
        setup: ScorerSetup,
        engine: BaseScorer[Any],
        comparisons: RoundRobin | KnockOut | Swiss,
    ) -> None:
        super().__init__(config, setup, engine)
        self._setting = comparisons

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return each completion's mean win probability against the request's others."""
        return [
            mean_wins(comparison, len(request.completions))
            for comparison, request in zip(self.compare(requests), requests, strict=True)
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities of each request, see the module's docstring.

        NaN for a completion that no comparison has a verdict on; where there is no verdict at all
        after a round, the request's tournament ends with the first reason.
        """
        setting = self._setting
        if isinstance(setting, RoundRobin):
            for request in requests:
                self._count(setting.asked(len({c.text for c in request.completions})))
            return check_comparisons(self._engine.compare(requests), requests)
        fields = [_Field(request, setting) for request in requests]
        while playing := [field for field in fields if field.pairs]:
            pairs = list(chain.from_iterable(field.requests() for field in playing))
            answers = iter(self._ask(pairs))
            for field in playing:
                field.record([next(answers) for _ in field.pairs])
        return [self._comparison(field) for field in fields]

    def _comparison(self, field: _Field) -> Comparison:
        if not field.has_verdict and field.problem is not None:
            return field.problem
        replies = tuple(map(self._kept, field.replies))
        return Compared(win=field.win(), source="pairwise", replies=replies if any(replies) else ())


class _Field:
    """The tournament of one request: its players are the different texts, in the drawn order."""

    def __init__(self, request: ScoreRequest, setting: KnockOut | Swiss) -> None:
        self._request = request
        texts = [completion.text for completion in request.completions]
        drawn = draw(request.prompt.prompt_id, texts)
        place = {text: player for player, text in enumerate(drawn)}
        self._player_K = [place[text] for text in texts]
        self._completion_P = [texts.index(text) for text in drawn]
        self._win_PP = np.full((len(drawn), len(drawn)), np.nan)
        np.fill_diagonal(self._win_PP, 0.5)
        self._schedule = schedule(setting, len(drawn))
        self.pairs = next(self._schedule, [])
        """Pairs of the current round; none after the last."""
        self.problem: Problem | None = None
        """The first reason for a missing verdict."""
        self.replies: list[list[Replies]] = [[] for _ in texts]
        """By completion, the replies of each comparison."""

    def requests(self) -> Iterator[ScoreRequest]:
        """Yield the current round's comparisons."""
        for pair in self.pairs:
            completions = tuple(self._request.completions[i] for i in self._completions(*pair))
            yield replace(self._request, completions=completions)

    def record(self, answers: Sequence[Comparison]) -> None:
        """Enter the current round's verdicts, and go to the next round."""
        for (first, second), answer in zip(self.pairs, answers, strict=True):
            if not isinstance(answer, Compared):
                self.problem = self.problem or answer
                continue
            places = self._completions(first, second)
            for position, completion in enumerate(places):
                self.replies[completion].append(moved(answer.replies_about(position), places))
            earlier, later = (self._player_K[completion] for completion in places)
            self._win_PP[earlier, later] = answer.win[0, 1]
            self._win_PP[later, earlier] = answer.win[1, 0]
        results = [self._win_PP[pair] for pair in self.pairs]
        if not self.has_verdict:
            self.pairs = []
            return
        try:
            self.pairs = self._schedule.send(
                [float(result) if np.isfinite(result) else None for result in results]
            )
        except StopIteration:
            self.pairs = []

    @property
    def has_verdict(self) -> bool:
        """Whether any two players were compared; true for a single one. Ties of copies are none."""
        return has_verdict(self._win_PP)

    def win(self) -> Matrix:
        """Return the win probabilities of all completions: (K, K)."""
        win_KK: Matrix = completed(self._win_PP)[np.ix_(self._player_K, self._player_K)]
        return win_KK

    def _completions(self, first: int, second: int) -> tuple[int, int]:
        """Return the completions of two players, the earlier in the request first."""
        one, other = sorted((self._completion_P[first], self._completion_P[second]))
        return one, other


def draw(prompt_id: str, texts: Sequence[str]) -> list[str]:
    """Return the different texts in an order that depends on the prompt and on all of them."""
    # Lone surrogates, which a seed cannot hold, are written out.
    named = {text: text.encode("utf-8", "backslashreplace").decode() for text in texts}
    seed = derive_seed("tournament", prompt_id, *sorted(named.values()))
    return sorted(named, key=lambda text: (derive_seed(seed, named[text]), text))


def completed(win_PP: Matrix) -> Matrix:
    """Return the matrix with the probabilities of a Bradley-Terry fit in place of NaN: (P, P).

    The prior is one tie of each player with an average one. A player without any verdict stays NaN.
    """
    known_PP = np.isfinite(win_PP) & ~np.eye(len(win_PP), dtype=bool)
    rated = np.flatnonzero(known_PP.any(axis=1))
    among = np.ix_(rated, rated)
    known_RR = known_PP[among]
    missing_RR = ~known_RR & ~np.eye(len(rated), dtype=bool)
    if not missing_RR.any():
        return win_PP
    wins = np.full((len(rated) + 1, len(rated) + 1), 0.5)  # the last one is the average player
    wins[:-1, :-1] = np.where(known_RR, win_PP[among], 0.0)
    wins[-1, -1] = 0.0
    strength_R = fit_strengths(wins)[:-1]
    fitted_RR = sigmoid(strength_R[:, None] - strength_R[None, :])
    # Mirrored exactly: sigmoid(x) + sigmoid(-x) may be off by a rounding error.
    upper_RR = np.triu(fitted_RR, 1)
    fitted_RR = upper_RR + np.tril(1.0 - upper_RR.T, -1)
    out = win_PP.copy()
    out[among] = np.where(missing_RR, fitted_RR, win_PP[among])
    return out


# ---------------------------------------------------------------------------------- fixed answers


class Anchored(_Asked):
    """A scorer that compares each completion with the anchors of its prompt's row."""

    def __init__(
        self,
        config: ScorerEntryConfig,
        setup: ScorerSetup,
        engine: BaseScorer[Any],
        anchors: Anchors,
    ) -> None:
        super().__init__(config, setup, engine)
        self._anchors = anchors

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return each completion's win rate against the anchors; equal texts are 1/2."""
        asked: dict[tuple[str, str, str], ScoreRequest] = {}
        anchors: list[tuple[str, ...] | Failed] = []
        for request in requests:
            anchors.append(self._anchors_of(request.prompt))
            for key, pair in self._pairs(request, anchors[-1]):
                asked.setdefault(key, pair)
        answers = dict(zip(asked, self._ask(list(asked.values())), strict=True))
        return [
            tuple(
                own
                if isinstance(own, Failed)
                else self._outcome(request.prompt, c.text, own, answers)
                for c in request.completions
            )
            for request, own in zip(requests, anchors, strict=True)
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return sigmoids of differences of the win rates."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]

    def _anchors_of(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        try:
            return anchors_of(prompt, self._anchors)
        except ValueError as error:
            return Failed(reason=str(error))

    def _pairs(
        self, request: ScoreRequest, anchors: tuple[str, ...] | Failed
    ) -> Iterator[tuple[tuple[str, str, str], ScoreRequest]]:
        if isinstance(anchors, Failed):
            return
        for completion in request.completions:
            for anchor in anchors:
                if completion.text != anchor:
                    given = given_completion(request.prompt, anchor, 1)
                    pair = replace(request, completions=(completion, given))
                    yield (request.prompt.prompt_id, completion.text, anchor), pair

    def _outcome(
        self,
        prompt: Prompt,
        text: str,
        anchors: Sequence[str],
        answers: Mapping[tuple[str, str, str], Comparison],
    ) -> Outcome:
        wins: list[float] = []
        replies: list[Replies] = []
        problems: list[Problem] = []
        for number, anchor in enumerate(anchors, 1):
            if text == anchor:
                wins.append(0.5)
                continue
            answer = answers[prompt.prompt_id, text, anchor]
            if isinstance(answer, Compared):
                wins.append(float(answer.win[0, 1]))
                replies.append(_about_anchor(answer, number))
            else:
                problems.append(answer)
        if not wins:
            return problems[0]
        return Scored(value=sum(wins) / len(wins), replies=self._kept(replies))


def _about_anchor(answer: Compared, number: int) -> Replies:
    """Return the replies to a comparison with an anchor, which is no completion of the request."""
    return tuple(
        replace(reply, against=None, part=f"anchor {number}{order}")
        for place, order in enumerate(("", ", shown first"))
        for reply in answer.replies_about(place)
    )


def anchors_of(prompt: Prompt, anchors: Anchors) -> tuple[str, ...]:
    """Return the answers to compare with. Raises ValueError where the row has too few."""
    value = prompt.row.get(anchors.column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        columns = ", ".join(map(str, prompt.row)) or "none"
        raise ValueError(
            f"the row has no anchors in column {anchors.column!r}: expected a text or a list of "
            f"texts, got {value!r:.40}; its columns: {columns}"
        )
    if len(texts) < anchors.count:
        raise ValueError(
            f"the row has {len(texts)} anchors in column {anchors.column!r}, and "
            f"comparisons.count is {anchors.count}"
        )
    return tuple(texts[: anchors.count])


def check_anchors(config: ScorerEntryConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError for a prompt without the anchors that an entry compares with."""
    if not isinstance(config.comparisons, Anchors):
        return
    for prompt in prompts:
        try:
            anchors_of(prompt, config.comparisons)
        except ValueError as error:
            raise ConfigError(f"{quoted(prompt)}: {error}") from None
