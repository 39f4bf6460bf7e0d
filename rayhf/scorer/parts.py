"""The scorers of a list, called side by side.

In: ScoreRequests. Out: by scorer, its answers to all requests: a row of outcomes each, or a
comparison. A request that a scorer is not to judge (`Prompt.scorers`) does not reach it.

Synchronization: calls may come from several threads. A scorer that does not declare `is_concurrent`
has one of them at a time, and runs in the caller's thread: models keep their thread's settings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rayhf.config.scorers import ScorerEntryConfig
from rayhf.data.thinking import with_whole_texts
from rayhf.scorer.comparisons import check_comparisons, check_outcomes
from rayhf.scorer.protocol import BaseScorer, ScorerEngine
from rayhf.types import Comparison, Outcome, Prompt, ScoreRequest, Skipped

Rows = list[tuple[Outcome, ...]]
"""One scorer's outcomes: by request, by completion."""
Answers = Rows | list[Comparison]
_THREADS = 64
_NOT_NAMED = Skipped(reason="the prompt's `scorers` do not name it")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the combined scorers."""

    config: ScorerEntryConfig
    engine: ScorerEngine
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """Name in metrics and samples."""
        return self.config.resolved_name

    def readable(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreRequest]:
        """Return the requests with the text that the scorer reads (`text` of its entry)."""
        return with_whole_texts(requests) if self.config.text == "whole" else requests


def judges(config: ScorerEntryConfig, prompt: Prompt) -> bool:
    """Return whether a scorer is to judge the completions of a prompt."""
    return prompt.scorers is None or config.resolved_name in prompt.scorers


class Parts:
    """The scorers of a list."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="scorer")

    def score(self, requests: Sequence[ScoreRequest]) -> list[Rows]:
        """Return each scorer's outcomes."""
        return self._call_all(_score, requests)

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Answers]:
        """Return the comparisons of each pairwise scorer, and each other one's outcomes."""
        return self._call_all(
            lambda part, chosen: (
                _compare(part, chosen) if part.config.is_pairwise else _score(part, chosen)
            ),
            requests,
        )

    def take_counts(self) -> dict[str, float]:
        """Return what the scorers counted since the last call, as "<scorer>/<count>"."""
        return {
            f"{part.name}/{name}": count
            for part in self._parts
            if isinstance(part.engine, BaseScorer)
            for name, count in part.engine.take_counts().items()
        }

    def close(self) -> None:
        """Close every scorer, even where one raises."""
        with ExitStack() as stack:
            stack.callback(self._pool.shutdown, wait=False)
            for part in self._parts:
                stack.callback(part.engine.close)

    def _call_all(
        self, call: Callable[[Part, Sequence[ScoreRequest]], Any], requests: Sequence[ScoreRequest]
    ) -> list[Any]:
        beside = [
            self._pool.submit(_call_chosen, call, part, requests)
            if part.config.is_concurrent and len(self._parts) > 1
            else None
            for part in self._parts
        ]
        here = [
            _call_chosen(call, part, requests) if future is None else None
            for part, future in zip(self._parts, beside, strict=True)
        ]
        return [
            answers if future is None else future.result()
            for answers, future in zip(here, beside, strict=True)
        ]


def _call_chosen(
    call: Callable[[Part, Sequence[ScoreRequest]], Any],
    part: Part,
    requests: Sequence[ScoreRequest],
) -> list[Any]:
    """Return a scorer's answers; to requests that it is not to judge, that it skipped them."""
    chosen = [request for request in requests if judges(part.config, request.prompt)]
    answers = iter(call(part, chosen) if chosen else [])
    return [
        next(answers)
        if judges(part.config, request.prompt)
        else _skipped(part, request, compares=call is not _score)
        for request in requests
    ]


def _skipped(part: Part, request: ScoreRequest, *, compares: bool) -> Skipped | tuple[Skipped, ...]:
    if compares and part.config.is_pairwise:
        return _NOT_NAMED
    return (_NOT_NAMED,) * len(request.completions)


def _score(part: Part, requests: Sequence[ScoreRequest]) -> Rows:
    if part.config.is_concurrent:
        return check_outcomes(part.engine.score(part.readable(requests)), requests)
    with part.lock:
        return check_outcomes(part.engine.score(part.readable(requests)), requests)


def _compare(part: Part, requests: Sequence[ScoreRequest]) -> list[Comparison]:
    if part.config.is_concurrent:
        return check_comparisons(part.engine.compare(part.readable(requests)), requests)
    with part.lock:
        return check_comparisons(part.engine.compare(part.readable(requests)), requests)
