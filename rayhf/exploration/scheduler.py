"""The request scheduler: explores many prompts at once and batches their requests.

In: prompts and an algorithm's `explore`. Out: one Group per prompt. Up to `in_flight` prompts are
explored at a time, each by a coroutine that awaits generations and scores; when one is finished,
the next prompt starts. WaveScheduler (waves.py) makes batches depend on nothing but the requests;
EagerScheduler (eager.py) sends requests as early as it can.

Synchronization: a coroutine waits for its own responses only. It must not wait for a clock or a
socket: what it does must follow from the responses.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

from rayhf.algorithms.context import ExplorationContext
from rayhf.config.environments import EnvironmentConfig, environment_of
from rayhf.data.chat import Chat
from rayhf.data.replies import ReplyRenderer
from rayhf.episodes import StepRequest
from rayhf.exploration.codecs import COMPARE, GENERATE, SCORE, Codec, RequestT, ResponseT
from rayhf.exploration.episodes import Answer, EpisodePlayer
from rayhf.exploration.journal import Journal
from rayhf.exploration.replay import ReplayPlayer
from rayhf.roles import Environments, Rollout, Scorer
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
    TokenIds,
    derive_seed,
)

IN_FLIGHT = 65_536
"""Default number of prompts that are explored at the same time."""

Result = TypeVar("Result")
PlayerT = TypeVar("PlayerT", bound=EpisodePlayer)
Explore = Callable[[Prompt, ExplorationContext], Awaitable[Group]]


class Stopwatch:
    """Seconds during which at least one call under a name was in progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: dict[str, tuple[int, float]] = {}
        """By name: number of calls in progress, and since when there has been one."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the body as a call under `name`."""
        count, since = self._running.get(name, (0, 0.0))
        self._running[name] = (count + 1, since if count else time.monotonic())
        try:
            yield
        finally:
            count, since = self._running[name]
            self._running[name] = (count - 1, since)
            if count == 1:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - since


class PromptContext:
    """The ExplorationContext of one prompt: numbers its requests and derives their seeds."""

    def __init__(
        self, scheduler: RequestScheduler, prompt: Prompt, *, sampling: Sampling, seed: int
    ) -> None:
        self.sampling = sampling
        self._scheduler = scheduler
        self._prompt = prompt
        self._seed = seed
        self._generations = 0
        self._scorings = 0

    def derive_seed(self, *parts: int | str) -> int:
        """Return a seed that depends on the iteration's seed, the prompt and `parts` only."""
        return derive_seed(self._seed, self._prompt.prompt_id, *parts)

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of another conversation, generation prompt included."""
        return self._scheduler.chat.render(messages)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of `text` as a completion, end-of-turn token included."""
        return self._scheduler.chat.encode_generated(self._prompt.messages, text)

    def decode(self, token_ids: TokenIds) -> str:
        """Return the text of a part of a completion."""
        return self._scheduler.chat.text(list(map(int, token_ids)))

    def room(self, context: TokenIds) -> int:
        """Return how many tokens fit after `context`; 0 or less: none."""
        return self._scheduler.chat.max_length - len(context)

    async def sample(
        self,
        n: int,
        *,
        context: TokenIds | None = None,
        prefix: TokenIds = (),
        sampling: Sampling | None = None,
        policy: str = "policy",
    ) -> tuple[Completion, ...]:
        """Draw n continuations of the prompt (or of `context`) followed by `prefix` tokens.

        Of a prompt that an environment serves, n episodes; of a given context or prefix, plain
        continuations. max_tokens is reduced to what fits into the model. Raises ValueError where
        nothing fits.
        """
        environment = self._scheduler.environment_of(self._prompt)
        if environment is not None and context is None and not prefix:
            sampling = sampling or self.sampling
            return await self._player(EpisodePlayer, n, environment, sampling, policy).play(n)
        before = self._prompt.token_ids if context is None else map(int, context)
        token_ids = (*before, *map(int, prefix))
        sampling = sampling or self.sampling
        room = self.room(token_ids)
        if room < 1:
            raise ValueError(
                f"prompt {self._prompt.prompt_id}: {len(token_ids)} tokens leave no room "
                "to continue"
            )
        if sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room)
        number = self._generations
        self._generations += 1
        return await self._scheduler.generate(
            GenerateRequest(
                prompt_id=self._prompt.prompt_id,
                number=number,
                token_ids=token_ids,
                sampling=sampling,
                seeds=tuple(self.derive_seed("sample", number, index) for index in range(n)),
                policy=policy,
            )
        )

    @property
    def has_environment(self) -> bool:
        """Whether an environment serves the prompt."""
        return self._scheduler.environment_of(self._prompt) is not None

    async def play_on(
        self, n: int, path: Sequence[Completion] = ()
    ) -> list[tuple[Completion, ...]]:
        """Play n episodes that begin with the turns of `path`, and return the turns that follow.

        Raises ValueError where no environment serves the prompt.
        """
        environment = self._scheduler.environment_of(self._prompt)
        if environment is None:
            raise ValueError(f"prompt {self._prompt.prompt_id}: no environment serves it")
        player = self._player(ReplayPlayer, n, environment, self.sampling, "policy")
        return await player.play_on(n, path, seed=self.derive_seed("environment"))

    def _player(
        self,
        player: type[PlayerT],
        n: int,
        environment: EnvironmentConfig,
        sampling: Sampling,
        policy: str,
    ) -> PlayerT:
        """Return a player of n episodes, with numbers for all their requests."""
        number = self._generations
        self._generations += n * (environment.max_turns + 1)
        return player(
            self._scheduler,
            self._prompt,
            environment,
            sampling=sampling,
            policy=policy,
            derive_seed=self.derive_seed,
            number=number,
        )

    async def score(
        self, completions: Sequence[Completion], *, prompt: Prompt | None = None
    ) -> tuple[Outcome, ...]:
        """Return one outcome per completion of the prompt, or of another `prompt`."""
        return await self._scheduler.score(self._score_request(completions, prompt))

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        """Return the win probabilities among the completions."""
        return await self._scheduler.compare(self._score_request(completions))

    def _score_request(
        self, completions: Sequence[Completion], prompt: Prompt | None = None
    ) -> ScoreRequest:
        number = self._scorings
        self._scorings += 1
        return ScoreRequest(
            prompt=prompt or self._prompt, completions=tuple(completions), number=number
        )


