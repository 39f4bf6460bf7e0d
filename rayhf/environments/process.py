"""The parent's side of environments: their processes, and the requests that these answer.

In: StepRequests. Out: what the environments answered, checked: an environment is not trusted.

An episode stays in one process of its environment (child.py); episodes of a process run
concurrently. Limits and namespaces are those of a rule's process.

Synchronization: everything runs in the event loop that made the requests. A process that answers
none of its requests for the time limit is ended; the episodes in it have failed, and the next
request starts another one.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

from rayhf.config.environments import EnvironmentConfig
from rayhf.config.registry import ENVIRONMENTS
from rayhf.episodes import StepRequest, StepResult
from rayhf.errors import ConfigError, clean_line
from rayhf.scorer.rule_process import Child
from rayhf.scorer.rule_reply import LostError, read_line
from rayhf.types import Failed, Invalid

_GRACE_S = 2.0
"""The process ends a late step itself; the parent waits so much longer."""
_REPLY_BYTES = 1 << 22
"""Limit on one answer."""
_MESSAGES = 64
"""Limit on the messages of one answer."""

Answer = StepResult | Invalid | Failed


class EnvironmentChild(Child):
    """The parent's end of one child.py process.

    Raises ConfigError unless the class can be imported. With `describe` it has the functions that
    prompts are rendered with.
    """

    script: ClassVar[Path] = Path(__file__).with_name("child.py")
    subject: ClassVar[str] = "environment"

    def __init__(self, config: EnvironmentConfig, *, base: Path, describe: bool = False) -> None:
        cls = ENVIRONMENTS.resolve(config.type)
        base = base.resolve()
        if config.python is not None:
            self.python = str(base / config.python)
        load = {
            "module": cls.__module__,
            "class": cls.__qualname__,
            "config": config.model_dump(mode="json"),
            "describe": describe,
            "timeout_s": config.timeout_s,
            "network": config.network,
        }
        try:
            ready = self._greet(base, load, config.import_timeout_s)
        except LostError as lost:
            raise ConfigError(
                f"environment {config.resolved_name}: {config.type} could not be imported from "
                f"{base}: {lost} (import_timeout_s is the limit)"
            ) from None
        except OSError as error:
            if config.python is None:
                raise
            raise ConfigError(
                f"environment {config.resolved_name}: {self.python} could not be started: "
                f"{error.strerror}; expected an interpreter of Python 3.11 or newer (python)"
            ) from None
        if "refused" in ready:
            reason = clean_line(str(ready["refused"]))
            raise ConfigError(f"environment {config.resolved_name}: {reason}")
        self.tools: list[Mapping[str, Any]] = ready["tools"]
        os.set_blocking(self._responses, False)

    @property
    def responses(self) -> int:
        """Descriptor from which `receive` reads."""
        return self._responses

    @property
    def requests(self) -> int:
        """Descriptor to which `send` writes."""
        return self._requests

    def receive(self) -> list[bytes]:
        """Return the lines that have arrived. Raises LostError where the process exited."""
        with suppress(BlockingIOError):
            data = os.read(self._responses, 1 << 16)
            if not data:
                raise LostError(f"the environment's process exited ({self._exit_reason()})")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            if len(self._buffer) > _REPLY_BYTES:
                raise LostError(f"an answer has more than {_REPLY_BYTES:,} bytes")
            return lines
        return []

    def send(self, data: memoryview) -> memoryview:
        """Write what the pipe takes; return what is left."""
        return self._write(data)


class _Worker:
    """A place for one process at a time, and its requests that have no answer yet."""

    def __init__(self, start: Callable[[], EnvironmentChild], limit_s: float) -> None:
        self._start = start
        self._limit_s = limit_s
        self._child: EnvironmentChild | None = None
        self._starting = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[tuple[str, Any]]] = {}
        self._numbers = count()
        self._outgoing = b""
        self._timer: asyncio.TimerHandle | None = None

    async def request(self, kind: str, episode: str, argument: Any) -> tuple[str, Any]:
        """Return status and value of the answer. Raises LostError, ConfigError."""
        async with self._starting:
            if self._child is None:
                self._child = await asyncio.to_thread(self._start)
                asyncio.get_running_loop().add_reader(self._child.responses, self._receive)
        number = next(self._numbers)
        answer: asyncio.Future[tuple[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        line = json.dumps([number, kind, episode, argument], ensure_ascii=False, default=dict)
        self._outgoing += line.encode("utf-8", "surrogatepass") + b"\n"
        if self._timer is None:
            self._watch()
        self._flush()
        return await answer

    def _flush(self) -> None:
        if self._child is None:
            return
        loop = asyncio.get_running_loop()
        self._outgoing = bytes(self._child.send(memoryview(self._outgoing)))
        if self._outgoing:
            loop.add_writer(self._child.requests, self._flush)
        else:
            loop.remove_writer(self._child.requests)

    def _receive(self) -> None:
        assert self._child is not None
        try:
            for line in self._child.receive():
                match read_line(line):
                    case [int(number), str(status), value] if number in self._waiting:
                        answer = self._waiting.pop(number)
                        if not answer.done():
                            answer.set_result((status, value))
                    case _:
                        raise LostError("the environment's process sent something unexpected")
        except (LostError, OSError) as error:
            self.lose(str(error))
            return
        self._watch()

    def _watch(self) -> None:
        """Start the time limit again; none where nothing is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            loop = asyncio.get_running_loop()
            reason = f"no answer within {self._limit_s:g} s"
            self._timer = loop.call_later(self._limit_s, self.lose, reason)

    def lose(self, reason: str) -> None:
        """End the process; its requests fail with the reason."""
        self._end()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(LostError(reason))
        self._waiting.clear()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._outgoing = b""
        if self._child is not None:
            with suppress(RuntimeError):  # no loop runs any more
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._child.responses)
                loop.remove_writer(self._child.requests)
            self._child.kill()
            self._child = None


