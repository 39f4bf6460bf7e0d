"""Where the explore coroutines of one round meet the engines.

Up to `in_flight` prompts are explored at the same time, each by a coroutine that asks for
generations and scores; the scheduler sends the requests on and wakes the askers. When a prompt is
done, the next one starts.

- Deterministic: requests enter in waves. All coroutines run until each waits; then everything they
  asked for goes in, ordered by (prompt id, request number), and the next wave starts when this one
  is answered. An engine's batches, and with them its floating-point results, then depend on nothing
  but the requests.
- Otherwise: a generation enters the engine at once (the engine batches continuously), and scores go
  in as soon as the last call is back, together with all that gathered meanwhile. Answers are passed
  on at once, and written down several times a second: a killed campaign asks again what it was told
  last.

A coroutine may only wait for the scheduler, never for a clock or a socket: what it does must follow
from what it was told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rayhf.algorithms.context import ExplorationContext
from rayhf.data.chat import Chat
from rayhf.exploration.journal import Journal
from rayhf.roles import Rollout, Scorer
from rayhf.types import (
    Comparison,
    Completion,
    GenerateRequest,
    Group,
    Message,
    Outcome,
    Prompt,
    Sampling,
    ScoreRequest,
    derive_seed,
)

_IDLE_TICKS = 12
"""Event-loop turns without a new request after which every coroutine is taken to be waiting. A
result needs a handful of turns to reach its coroutine through tasks and gathers."""

IN_FLIGHT = 65_536
"""Prompts explored at the same time, where nobody says otherwise."""
_NOTES_S = 0.2
"""Between two writings of what was told meanwhile."""

Pending = tuple[Any, "asyncio.Future[Any]"]


class Stopwatch:
    """Seconds during which at least one call of a kind was under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}

    def start(self, kind: str) -> None:
        count, since = self._open.get(kind, (0, 0.0))
        self._open[kind] = (count + 1, since if count else time.monotonic())

    def stop(self, kind: str) -> None:
        count, since = self._open[kind]
        self._open[kind] = (count - 1, since)
        if count == 1:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - since

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        self.start(kind)
        try:
            yield
        finally:
            self.stop(kind)


