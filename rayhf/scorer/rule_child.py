"""The process of a user's rule function, started by rule_process.py as a script.

In: JSON lines on the request pipe, first {"path", "module", "function", "style", "concurrency", and
the limits "memory_bytes", "file_bytes", "timeout_s", "network"}, then per call [number, count,
arguments], for `count` completions; count 0 asks whether `arguments` is a usable reference answer.
Out, on the response pipe: one line that says ready or refused, then one [number, results] per call,
written as soon as it is known: the parent times each call by the responses. A plain function's come
in order; of a coroutine function up to `concurrency` calls run at a time, and their responses come
as they end. The life pipe carries nothing; the kernel kills this process group when the parent's
end closes, and what left the group with it (rule_namespaces.py). The rule's stdout and stderr go to
another pipe and its stdin is empty, so nothing that it prints reaches the protocol.

Imports only the standard library, so that it starts quickly.
"""

import asyncio
import fcntl
import json
import math
import os
import re
import resource
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from rayhf.scorer.rule_call import Result, UserFunction

PROCESSES = 512
"""Limit on processes and threads, of the rule and of what it starts."""
LINE_BYTES = 1 << 28
"""Limit on one line for a coroutine function."""
_CORES = os.cpu_count() or 1
_NO_NETWORK = re.compile("Network is unreachable|name resolution|Name or service not known")
_HINT = " (a rule has no network by default; set `network: true` in the scorer's entry)"


def main() -> None:
    """Load the function, then call it for each line."""
    request_fd, response_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    for fd in (request_fd, response_fd, life_fd):
        os.set_inheritable(fd, False)
    die_with_parent(life_fd)
    requests = open(request_fd, "rb", buffering=1 << 16)  # noqa: SIM115 - open until the end
    hello = decode(requests.readline())
    sys.path[:] = hello["path"]
    from rayhf.scorer.rule_call import RefusedError, UserFunction
    from rayhf.scorer.rule_namespaces import enter

    apart, contained = enter(
        network=hello["network"], life_fd=life_fd, pipes=(request_fd, response_fd)
    )
    limit_resources(hello["memory_bytes"], hello["file_bytes"], apart=apart)

    try:
        function = UserFunction(hello["module"], hello["function"], hello["style"])
    except RefusedError as error:
        send(response_fd, error.response)
        return
    send(
        response_fd, {"ready": True, "apart": apart, "contained": contained, **function.describe()}
    )
    caller = _Caller(function, response_fd, hello, hint=apart and not hello["network"])
    if function.is_async:
        asyncio.run(caller.serve_async(requests, hello["concurrency"]))
    else:
        caller.serve(requests)


class _Caller:
    """Reads calls, calls the function, writes results."""

    def __init__(
        self, function: "UserFunction", response_fd: int, hello: dict[str, Any], *, hint: bool
    ) -> None:
        self._function = function
        self._response_fd = response_fd
        self._timeout_s = hello["timeout_s"]
        self._hint = hint
        self._due = 0.0

    def serve(self, requests: BinaryIO) -> None:
        """Answer one call after the other."""
        for line in requests:
            number, count, arguments = self._read(line)
            results = self._function.score(arguments, count) if count else self._check(arguments)
            self._respond(number, results)

    async def serve_async(self, requests: BinaryIO, concurrency: int) -> None:
        """Answer up to `concurrency` calls at a time."""
        reader = asyncio.StreamReader(limit=LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), requests
        )
        free = asyncio.Semaphore(concurrency)
        running = set()
        while True:
            await free.acquire()
            line = await reader.readline()
            if not line:
                break
            task = asyncio.create_task(self._answer(line, free))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _answer(self, line: bytes, free: asyncio.Semaphore) -> None:
        number, count, arguments = self._read(line)
        if count:
            results = await self._function.score_async(arguments, count, self._timeout_s)
        else:
            results = self._check(arguments)
        self._respond(number, results)
        free.release()

    def _check(self, answer: str | None) -> "list[Result]":
        reason = self._function.check_answer(answer)
        return [("scored", 1.0, {}) if reason is None else ("invalid", reason)]

    def _read(self, line: bytes) -> Any:
        if time.monotonic() >= self._due:
            self._due = _allow_cpu(self._timeout_s)
        return decode(line)

    def _respond(self, number: int, results: "list[Result]") -> None:
        if self._hint:
            results = [
                (result[0], result[1] + _HINT)
                if isinstance(result[1], str) and _NO_NETWORK.search(result[1])
                else result
                for result in results
            ]
        send(self._response_fd, [number, results])


def limit_resources(memory_bytes: int, file_bytes: int, *, apart: bool) -> None:
    """Limit address space, file sizes, core files, and in a user namespace of our own processes.

    Elsewhere the limit on processes would count everything that the user runs on the machine, in
    other containers too. Linux counts per user namespace since 5.14, and never limits root.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    if apart and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 14):
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for name, amount in limits.items():
        _, hard = resource.getrlimit(name)
        limit = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(name, (limit, limit))


def _allow_cpu(seconds: float) -> float:
    """Raise the limit on CPU time to two calls on all cores and a second from now.

    Returns when it must be raised again, which is after one call's time. The parent ends a call
    before the limit does, unless it is stopped itself.
    """
    limit = math.ceil(time.process_time() + 2 * seconds * _CORES) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    return time.monotonic() + seconds


def die_with_parent(life_fd: int) -> None:
    """Have this process group killed when the parent's end of the life pipe closes.

    The kernel sends SIGKILL, so that a C call which holds the GIL (a regular expression) ends too.
    PR_SET_PDEATHSIG would follow the parent's *thread*, and an actor may start this process from a
    pool thread.
    """
    fcntl.fcntl(life_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life_fd, fcntl.F_SETFL, fcntl.fcntl(life_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([life_fd], [], [], 0)[0]:  # it closed before the signal was requested
        os._exit(1)


def decode(line: bytes) -> Any:
    # surrogatepass: lone surrogates in a completion arrive as they were sent
    return json.loads(line.decode("utf-8", "surrogatepass"))


def send(fd: int, response: object) -> None:
    data = memoryview(json.dumps(response).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