class EnvironmentHost:
    """The environments of a campaign. Processes start with the first request that needs them."""

    def __init__(self, environments: Sequence[EnvironmentConfig], *, base: Path) -> None:
        self._workers = {
            config.resolved_name: [
                _Worker(partial(EnvironmentChild, config, base=base), config.timeout_s + _GRACE_S)
                for _ in range(config.workers)
            ]
            for config in environments
        }

    async def step(self, requests: Sequence[StepRequest]) -> list[Answer]:
        """Return the answers, in order; see rayhf.roles.Environments."""
        return list(await asyncio.gather(*map(self._step, requests)))

    async def _step(self, request: StepRequest) -> Answer:
        workers = self._workers[request.environment]
        worker = workers[crc32(request.episode.encode()) % len(workers)]
        kind = "close"
        argument: dict[str, Any] = {}
        if request.row is not None:
            kind = "reset"
            argument = {"row": dict(request.row), "seed": request.seed}
        elif request.message is not None:
            kind = "step"
            argument = dict(request.message)
        where = f"environment {request.environment}"
        try:
            status, value = await worker.request(kind, request.episode, argument)
        except (LostError, ConfigError, OSError) as error:
            return Failed(reason=f"{where}: {error}")
        if status == "ok":
            return StepResult() if kind == "close" else read_result(value, where)
        reason = f"{where}: {clean_line(str(value))}"
        return Invalid(reason=reason) if status == "raised" else Failed(reason=reason)

    def close(self) -> None:
        """End the processes."""
        for workers in self._workers.values():
            for worker in workers:
                worker.lose("the environments were closed")


def read_result(value: object, where: str) -> StepResult | Invalid:
    """Return an environment's answer; Invalid for anything else."""
    match value:
        case {
            "messages": list(messages),
            "reward": float(reward),
            "done": bool(done),
            "metrics": dict(metrics),
        }:
            if len(messages) > _MESSAGES or not all(map(_is_message, messages)):
                return Invalid(
                    reason=f"{where}: expected at most {_MESSAGES} messages, each with a role and "
                    "a content of text"
                )
            if not all(map(_is_finite, [reward, *metrics.values()])):
                return Invalid(reason=f"{where}: the reward or a metric is not a finite number")
            return StepResult(messages=tuple(messages), reward=reward, done=done, metrics=metrics)
    return Invalid(reason=f"{where}: the answer is not a StepResult")


def _is_message(message: object) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
