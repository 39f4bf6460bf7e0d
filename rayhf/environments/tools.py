"""The environment `tools`: Python functions that the policy may call.

In: the policy's message. Out: a message of role `tool` per call in it; a message without a call is
the answer, which scorers judge. What a function raises, an unknown name, arguments that cannot be
read and a call that takes too long are messages to the policy, and counted.

Each call runs in a process that is forked for it and ended after it: it can loop, crash or exit
without harm to other episodes, and keeps nothing for the next call.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from rayhf.config.environments import EnvironmentConfig
from rayhf.environments.tool_calls import ToolCall, tool_calls
from rayhf.episodes import StepResult
from rayhf.scorer.rule_config import check_function
from rayhf.types import Message

_RESULT_BYTES = 1 << 16
"""Limit on a function's result; the rest is cut."""


class ToolsConfig(EnvironmentConfig):
    """Which functions, and how long they may take."""

    rewards: ClassVar[bool] = False
    reply_roles: ClassVar[tuple[str, ...]] = ("tool",)

    type: str = "tools"
    tools: Annotated[
        tuple[Annotated[str, AfterValidator(check_function)], ...], Field(min_length=1)
    ]
    """Functions `module:function`, with type hints and a docstring in Google's style: name,
    parameters and docstring are what the chat template tells the policy."""
    tool_timeout_s: PositiveFloat = 10.0
    """Limit on one call, in seconds."""
    max_calls: PositiveInt = 8
    """Maximum number of calls in one message; the rest is answered with an error."""
    concurrency: PositiveInt = 16
    """Calls in progress at the same time, in each process."""


class Tools:
    """Python functions that the policy calls in Hermes' and Qwen's format."""

    Config = ToolsConfig

    def __init__(self, config: ToolsConfig) -> None:
        self._config = config
        self._functions = _load(config.tools)

    @classmethod
    def tools(cls, config: ToolsConfig) -> list[dict[str, Any]]:
        """Return the functions' JSON schemas. Raises where a function cannot be described."""
        from transformers.utils import get_json_schema

        return [get_json_schema(function) for function in _load(config.tools).values()]

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> None:
        """Keep the prompt as it is."""

    async def step(self, message: Message) -> StepResult:
        """Run the calls in the message."""
        calls = tool_calls(message["content"])
        if not calls:
            return StepResult(done=True)
        limit = self._config.max_calls
        running = [self._run(call) for call in calls[:limit]]
        results: Sequence[tuple[bool, str]] = await asyncio.gather(*running)
        excess = len(calls) - limit
        if excess > 0:
            refused = f"{excess} more calls were not made; expected at most {limit}"
            results = [*results, (False, refused)]
        return StepResult(
            messages=[
                {"role": "tool", "content": text if fine else f"Error: {text}"}
                for fine, text in results
            ],
            metrics={
                "tool_calls": float(len(calls)),
                "tool_errors": float(sum(not fine for fine, _ in results)),
            },
        )

    async def _run(self, call: ToolCall | str) -> tuple[bool, str]:
        """Return whether a call has a result, and the result or the error."""
        if isinstance(call, str):
            return False, call
        function = self._functions.get(call.name)
        if function is None:
            return False, f"there is no tool {call.name!r}; there are {', '.join(self._functions)}"
        async with _slots(self._config.concurrency):
            return await call_apart(function, call.arguments, self._config.tool_timeout_s)


@cache
def _load(names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    functions = {}
    for name in names:
        module, _, attribute = name.partition(":")
        functions[attribute] = getattr(import_module(module), attribute)
    return functions


@cache
def _slots(concurrency: int) -> asyncio.Semaphore:
    return asyncio.Semaphore(concurrency)


async def call_apart(
    function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float
) -> tuple[bool, str]:
    """Call a function in a forked process; return whether it returned, and its result or error."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        _answer(function, arguments, write_fd)
    os.close(write_fd)
    try:
        data = await asyncio.wait_for(_read(read_fd), timeout_s)
    except TimeoutError:
        return False, f"no result within {timeout_s:g} s"
    finally:
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not data:
        return False, "the function's process exited"
    return data[:1] == b"+", data[1:].decode("utf-8", "replace")


async def _read(fd: int) -> bytes:
    """Read to the end, or to the limit."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader),
        open(fd, "rb", buffering=0),  # noqa: SIM115
    )
    data = b""
    try:
        while len(data) < _RESULT_BYTES and (piece := await reader.read(_RESULT_BYTES)):
            data += piece
    finally:
        transport.close()
    return data[:_RESULT_BYTES]


def _answer(function: Callable[..., Any], arguments: Mapping[str, Any], fd: int) -> NoReturn:
    """Write the result, in the forked process, which ends here."""
    try:
        os.setpgid(0, 0)
        try:
            value = function(**arguments)
            if asyncio.iscoroutine(value):
                value = asyncio.run(value)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            data = b"+" + text.encode("utf-8", "replace")
        except BaseException as error:  # noqa: BLE001 - foreign code may raise anything
            data = b"-" + f"{type(error).__name__}: {error}".encode("utf-8", "replace")
        view = memoryview(data[:_RESULT_BYTES])
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os._exit(0)
