"""The environment `verifiers`: an environment of Prime Intellect's package of that name.

In: rows of its data set. Out: its messages, and its rubric's reward at the end of the episode.
Environments of the classic interface: `load_environment`, MultiTurnEnv, ToolEnv and so on, which
verifiers has before 0.4.

Such an environment runs a whole rollout itself and asks a client for the model's turns. Here the
client waits for the policy's message, and what it was asked with is the environment's answer: the
rollout's own loop, stop conditions and rubric stay in charge.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

from pydantic import Field, JsonValue

from rayhf.config.environments import EnvironmentConfig
from rayhf.environments.tool_calls import ToolCall, tool_calls
from rayhf.episodes import StepResult
from rayhf.types import Message

_failures: ContextVar[list[str] | None] = ContextVar("_failures", default=None)
"""What the rubric could not compute in a rollout; each rollout is a task with its own list."""


class VerifiersConfig(EnvironmentConfig):
    """Which environment."""

    type: str = "verifiers"
    id: str
    """The environment's name, as verifiers.load_environment takes it; its package is installed."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of its load_environment."""


class Verifiers:
    """An environment of the package `verifiers`, before its version 0.4."""

    Config = VerifiersConfig

    def __init__(self, config: VerifiersConfig) -> None:
        self._environment = _load(config)
        self._turns_left = config.max_turns
        self._prompts: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._responses: asyncio.Queue[Message] = asyncio.Queue()
        self._known: list[Message] = []
        """The conversation up to the policy's last message."""
        self._failures: list[str] = []
        self._rollout: asyncio.Task[Any] | None = None

    @classmethod
    def prepare(cls, config: VerifiersConfig) -> None:
        """Load the environment. Raises what its package raises."""
        _load(config)

    @classmethod
    def tools(cls, config: VerifiersConfig) -> list[dict[str, Any]]:
        """Return the JSON schemas of the environment's tools."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in _load(config).tool_defs or ()
        ]

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> Sequence[Message] | None:
        """Start a rollout of the row; return the messages that it begins with."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        given = {name: value for name, value in row.items() if value is not None}
        _failures.set(self._failures)
        self._rollout = asyncio.create_task(
            self._environment.run_rollout(
                {"example_id": 0, "answer": "", **given, "prompt": prompt},
                client=_client(self),
                model="policy",
                sampling_args={},
            )
        )
        messages = await self._next_prompt()
        if messages is None:
            self._output()
            raise ValueError("the rollout ended before its first turn")
        self._known = messages
        return None if messages == [_plain(message) for message in prompt] else messages

    async def step(self, message: Message) -> StepResult:
        """Give the rollout the policy's message; return what it asks with next, or its score."""
        self._responses.put_nowait(message)
        self._turns_left -= 1
        messages = await self._next_prompt()
        if messages is None:
            output = self._output()
            return StepResult(
                reward=float(output["reward"]),
                done=True,
                metrics={name: float(value) for name, value in output["metrics"].items()},
            )
        if self._turns_left == 0:
            raise ValueError("the environment goes on after max_turns, and has no reward yet")
        known = len(self._known)
        if len(messages) < known + 2 or messages[:known] != self._known:
            raise ValueError(
                "the environment changed earlier messages; expected one that only adds some"
            )
        self._known = messages
        return StepResult(messages=messages[known + 1 :])

    async def close(self) -> None:
        """End the rollout, and wait for its cleanup."""
        if self._rollout is not None:
            self._rollout.cancel()
            await asyncio.wait([self._rollout])

    async def _next_prompt(self) -> list[Message] | None:
        """Return the messages that the next turn answers; None where the rollout is over."""
        assert self._rollout is not None
        prompt = asyncio.create_task(self._prompts.get())
        try:
            await asyncio.wait({prompt, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
            return prompt.result() if prompt.done() else None
        finally:
            prompt.cancel()

    def _output(self) -> Any:
        """Return the result of the rollout. Raises ValueError where it ended with an error."""
        assert self._rollout is not None
        output = self._rollout.result()
        if output.get("error"):
            raise ValueError(f"the rollout failed: {output['error']}")
        if self._failures:
            raise ValueError(f"the rubric failed: {self._failures[0]}")
        return output

    async def respond(self, prompt: Sequence[Any], tools: Sequence[Any] | None) -> Any:
        """Return the policy's answer to `prompt`, as a Response of verifiers."""
        self._prompts.put_nowait([_plain(message.model_dump()) for message in prompt])
        message = await self._responses.get()
        return _response(str(message["content"]), calls=bool(tools))


class _RubricErrors(logging.Handler):
    """Collects errors that rubrics only log: a reward function that raises counts as 0 there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Note an error, for the rollout in whose task it was logged."""
        failures = _failures.get()
        if failures is not None and ".rubrics." in record.name:
            failures.append(record.getMessage())


def _load(config: VerifiersConfig) -> Any:
    """Load an environment; its episodes share it. Raises ImportError, ValueError."""
    return _load_once(config.id, json.dumps(config.args), config.max_turns)


@cache
def _load_once(name: str, arguments: str, max_turns: int) -> Any:
    try:
        from verifiers.utils.env_utils import load_environment
    except ModuleNotFoundError as error:
        if error.name not in ("verifiers", "verifiers.utils"):
            raise
        problem = "is not installed for" if error.name == "verifiers" else "is too new in"
        raise ImportError(
            f"verifiers {problem} {sys.executable}; expected a version before 0.4 there (the key "
            "`python` names another interpreter)"
        ) from None
    environment = load_environment(name, **json.loads(arguments))
    if environment.rubric.has_group_rewards:
        raise ValueError(
            f"the rubric of {name} compares the rollouts of a group; expected one that scores each "
            "rollout by itself"
        )
    # The rollout ends, and is scored, where the episode would.
    limit = getattr(environment, "max_turns", -1)
    environment.max_turns = max_turns if limit < 1 else min(limit, max_turns)
    # It would count the time in which the policy generates; rayhf's timeout_s does not.
    environment.timeout_seconds = None
    logging.getLogger("verifiers").addHandler(_RubricErrors(logging.ERROR))
    return environment


def _client(episode: Verifiers) -> Any:
    """Return a client of verifiers that asks `episode` for turns."""
    from verifiers.clients import Client

    async def get_response(
        self: Any, prompt: Sequence[Any], *args: Any, tools: Any = None, **kwargs: Any
    ) -> Any:
        return await episode.respond(prompt, tools)

    async def unused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    methods = dict.fromkeys(Client.__abstractmethods__, unused)
    return type("PolicyClient", (Client,), {**methods, "get_response": get_response})(None)


def _response(text: str, *, calls: bool) -> Any:
    """Return a message as what verifiers' clients return; with `calls`, read the calls in it."""
    from verifiers.types import Response, ResponseMessage

    found = [_native_call(call, n) for n, call in enumerate(tool_calls(text))] if calls else []
    return Response(
        id="",
        created=0,
        model="policy",
        message=ResponseMessage(
            content=text.partition("<tool_call>")[0] if found else text,
            tool_calls=found or None,
            finish_reason="tool_calls" if found else "stop",
            is_truncated=False,
        ),
    )


def _native_call(call: ToolCall | str, number: int) -> Any:
    """Return a call of verifiers; one that cannot be read has a text that is not JSON."""
    from verifiers.types import ToolCall as NativeCall

    if isinstance(call, str):
        return NativeCall(id=f"call_{number}", name="", arguments=f"not JSON: {call}")
    return NativeCall(
        id=f"call_{number}", name=call.name, arguments=json.dumps(dict(call.arguments))
    )


def _plain(message: Mapping[str, Any]) -> Message:
    """Return a message with a text as its content. Raises ValueError for images and audio."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("the environment shows something else than text; expected text only")
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}
