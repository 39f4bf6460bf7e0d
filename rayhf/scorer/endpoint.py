"""A language model behind an OpenAI-compatible HTTP server: vLLM, SGLang, or a hosted one.

In: questions, from any number of threads. Out: their replies, or why there are none: Failed,
`transient` where the server was down, too slow or too busy, so that rayhf/scorer/retrying.py waits
for it. A format that the server refuses is left out from then on. The key is read from the
environment and appears in no message.

Synchronization: one event loop in a thread of its own sends all requests, at most `concurrency` at
a time; a caller waits for the replies to its questions.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from rayhf.scorer.comparisons import Problem
from rayhf.scorer.endpoint_config import (
    EndpointConfig,
    client_options,
    complete_body,
    describe,
    read_key,
    response_format,
    token_escaper,
)
from rayhf.scorer.judge_votes import Question, Reply
from rayhf.types import Failed, Invalid

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 16.0
_OUTAGE = 8
"""Failures in a row (or `concurrency`, if that is more) that mean that the server is down."""
_FORMAT_REFUSED = (400, 422)
"""Status codes with which servers refuse a parameter they do not know."""


class MalformedError(Exception):
    """A response that is not what the protocol says."""


class EndpointModel:
    """A served model. Raises ConfigError where its key is missing.

    Args:
        config: the server and its model.
        temperature: of every request.
        max_tokens: limit on a reply, in tokens.
    """

    def __init__(self, config: EndpointConfig, *, temperature: float, max_tokens: int) -> None:
        import openai

        self.config = config
        self._body = {"temperature": temperature, "max_tokens": max_tokens}
        self._key = read_key(config)
        self._client = openai.AsyncOpenAI(**client_options(config, self._key))
        self._escape = token_escaper(config)
        self._structured = config.structured != "off"
        self._slots = asyncio.Semaphore(config.concurrency)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def answer(self, questions: Sequence[Question]) -> list[tuple[Reply, ...] | Problem]:
        """Return one reply per seed of each question, or why one of them is missing."""
        return asyncio.run_coroutine_threadsafe(self._answer(questions), self._loop).result()

    def take_counts(self) -> dict[str, float]:
        """Return requests and tokens since the last call."""
        with self._lock:
            counts = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens"), 0)
            counts |= self._counts
            self._counts.clear()
        taken: dict[str, float] = {name: float(count) for name, count in counts.items()}
        if (price := self.config.price) is not None:
            taken["cost"] = (
                price.input * taken["prompt_tokens"] + price.output * taken["completion_tokens"]
            ) / 1e6
        return taken

    def close(self) -> None:
        """Drop the requests in flight and close the connections."""
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shutdown(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _answer(self, questions: Sequence[Question]) -> list[tuple[Reply, ...] | Problem]:
        outage = _Outage(limit=max(_OUTAGE, self.config.concurrency))
        replies = await asyncio.gather(
            *(
                self._ask(question, seed, outage)
                for question in questions
                for seed in question.seeds
            )
        )
        remaining = iter(replies)
        return [_join([next(remaining) for _ in question.seeds]) for question in questions]

    async def _ask(self, question: Question, seed: int, outage: _Outage) -> Reply | Problem:
        async with self._slots:
            if outage.reason is not None:
                return Failed(reason=outage.reason, transient=True)
            result = await self._ask_in_time(question, seed)
        outage.count(result)
        return result

    async def _ask_in_time(self, question: Question, seed: int) -> Reply | Problem:
        """Return the reply, after retries, or why there is none within the deadline."""
        import openai
        from tenacity import AsyncRetrying, retry_if_exception

        errors: list[BaseException] = []
        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_recover),
            stop=lambda state: (
                not _is_busy(_error(state)) and state.attempt_number > self.config.retries
            ),
            wait=_wait_s,
            before_sleep=lambda state: self._note_retry(state, errors),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await retrying(self._send, question, seed)
        except TimeoutError:
            last = f"; before: {self._reason(errors[-1])}" if errors else ""
            reason = f"no response within {self.config.timeout_s:g} s{last}"
            return Failed(reason=f"{self.config.url}: {reason}", transient=True)
        except (openai.OpenAIError, MalformedError) as error:
            return Failed(
                reason=f"{self.config.url}: {self._reason(error)}", transient=_may_recover(error)
            )

    async def _send(self, question: Question, seed: int) -> Reply:
        """Send one request; without the schema, too, where the server refuses that."""
        import openai

        schema = question.schema if self._structured else None
        try:
            return await self._post(question, seed, schema)
        except openai.APIStatusError as error:
            optional = self.config.structured == "auto" and schema is not None
            if not (optional and error.status_code in _FORMAT_REFUSED):
                raise
            # Only where the same request without it succeeds is the schema to blame.
            reply = await self._post(question, seed, None)
            if self._structured:
                self._structured = False
                logger.warning(
                    "%s refuses a JSON schema (%s); verdicts are read from text instead",
                    self.config.url,
                    self._reason(error),
                )
            return reply

    async def _post(
        self, question: Question, seed: int, schema: Mapping[str, JsonValue] | None
    ) -> Reply:
        import openai

        body: dict[str, Any] = {**self._body, "seed": seed % 2**31}
        if schema is not None:
            body["response_format"] = response_format(schema)
        if question.needs_probabilities:
            body |= {"logprobs": True, "top_logprobs": 20}
        self._count(requests=1)
        try:
            completion = await self._client.chat.completions.create(
                model=self.config.model,
                messages=[{"role": "user", "content": self._escape(question.text)}],
                extra_body=complete_body(body, self.config),
            )
        except openai.APIStatusError as error:
            if not _may_recover(error):
                self._count(refused=1)
            raise
        except ValueError as error:
            raise MalformedError(f"a response that is no JSON ({error})") from error
        reply = read_completion(completion)
        if (usage := completion.usage) is not None:
            self._count(
                prompt_tokens=usage.prompt_tokens or 0,
                completion_tokens=usage.completion_tokens or 0,
            )
        return reply

    def _note_retry(self, state: RetryCallState, errors: list[BaseException]) -> None:
        if (error := _error(state)) is not None:
            errors.append(error)
        self._count(retries=1)

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def _reason(self, error: BaseException) -> str:
        return describe(error, self._key)


class _Outage:
    """Whether a server is down, as one call sees it: then its other questions are not sent."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._failures = 0
        self.reason: str | None = None

    def count(self, result: Reply | Problem) -> None:
        """Count failures in a row."""
        if isinstance(result, Failed) and result.transient:
            self._failures += 1
            if self._failures >= self._limit:
                self.reason = result.reason
        else:
            self._failures = 0