@dataclass(slots=True)
class Pending(Generic[RequestT, ResponseT]):
    """A request, and the future that its coroutine awaits."""

    request: RequestT
    response: asyncio.Future[ResponseT]


class RequestQueue(Generic[RequestT, ResponseT]):
    """Requests that one engine pool or scorer can take in one call, and how to send them."""

    def __init__(
        self,
        codec: Codec[RequestT, ResponseT] | None,
        call: Callable[[list[RequestT]], Awaitable[list[ResponseT]]],
        *,
        timer: str,
        scorer: Scorer | None = None,
    ) -> None:
        """Make an empty queue.

        Args:
            codec: how the journal stores the responses; None: it does not, and the requests of an
                interrupted iteration are made again.
            call: the role's method.
            timer: name on the stopwatch.
            scorer: the scorer, whose state the journal keeps with its responses; None for engines.
        """
        self.codec = codec
        self.call = call
        self.timer = timer
        self.scorer = scorer
        self.pending: list[Pending[RequestT, ResponseT]] = []

    @property
    def is_continuous(self) -> bool:
        """Whether the role batches requests by itself, as engines do."""
        return self.scorer is None

    def put(self, request: RequestT) -> asyncio.Future[ResponseT]:
        """Queue a request; the future gets the response."""
        response: asyncio.Future[ResponseT] = asyncio.get_running_loop().create_future()
        self.pending.append(Pending(request, response))
        return response

    def take(self) -> list[Pending[RequestT, ResponseT]]:
        """Empty the queue."""
        pending = self.pending
        self.pending = []
        return pending


