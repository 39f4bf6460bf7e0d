"""Where the explore coroutines of one round meet the engines.

Hundreds of coroutines each ask for generations and scores; the exchange hands the requests on and wakes the askers.

- Deterministic: requests enter in waves. All coroutines run until each waits; then everything they asked for goes in, ordered by
  (prompt id, request number), and the next wave starts when this one is answered. An engine's batches, and with them its
  floating-point results, then depend on nothing but the requests.
- Otherwise: a generation enters the engine at once (the engine batches continuously), and scores go in as soon as the last call
  is back, together with all that gathered meanwhile.

A coroutine may only wait for the exchange, never for a clock or a socket: what it does must follow from what it was told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rayhf.experience import Completion, GenerateRequest, Group, Outcome, Prompt, Sampling, ScoreRequest, derive_seed
from rayhf.roles import Rollout, Scorer

_IDLE_TICKS = 12
"""Event-loop turns without a new request after which every coroutine is taken to be waiting. A result needs a handful of turns
to reach its coroutine through tasks and gathers."""

Pending = tuple[Any, "asyncio.Future[Any]"]


class Stopwatch:
    """Seconds during which at least one call of a kind was under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        count, since = self._open.get(kind, (0, time.monotonic()))
        self._open[kind] = (count + 1, since if count else time.monotonic())
        try:
            yield
        finally:
            count, since = self._open[kind]
            self._open[kind] = (count - 1, since)
            if count == 1:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - since


class Explorer:
    """What one prompt's `explore` may ask for."""

    def __init__(self, exchange: Exchange, prompt: Prompt, *, sampling: Sampling, seed: int) -> None:
        self._exchange, self._prompt, self.sampling, self._seed = exchange, prompt, sampling, seed
        self._requests = 0

    def derive_seed(self, *parts: int | str) -> int:
        """Randomness of this prompt in this round, by name."""
        return derive_seed(self._seed, self._prompt.prompt_id, *parts)

    async def sample(self, n: int, *, prefix: Sequence[int] = (), sampling: Sampling | None = None) -> tuple[Completion, ...]:
        """n continuations of the prompt, or of the prompt followed by `prefix` tokens."""
        number = self._requests
        self._requests += 1
        return await self._exchange.generate(
            GenerateRequest(
                prompt_id=self._prompt.prompt_id,
                number=number,
                token_ids=(*self._prompt.token_ids, *prefix),
                sampling=sampling or self.sampling,
                seeds=tuple(self.derive_seed("sample", number, index) for index in range(n)),
            )
        )

    async def score(self, completions: Sequence[Completion]) -> tuple[Outcome, ...]:
        """One outcome per completion."""
        return await self._exchange.score(ScoreRequest(prompt=self._prompt, completions=tuple(completions)))


Explore = Callable[[Prompt, Explorer], Awaitable[Group]]


class Exchange:
    """One round's meeting place. `version` is the policy version that must answer."""

    def __init__(self, rollout: Rollout, scorer: Scorer, *, version: int, deterministic: bool) -> None:
        self._rollout, self._scorer, self._version, self._deterministic = rollout, scorer, version, deterministic
        self.stopwatch = Stopwatch()
        self._generate: list[Pending] = []
        self._score: list[Pending] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._scoring = False
        self._activity = 0

    async def run(
        self, prompts: Sequence[Prompt], explore: Explore, *, sampling: Sampling, seed: int, done: Callable[[Group], None]
    ) -> list[Group]:
        """Explore every prompt; groups come back in the order of `prompts`, `done` hears of each as it finishes.

        Raises the first error of any coroutine or role; the others are cancelled.
        """

        async def one(prompt: Prompt) -> Group:
            try:
                group = await explore(prompt, Explorer(self, prompt, sampling=sampling, seed=seed))
                done(group)
                return group
            finally:
                self._activity += 1

        tasks = [asyncio.create_task(one(prompt), name=f"explore {prompt.prompt_id}") for prompt in prompts]
        waves = asyncio.create_task(self._waves(), name="waves") if self._deterministic else None
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            leftovers = [*tasks, *self._calls, *([waves] if waves else [])]
            for task in leftovers:
                task.cancel()
            await asyncio.gather(*leftovers, return_exceptions=True)

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        future: asyncio.Future[tuple[Completion, ...]] = asyncio.get_running_loop().create_future()
        self._activity += 1
        if self._deterministic:
            self._generate.append((request, future))
        else:
            self._call(self._generate_all([(request, future)]))
        return await future

    async def score(self, request: ScoreRequest) -> tuple[Outcome, ...]:
        future: asyncio.Future[tuple[Outcome, ...]] = asyncio.get_running_loop().create_future()
        self._activity += 1
        self._score.append((request, future))
        if not self._deterministic and not self._scoring:
            self._scoring = True
            self._call(self._score_on())
        return await future

    def _call(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _score_on(self) -> None:
        await asyncio.sleep(0)  # let the coroutines woken together ask together
        while self._score:
            pending, self._score = self._score, []
            await self._score_all(pending)
        self._scoring = False

    async def _waves(self) -> None:
        while True:
            await self._settle()
            generate, self._generate = sorted(self._generate, key=lambda p: (p[0].prompt_id, p[0].number)), []
            score, self._score = sorted(self._score, key=lambda p: p[0].prompt.prompt_id), []
            await asyncio.gather(
                *([self._generate_all(generate)] if generate else []), *([self._score_all(score)] if score else [])
            )

    async def _settle(self) -> None:
        """Return when something is pending and no coroutine is still running."""
        idle, seen = 0, self._activity
        while idle < _IDLE_TICKS or not (self._generate or self._score):
            await asyncio.sleep(0)
            idle, seen = (idle + 1, seen) if self._activity == seen else (0, self._activity)

    async def _generate_all(self, pending: list[Pending]) -> None:
        with self.stopwatch("rollout"):
            await _answer(pending, lambda requests: self._rollout.generate(requests, version=self._version))

    async def _score_all(self, pending: list[Pending]) -> None:
        with self.stopwatch("scorer"):
            await _answer(pending, self._scorer.score)


async def _answer(pending: list[Pending], ask: Callable[[list[Any]], Awaitable[list[Any]]]) -> None:
    """Ask once for all, and give each asker its answer, or all of them the error."""
    try:
        answers = await ask([request for request, _ in pending])
    except Exception as error:  # noqa: BLE001  passed on to whoever waits, not swallowed
        for _, future in pending:
            if not future.done():
                future.set_exception(error)
        return
    for (_, future), answer in zip(pending, answers, strict=True):
        if not future.done():
            future.set_result(answer)