def _may_recover(error: BaseException) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | MalformedError)


def _is_busy(error: BaseException | None) -> bool:
    import openai

    return isinstance(error, openai.RateLimitError)


def _error(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _wait_s(state: RetryCallState) -> float:
    """Return what the server asks for (Retry-After), or a random wait whose limit doubles."""
    import openai
    from tenacity import wait_random_exponential

    error = _error(state)
    if isinstance(error, openai.APIStatusError):
        requested = _retry_after_s(error.response.headers)
        if requested is not None:
            return requested
    return wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_MAX_WAIT_S)(state)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date); None without one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def read_completion(completion: ChatCompletion) -> Reply:
    """Return the first choice. Raises MalformedError where there is none.

    The client does not check a response: it may be a string, or lack fields.
    """
    from openai.types.chat import ChatCompletion

    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise MalformedError("a response that is no chat completion; is `url` the server's /v1?")
    choice = completion.choices[0]
    if choice.message is None:
        raise MalformedError("a chat completion without a message")
    return Reply(
        text=choice.message.content or "",
        is_complete=choice.finish_reason != "length",
        probabilities=_first_token(choice.logprobs),
    )


def _first_token(logprobs: Any) -> dict[str, float] | None:
    """Return probabilities by token text, added up over tokens that read the same."""
    content = getattr(logprobs, "content", None)
    if not content or not content[0].top_logprobs:
        return None
    probabilities: dict[str, float] = {}
    for candidate in content[0].top_logprobs:
        text = candidate.token.strip().casefold()
        probabilities[text] = probabilities.get(text, 0.0) + math.exp(candidate.logprob)
    return probabilities


def _join(replies: Sequence[Reply | Problem]) -> tuple[Reply, ...] | Problem:
    """Return all replies to a question, or the first problem."""
    for reply in replies:
        if isinstance(reply, Invalid | Failed):
            return reply
    return tuple(reply for reply in replies if isinstance(reply, Reply))