class RequestScheduler(ABC):
    """Sends the requests of one iteration, except those that the journal can answer."""

    writes_through: ClassVar[bool]
    """Whether responses are in the journal's file before a coroutine gets them."""

    def __init__(
        self,
        rollouts: Mapping[str, Rollout],
        scorer: Scorer,
        *,
        chat: Chat,
        versions: Mapping[str, int],
        journal: Journal | None = None,
        in_flight: int = IN_FLIGHT,
        score_calls: int = 1,
        environments: Environments | None = None,
        environment_configs: tuple[EnvironmentConfig, ...] = (),
    ) -> None:
        """Connect to the roles.

        Args:
            rollouts: by policy.
            scorer: scores and compares completions.
            chat: the policy's chat template.
            versions: by policy, the weight version that must generate; with in-flight updates the
                oldest that may.
            journal: responses of an earlier attempt at this iteration; gets the new ones.
            in_flight: maximum number of prompts explored at the same time.
            score_calls: maximum number of calls of the scorer in flight.
            environments: answer in episodes.
            environment_configs: their settings.
        """
        self.chat = chat
        self.versions = versions
        self.replies = ReplyRenderer(chat)
        self.stopwatch = Stopwatch()
        self.generated_tokens = 0
        """Tokens that were generated, also by an earlier attempt."""
        self.prompt_tokens = 0
        """Tokens of the contexts they continue, once per completion."""
        self._journal = journal
        self._in_flight = in_flight
        self._score_calls = score_calls
        self._generate = {
            policy: RequestQueue(GENERATE, _generator(rollout, versions[policy]), timer="rollout")
            for policy, rollout in rollouts.items()
        }
        self._score = RequestQueue(SCORE, scorer.score, timer="scorer", scorer=scorer)
        self._compare = RequestQueue(COMPARE, scorer.compare, timer="scorer", scorer=scorer)
        self._environments = environment_configs if environments is not None else ()
        self._step: RequestQueue[StepRequest, Answer] = RequestQueue(
            None, environments.step if environments else _no_steps, timer="environment"
        )

    async def run(
        self,
        prompts: Sequence[Prompt],
        explore: Explore,
        *,
        sampling: Sampling,
        seed: int,
        done: Callable[[Group], None],
    ) -> list[Group]:
        """Explore every prompt; groups are in the order of `prompts`.

        `done` is called with each group as it finishes. Raises the first error of any coroutine or
        role; the other coroutines are canceled.
        """
        groups: dict[int, Group] = {}
        remaining = iter(enumerate(prompts))

        async def work() -> None:
            for index, prompt in remaining:
                context = PromptContext(self, prompt, sampling=sampling, seed=seed)
                group = await explore(prompt, context)
                done(group)
                groups[index] = group

        await self._run([work() for _ in range(min(self._in_flight, len(prompts)))])
        return [groups[index] for index in range(len(prompts))]

    @abstractmethod
    async def _run(self, workers: Sequence[Coroutine[object, object, None]]) -> None:
        """Run the workers to the end; raises the first error and cancels what is left."""

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """Return one completion per seed of the request."""
        completions = await self._request(self._generate[request.policy], request)
        self.generated_tokens += sum(len(completion.token_ids) for completion in completions)
        self.prompt_tokens += len(request.token_ids) * len(completions)
        return completions

    async def score(self, request: ScoreRequest) -> tuple[Outcome, ...]:
        """Return one outcome per completion of the request."""
        return await self._request(self._score, request)

    async def compare(self, request: ScoreRequest) -> Comparison:
        """Return the win probabilities among the request's completions."""
        return await self._request(self._compare, request)

    async def step(self, request: StepRequest) -> Answer:
        """Return an environment's answer."""
        return await self._request(self._step, request)

    def environment_of(self, prompt: Prompt) -> EnvironmentConfig | None:
        """Return the environment that serves a prompt; None where there is none."""
        return environment_of(self._environments, prompt.source)

    @abstractmethod
    async def _request(
        self, queue: RequestQueue[RequestT, ResponseT], request: RequestT
    ) -> ResponseT:
        """Send a request now or later, and return its response."""

    async def _send(
        self,
        queue: RequestQueue[RequestT, ResponseT],
        pending: Sequence[Pending[RequestT, ResponseT]],
    ) -> None:
        """Answer requests: from the journal where it can, all others by one call.

        An error goes to the coroutines, which would otherwise wait forever.
        """
        try:
            unanswered = [each for each in pending if not self._recall(queue, each)]
            if unanswered:
                with self.stopwatch(queue.timer):
                    await self._call(queue, unanswered)
        except asyncio.CancelledError:
            for each in pending:
                each.response.cancel()
            raise
        except Exception as error:  # noqa: BLE001  passed on, not swallowed
            for each in pending:
                if not each.response.done():
                    each.response.set_exception(error)

    def _recall(
        self, queue: RequestQueue[RequestT, ResponseT], pending: Pending[RequestT, ResponseT]
    ) -> bool:
        if self._journal is None or queue.codec is None:
            return False
        response = self._journal.recall(queue.codec, pending.request)
        if response is None:
            return False
        if not pending.response.done():
            pending.response.set_result(response)
        return True

    async def _call(
        self,
        queue: RequestQueue[RequestT, ResponseT],
        pending: Sequence[Pending[RequestT, ResponseT]],
    ) -> None:
        """Make one call, put its responses into the journal, and pass them on."""
        requests = [each.request for each in pending]
        responses = await queue.call(requests)
        answered = list(zip(pending, responses, strict=True))
        if self._journal is not None and queue.codec is not None:
            state = None if queue.scorer is None else await queue.scorer.state_dict()
            self._journal.add(queue.codec, requests, responses, state)
            if self.writes_through:
                await self._journal.flush_beside()
        for each, response in answered:
            if not each.response.done():
                each.response.set_result(response)


async def run_beside(
    work: asyncio.Future[Result], service: Coroutine[object, object, None]
) -> None:
    """Await the future `work` while `service` runs; raises the first error of either."""
    task = asyncio.create_task(service, name="request scheduler")
    try:
        await asyncio.wait((work, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        await work
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _no_steps(requests: Sequence[StepRequest]) -> list[Answer]:
    raise AssertionError("there is no environment")


def _generator(
    rollout: Rollout, version: int
) -> Callable[[list[GenerateRequest]], Awaitable[list[tuple[Completion, ...]]]]:
    """Return a call of one policy's engines at one weight version."""
    return lambda requests: rollout.generate(requests, version=version)