class PromptContext:
    """What one prompt's `explore` may ask for."""

    def __init__(
        self, scheduler: RequestScheduler, prompt: Prompt, *, sampling: Sampling, seed: int
    ) -> None:
        self._scheduler, self._prompt, self.sampling, self._seed = scheduler, prompt, sampling, seed
        self._requests = self._judgements = 0

    def derive_seed(self, *parts: int | str) -> int:
        """Randomness of this prompt in this round, by name."""
        return derive_seed(self._seed, self._prompt.prompt_id, *parts)

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of another conversation than the prompt's, generation prompt included."""
        return self._scheduler.chat.render(messages)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` as an answer, end-of-turn token included."""
        return self._scheduler.chat.encode_response(self._prompt.messages, text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a part of a completion."""
        return self._scheduler.chat.text(token_ids)

    def room(self, context: Sequence[int]) -> int:
        """Tokens that the model can still take after `context`; 0 or less: it is too long."""
        return self._scheduler.chat.max_length - len(context)

    async def sample(
        self,
        n: int,
        *,
        context: Sequence[int] | None = None,
        prefix: Sequence[int] = (),
        sampling: Sampling | None = None,
        policy: str = "policy",
    ) -> tuple[Completion, ...]:
        """n continuations by `policy` of the prompt (or of `context`, as `render` gives it)
        followed by `prefix` tokens.

        The limit on tokens is cut to the room that the model has left. ValueError where it has
        none.
        """
        token_ids = (*(self._prompt.token_ids if context is None else context), *prefix)
        drawn, room = sampling or self.sampling, self.room(token_ids)
        if room < 1:
            raise ValueError(
                f"prompt {self._prompt.prompt_id}: {len(token_ids)} tokens leave no room to continue"
            )
        number = self._requests
        self._requests += 1
        return await self._scheduler.generate(
            GenerateRequest(
                prompt_id=self._prompt.prompt_id,
                number=number,
                token_ids=token_ids,
                sampling=drawn if drawn.max_tokens <= room else replace(drawn, max_tokens=room),
                seeds=tuple(self.derive_seed("sample", number, index) for index in range(n)),
                policy=policy,
            )
        )

    async def score(self, completions: Sequence[Completion]) -> tuple[Outcome, ...]:
        """One outcome per completion."""
        return await self._scheduler.score(self._judgement(completions))

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        """The win probabilities among the completions."""
        return await self._scheduler.compare(self._judgement(completions))

    def _judgement(self, completions: Sequence[Completion]) -> ScoreRequest:
        self._judgements += 1
        return ScoreRequest(
            prompt=self._prompt, completions=tuple(completions), number=self._judgements - 1
        )


Explore = Callable[[Prompt, ExplorationContext], Awaitable[Group]]


class RequestScheduler:
    """One round's meeting place. `versions` names, for each policy, the weights that must answer;
    what a `journal` already knows nobody is asked again."""

    def __init__(
        self,
        rollouts: Mapping[str, Rollout],
        scorer: Scorer,
        *,
        chat: Chat,
        versions: Mapping[str, int],
        deterministic: bool,
        journal: Journal | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self._rollouts, self._scorer, self.chat, self._journal = rollouts, scorer, chat, journal
        self._versions, self._deterministic, self._in_flight = (
            dict(versions),
            deterministic,
            in_flight,
        )
        self.stopwatch = Stopwatch()
        self.written = self.read = 0
        """Tokens that were generated, and tokens of the contexts they continue, by sequence; a
        journal's count too."""
        self._waiting: dict[str, list[Pending]] = {"generate": [], "score": [], "compare": []}
        self._calls: set[asyncio.Task[Any]] = set()
        self._judging: set[str] = set()
        self._activity = 0

    async def run(
        self,
        prompts: Sequence[Prompt],
        explore: Explore,
        *,
        sampling: Sampling,
        seed: int,
        done: Callable[[Group], None],
    ) -> list[Group]:
        """Explore every prompt; groups come back in the order of `prompts`, `done` hears of each as
        it finishes.

        Raises the first error of any coroutine or role; the others are cancelled.
        """

        found: list[Group | None] = [None] * len(prompts)
        waiting = iter(enumerate(prompts))

        async def work() -> None:
            for place, prompt in waiting:
                try:
                    group = await explore(
                        prompt, PromptContext(self, prompt, sampling=sampling, seed=seed)
                    )
                    done(group)
                    found[place] = group
                finally:
                    self._activity += 1

        workers = min(self._in_flight, len(prompts))
        tasks = [
            asyncio.create_task(work(), name=f"explorer {number}") for number in range(workers)
        ]
        background = asyncio.create_task(
            self._waves() if self._deterministic else self._notes(), name="request scheduler"
        )
        explorers = asyncio.gather(*tasks)
        try:
            await asyncio.wait((explorers, background), return_when=asyncio.FIRST_COMPLETED)
            if background.done():
                background.result()  # it never ends by itself: this raises
            await explorers
            return [group for group in found if group is not None]
        finally:
            leftovers = [*tasks, *self._calls, background]
            for task in leftovers:
                task.cancel()
            await asyncio.gather(explorers, *leftovers, return_exceptions=True)

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        answer = await self._generate(request)
        self.written += sum(len(completion.token_ids) for completion in answer)
        self.read += len(request.token_ids) * len(answer)
        return answer

    async def _generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        self._activity += 1
        if self._deterministic:
            future: asyncio.Future[tuple[Completion, ...]] = (
                asyncio.get_running_loop().create_future()
            )
            self._waiting["generate"].append((request, future))
            return await future
        journal = self._journal
        answer: tuple[Completion, ...] | None = (
            None if journal is None else journal.recall("generate", request)
        )
        if answer is not None:
            return answer
        asker = asyncio.current_task()
        assert asker is not None
        self._calls.add(asker)
        self.stopwatch.start("rollout")
        try:
            (answer,) = await self._rollouts[request.policy].generate(
                [request], version=self._versions[request.policy]
            )
        finally:
            self.stopwatch.stop("rollout")
            self._calls.discard(asker)
        if journal is not None:
            journal.note("generate", [request], [answer])
        return answer

    async def score(self, request: ScoreRequest) -> tuple[Outcome, ...]:
        answer: tuple[Outcome, ...] = await self._judge("score", request)
        return answer

    async def compare(self, request: ScoreRequest) -> Comparison:
        answer: Comparison = await self._judge("compare", request)
        return answer

    async def _judge(self, kind: str, request: ScoreRequest) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._activity += 1
        self._waiting[kind].append((request, future))
        if not self._deterministic and kind not in self._judging:
            self._judging.add(kind)
            self._call(self._judge_on(kind))
        return await future

    def _call(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def _take(self, kind: str) -> list[Pending]:
        pending, self._waiting[kind] = self._waiting[kind], []
        return pending

    async def _judge_on(self, kind: str) -> None:
        await asyncio.sleep(0)  # let the coroutines woken together ask together
        while pending := self._take(kind):
            await self._answer(kind, pending)
        self._judging.discard(kind)

    async def _notes(self) -> None:
        """Write down what was told, until the round is over; its journal's end writes the rest."""
        while True:
            await asyncio.sleep(_NOTES_S)
            if self._journal is not None:
                self._journal.flush()

    async def _waves(self) -> None:
        while True:
            await self._settle()
            kinds = {kind: self._take(kind) for kind in self._waiting}
            kinds["generate"].sort(key=lambda p: (p[0].prompt_id, p[0].number))
            for kind in ("score", "compare"):
                kinds[kind].sort(key=lambda p: (p[0].prompt.prompt_id, p[0].number))
            await asyncio.gather(
                *(self._answer(kind, pending) for kind, pending in kinds.items() if pending)
            )

    async def _settle(self) -> None:
        """Return when something is pending and no coroutine is still running."""
        idle, seen = 0, self._activity
        while idle < _IDLE_TICKS or not any(self._waiting.values()):
            await asyncio.sleep(0)
            idle, seen = (idle + 1, seen) if self._activity == seen else (0, self._activity)

    async def _answer(self, kind: str, pending: list[Pending]) -> None:
        """From the journal what it knows; the rest is asked for at once, each policy's generations
        of its own engines.

        Whatever goes wrong goes to those who wait: an error that nobody hears would leave them
        waiting for ever.
        """
        try:
            await self._answer_all(kind, pending)
        except Exception as error:  # noqa: BLE001  passed on, not swallowed
            _fail(pending, error)

    async def _answer_all(self, kind: str, pending: list[Pending]) -> None:
        asked = [entry for entry in pending if not self._recalled(kind, entry)]
        if not asked:
            return
        if kind == "generate":
            with self.stopwatch("rollout"):
                by_policy: dict[str, list[Pending]] = {}
                for request, future in asked:
                    by_policy.setdefault(request.policy, []).append((request, future))
                await asyncio.gather(
                    *(
                        self._ask(kind, part, self._writer(policy))
                        for policy, part in by_policy.items()
                    )
                )
            return
        with self.stopwatch("scorer"):
            await self._ask(
                kind, asked, self._scorer.score if kind == "score" else self._scorer.compare
            )

    def _recalled(self, kind: str, entry: Pending) -> bool:
        request, future = entry
        answer = None if self._journal is None else self._journal.recall(kind, request)
        if answer is not None and not future.done():
            future.set_result(answer)
        return answer is not None

    def _writer(self, policy: str) -> Callable[[list[GenerateRequest]], Awaitable[list[Any]]]:
        rollout, version = self._rollouts[policy], self._versions[policy]
        return lambda requests: rollout.generate(requests, version=version)

    async def _ask(
        self, kind: str, pending: list[Pending], ask: Callable[[list[Any]], Awaitable[list[Any]]]
    ) -> None:
        """Ask once for all, note the answers (in a wave: write them down), and give each asker his
        own, or all the error."""
        requests = [request for request, _ in pending]
        try:
            answers = await ask(requests)
            settled = list(zip(pending, answers, strict=True))
            if self._journal is not None:
                learned = None if kind == "generate" else await self._scorer.state_dict()
                note = self._journal.record if self._deterministic else self._journal.note
                note(kind, requests, answers, learned)
        except asyncio.CancelledError:
            for _, future in pending:  # nobody may be left waiting for a call that is gone
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001  passed on to whoever waits, not swallowed
            _fail(pending, error)
            return
        for (_, future), answer in settled:
            if not future.done():
                future.set_result(answer)


def _fail(pending: Sequence[Pending], error: Exception) -> None:
    for _, future in pending:
        if not future.done():
            future.set_exception(error)
