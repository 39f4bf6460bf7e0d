"""The process of a user's rule function, started by rule_process.py as a script.

In: JSON lines on the request pipe, first {"path", "module", "function", "positional", "keywords",
and the limits "memory_bytes", "file_bytes", "timeout_s", "network"}, then one [number, texts,
context, messages] per call: the positional and the keyword arguments. Out, on the response pipe:
one line that says ready or refused, then one [number, status, value] per call, in order, written as
soon as it is known: the parent times each call by the responses. The life pipe carries nothing; the
kernel kills this process group when the parent's end closes. The rule's own stdout goes to stderr
and its stdin is empty, so nothing that it prints reaches the protocol.

Imports only the standard library, so that it starts quickly.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

REASON_CHARS = 400
"""Limit on an error's text."""
PROCESSES = 512
"""Limit on processes and threads, of the rule and of what it starts."""
_NEW_USER = 0x10000000
_NEW_NETWORK = 0x40000000
"""CLONE_NEWUSER and CLONE_NEWNET of linux/sched.h."""
_CORES = os.cpu_count() or 1
_NO_NETWORK = re.compile("Network is unreachable|name resolution|Name or service not known")
_HINT = " (a rule has no network by default; set `network: true` in the scorer's entry)"


def main() -> None:
    """Load the function, then call it for each line."""
    request_fd, response_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    for fd in (request_fd, response_fd, life_fd):
        os.set_inheritable(fd, False)
    _die_with_parent(life_fd)
    requests = open(request_fd, "rb", buffering=1 << 16)  # noqa: SIM115 - open until the end
    hello = _decode(requests.readline())
    apart = _set_apart(network=hello["network"])
    _limit(hello["memory_bytes"], hello["file_bytes"], apart=apart)
    sys.path[:] = hello["path"]
    try:
        module, function = _load(hello["module"], hello["function"])
        takes_messages = _takes_messages(function, hello["positional"], hello["keywords"])
    except _RefusedError as error:
        _send(response_fd, error.response)
        return
    _send(response_fd, {"ready": True, "fingerprint": _fingerprint(module), "apart": apart})
    hint = _HINT if apart and not hello["network"] else ""
    due = 0.0
    for line in requests:
        number, texts, context, messages = _decode(line)
        if time.monotonic() >= due:
            due = _allow_cpu(hello["timeout_s"])
        if takes_messages:
            context["messages"] = messages
        status, value = _call(function, texts, context)
        if hint and isinstance(value, str) and _NO_NETWORK.search(value):
            value += hint
        _send(response_fd, [number, status, value])


def _call(
    function: Callable[..., object], texts: list[str], context: dict[str, Any]
) -> tuple[str, float | str]:
    """Call the function. Returns (status, score or reason).

    Status: scored, invalid, failed, unreachable (failed, and may succeed later), or broken (failed,
    and the process must be restarted).
    """
    try:
        value = function(*texts, **context)
        # numpy scalars are Real too; bool is an int, but a rule that returns one has most likely
        # forgotten something
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return "invalid", f"the rule returned {_describe_value(value)}, not a number"
        try:
            score = float(value)
        except OverflowError:
            return "invalid", "the rule returned a number beyond the range of a float"
    except MemoryError as error:
        return "broken", describe(error)
    except (ConnectionError, TimeoutError) as error:
        # A service that the rule calls is unreachable: that says nothing about the completion.
        return "unreachable", describe(error)
    except BaseException as error:  # noqa: BLE001 - foreign code may raise anything, SystemExit too
        return "failed", describe(error)
    if not math.isfinite(score):
        return "invalid", f"the rule returned {score}"
    return "scored", score


class _RefusedError(Exception):
    """The function cannot be imported or called."""

    def __init__(self, refused: str, **details: object) -> None:
        super().__init__(refused)
        self.response = {"refused": refused, **details}


def _load(module_name: str, function_name: str) -> tuple[ModuleType, Callable[..., object]]:
    """Import the function. Raises _RefusedError."""
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - foreign code runs at import
        # A module that is absent, not one that it imports in turn.
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        refused = "no module" if absent else "import"
        raise _RefusedError(refused, reason=describe(error)) from None
    function = getattr(module, function_name, None)
    if function is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        names = [name for name in public if callable(getattr(module, name))]
        raise _RefusedError("no function", names=names)
    if not callable(function):
        reason = f"it is a {type(function).__name__}, not a function"
        raise _RefusedError("signature", reason=reason)
    if inspect.iscoroutinefunction(function):
        reason = "it is a coroutine function; a plain one is needed"
        raise _RefusedError("signature", reason=reason)
    return module, function


def _takes_messages(
    function: Callable[..., object], positional: list[str], keywords: list[str]
) -> bool:
    """Return whether the function takes `messages` beside its other arguments.

    Raises _RefusedError where it cannot be called with those.
    """
    takes_messages = False
    try:
        signature = inspect.signature(function)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        takes_messages = (
            "messages" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
        )
        names = [*keywords, "messages"] if takes_messages else keywords
        signature.bind(*positional, **dict.fromkeys(names))
    except TypeError as error:
        raise _RefusedError("signature", reason=str(error)) from None
    except ValueError:
        pass  # a builtin without a signature: the first call shows whether it fits
    return takes_messages


def _fingerprint(module: ModuleType) -> str:
    """Return the SHA-256 of the module's source file: a restarted process must run the same."""
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    with open(file, "rb") as source:
        return hashlib.sha256(source.read()).hexdigest()


def describe(error: BaseException) -> str:
    """Return one line with type, message and the place that raised it.

    Never raises, whatever the error's own __str__ does.
    """
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    place = ""
    last = error.__traceback__
    while last is not None:
        code = last.tb_frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith("<"):
            place = f" ({os.path.basename(code.co_filename)}:{last.tb_lineno})"
        last = last.tb_next
    return text[:REASON_CHARS] + place


def _describe_value(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _set_apart(*, network: bool) -> bool:
    """Enter a user namespace of our own, and without `network` a network without an interface.

    From there the environments and the memory of other processes cannot be read, not even of the
    same user's. Returns False where the kernel or the container does not allow it: then the rule
    has the rights of its user.
    """
    uid = os.geteuid()
    gid = os.getegid()
    if ctypes.CDLL(None).unshare(_NEW_USER | (0 if network else _NEW_NETWORK)) != 0:
        return False
    # Some distributions forbid even this; the process is then shown as the user nobody.
    with contextlib.suppress(OSError):
        for file, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(content)
    return True


def _limit(memory_bytes: int, file_bytes: int, *, apart: bool) -> None:
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


def _die_with_parent(life_fd: int) -> None:
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


def _decode(line: bytes) -> Any:
    # surrogatepass: lone surrogates in a completion arrive as they were sent
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _send(fd: int, response: object) -> None:
    data = memoryview(json.dumps(response).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
