"""The process of an environment's episodes, started by process.py as a script.

In: JSON lines on the request pipe, first {"path" (empty: the interpreter's own, which may be one
without rayhf), "module", "class", "config", and the limits "memory_bytes", "file_bytes",
"timeout_s", "network"}, then per request [number, kind, episode, argument]: "reset" with {"row",
"seed"}, "step" with a message, "close" with null. Out, on the response pipe: one line that says
ready or refused, then one [number, status, value] per request, in the order in which they are
known. Status "ok" has the values of a StepResult; "raised", "late" and "lost" have a reason. Pipes,
namespaces and limits are those of a rule (rayhf/scorer/rule_child.py).

Imports only the standard library until the path is set.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, BinaryIO

LINE_BYTES = 1 << 28
"""Limit on one request."""


def main() -> None:
    """Load the class, then answer requests until the pipe ends."""
    request_fd, response_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    for fd in (request_fd, response_fd, life_fd):
        os.set_inheritable(fd, False)
    requests = open(request_fd, "rb", buffering=1 << 16)  # noqa: SIM115 - open until the end
    hello = json.loads(requests.readline())
    if hello["path"]:
        sys.path[:] = hello["path"]
    else:
        sys.path.append(os.getcwd())
        _import_rayhf()
    from rayhf.scorer.rule_call import describe_error
    from rayhf.scorer.rule_child import die_with_parent, limit_resources, send
    from rayhf.scorer.rule_namespaces import enter

    die_with_parent(life_fd)
    apart, contained = enter(
        network=hello["network"], life_fd=life_fd, pipes=(request_fd, response_fd)
    )
    limit_resources(hello["memory_bytes"], hello["file_bytes"], apart=apart)
    try:
        host = _Host(hello, response_fd)
    except BaseException as error:  # noqa: BLE001 - foreign code runs at import
        send(response_fd, {"refused": describe_error(error)})
        return
    ready = {"ready": True, "apart": apart, "contained": contained, "tools": host.tools}
    send(response_fd, ready)
    asyncio.run(host.serve(requests))


def _import_rayhf() -> None:
    """Import rayhf from this file's directory, and nothing else that is installed beside it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = spec_from_file_location(
        "rayhf", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["rayhf"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["rayhf"])


class _Host:
    """The class, and the episodes that are under way."""

    def __init__(self, hello: dict[str, Any], response_fd: int) -> None:
        self._class = getattr(importlib.import_module(hello["module"]), hello["class"])
        for name in ("reset", "step"):
            if not inspect.iscoroutinefunction(getattr(self._class, name, None)):
                raise TypeError(f"{hello['class']} has no coroutine method {name!r}")
        self._config = self._class.Config.model_validate(hello["config"])
        self._timeout_s = hello["timeout_s"]
        self._response_fd = response_fd
        self._episodes: dict[str, Any] = {}
        prepare = getattr(self._class, "prepare", None)
        if callable(prepare):
            prepare(self._config)
        describe = getattr(self._class, "tools", None)
        self.tools: list[dict[str, Any]] = []
        """JSON schemas of the functions that prompts are rendered with."""
        if hello["describe"] and callable(describe):
            self.tools += describe(self._config)

    async def serve(self, requests: BinaryIO) -> None:
        """Answer every request in a task of its own."""
        reader = asyncio.StreamReader(limit=LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), requests
        )
        running = set()
        while line := await reader.readline():
            task = asyncio.create_task(self._respond(line))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _respond(self, line: bytes) -> None:
        from rayhf.scorer.rule_call import describe_error
        from rayhf.scorer.rule_child import decode, send

        number, kind, episode, argument = decode(line)
        limit = asyncio.timeout(self._timeout_s)
        over = True
        try:
            async with limit:
                status, value = await self._answer(kind, episode, argument)
            text = json.dumps([number, status, value])
            over = kind == "close" or status != "ok" or value["done"]
        except BaseException as error:  # noqa: BLE001 - foreign code may raise anything
            if limit.expired():
                result = ["late", f"no answer within {self._timeout_s:g} s"]
            else:
                result = ["raised", describe_error(error)]
            text = json.dumps([number, *result])
        send(self._response_fd, json.loads(text))
        if over:
            await self._forget(episode)

    async def _forget(self, episode: str) -> None:
        """End an episode; its environment may have something to close."""
        close = getattr(self._episodes.pop(episode, None), "close", None)
        if close is not None:
            await close()

    async def _answer(self, kind: str, episode: str, argument: Any) -> tuple[str, Any]:
        if kind == "close":
            return "ok", {}
        if kind == "reset":
            environment = self._class(self._config)
            self._episodes[episode] = environment
            first = await environment.reset(argument["row"], seed=argument["seed"])
            return "ok", _values(() if first is None else first)
        environment = self._episodes.get(episode)
        if environment is None:
            return "lost", "the process that ran the episode was lost"
        result = await environment.step(argument)
        if type(result).__name__ != "StepResult":
            raise TypeError(f"step returned a {type(result).__name__}, not a StepResult")
        return "ok", _values(result.messages, result.reward, result.done, result.metrics)


def _values(
    messages: Any,
    reward: float = 0.0,
    done: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return an answer as JSON values."""
    return {
        "messages": _messages(messages),
        "reward": float(reward),
        "done": bool(done),
        "metrics": {str(name): float(value) for name, value in (metrics or {}).items()},
    }


def _messages(value: Any) -> list[dict[str, Any]]:
    """Return messages from one of the forms in which an environment may give them."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        return [dict(value)]
    return [dict(message) for message in value]


if __name__ == "__main__":
    main()
