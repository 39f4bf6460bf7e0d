"""The process in which a user's rule function runs, started by rule_process.py as a script.
Standard library only.

In: JSON lines on the request pipe, first {"path", "module", "function", "positional", "keywords",
and the limits "memory_bytes", "file_bytes", "timeout_s", "network"}, then one [number, texts,
context, messages] per call: the positional and the keyword arguments. Out, on the reply pipe: one
line that says ready or refused, then one [number, kind, value] per call, in order, written as soon
as it is known: the parent times each call by the answers. The life pipe carries nothing; the kernel
kills this process group when the parent's end closes. The rule's own stdout goes to stderr and its
stdin is empty, so nothing that it prints reaches the protocol.
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
from typing import Any

REASON_CHARS = 400
PROCESSES = 512
"""And threads, of the rule and of what it starts."""
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_CORES = os.cpu_count() or 1
_CUT_OFF = re.compile("Network is unreachable|name resolution|Name or service not known")
_HINT = (
    " (rules have no network here; `network: true` in the scorer's entry gives this one its own)"
)


def main() -> None:
    request_fd, reply_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    for fd in (request_fd, reply_fd, life_fd):
        os.set_inheritable(fd, False)
    _die_with_parent(life_fd)
    requests = open(request_fd, "rb", buffering=1 << 16)  # noqa: SIM115 - lives as long as the process
    hello = _decode(requests.readline())
    apart = _set_apart(network=hello["network"])
    _limit(hello["memory_bytes"], hello["file_bytes"], apart=apart)
    sys.path[:] = hello["path"]
    loaded, answer = _load(
        hello["module"], hello["function"], hello["positional"], hello["keywords"]
    )
    _send(reply_fd, answer | {"apart": apart})
    if loaded is None:
        return
    function, wants_messages = loaded
    hint = _HINT if apart and not hello["network"] else ""
    due = 0.0
    for line in requests:
        number, texts, context, messages = _decode(line)
        if time.monotonic() >= due:
            due = _allow_cpu(hello["timeout_s"])
        kind, value = _judge(
            function, texts, context | ({"messages": messages} if wants_messages else {})
        )
        if hint and isinstance(value, str) and _CUT_OFF.search(value):
            value += hint
        _send(reply_fd, [number, kind, value])


def _judge(
    function: Callable[..., Any], texts: list[str], context: dict[str, Any]
) -> tuple[str, float | str]:
    """Kinds: scored, invalid, failed, unreachable (failed, but worth asking again), and broken
    (failed, and a fresh process is called for)."""
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
    except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises, SystemExit included, is an answer, not our end
        # What a rule raises when a service it asks cannot be reached: a matter of time, not of the
        # answer.
        return "unreachable" if isinstance(
            error, ConnectionError | TimeoutError
        ) else "failed", describe(error)
    if not math.isfinite(score):
        return "invalid", f"the rule returned {score}"
    return "scored", score


def _load(
    module_name: str, function_name: str, positional: list[str], keywords: list[str]
) -> tuple[tuple[Callable[..., Any], bool] | None, dict[str, Any]]:
    """The function and whether it takes `messages`, and the first answer to the parent."""
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - foreign code runs at import
        # a module that is absent, not one that it imports in turn
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        return None, {"refused": "no module" if absent else "import", "reason": describe(error)}
    function = getattr(module, function_name, None)
    if function is None:
        names = [
            name
            for name, value in vars(module).items()
            if callable(value) and not name.startswith("_")
        ]
        return None, {"refused": "no function", "names": names}
    if not callable(function):
        return None, {
            "refused": "signature",
            "reason": f"it is a {type(function).__name__}, not a function",
        }
    if inspect.iscoroutinefunction(function):
        return None, {
            "refused": "signature",
            "reason": "it is a coroutine function; a plain one is needed",
        }
    wants_messages = False
    try:
        signature = inspect.signature(function)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        wants_messages = (
            "messages" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
        )
        signature.bind(
            *positional, **dict.fromkeys(keywords), **({"messages": None} if wants_messages else {})
        )
    except TypeError as error:
        return None, {"refused": "signature", "reason": str(error)}
    except ValueError:
        pass  # builtins without a signature: the first call will tell
    return (function, wants_messages), {"ready": True, "fingerprint": _fingerprint(module)}


def _fingerprint(module: Any) -> str:
    """Of the module's source file, so that a process started later can be seen to run another
    rule."""
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    with open(file, "rb") as source:
        return hashlib.sha256(source.read()).hexdigest()


def describe(error: BaseException) -> str:
    """One line: type, message and the place that raised it. Never raises, whatever the error's own
    __str__ does."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    place, last = "", error.__traceback__
    while last is not None:
        code = last.tb_frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith("<"):
            place = f" ({os.path.basename(code.co_filename)}:{last.tb_lineno})"
        last = last.tb_next
    return text[:REASON_CHARS] + place


def _describe_value(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _set_apart(*, network: bool) -> bool:
    """Into a user namespace of our own, and without `network` into a network namespace that has no
    interface.

    From there other processes' environments and memory cannot be read, also where they run as the
    same user. False where the kernel or the container does not allow it: then the rule has what its
    user has.
    """
    uid, gid = os.geteuid(), os.getegid()
    if ctypes.CDLL(None).unshare(_NEW_USER | (0 if network else _NEW_NETWORK)) != 0:
        return False
    with contextlib.suppress(
        OSError
    ):  # some distributions forbid even this: then we are called nobody, and stay who we are
        for file, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(content)
    return True


def _limit(memory_bytes: int, file_bytes: int, *, apart: bool) -> None:
    """Address space, the size of each file, no core files; and processes where they are counted for
    this rule alone.

    Elsewhere that limit would count everything that the user runs on the machine, in other
    containers too. The kernel binds root by no such limit.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    if apart and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 14):
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


def _allow_cpu(seconds: float) -> float:
    """What all cores can do in the time of two calls, and a second; returns when it is due again,
    which is after one call's time.

    The parent gives up before that, unless it is stopped itself.
    """
    limit = math.ceil(time.process_time() + 2 * seconds * _CORES) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    return time.monotonic() + seconds


def _die_with_parent(life_fd: int) -> None:
    """SIGKILL to this process group when the parent's end of the life pipe closes.

    The kernel sends it, so that a C call which holds the GIL (a regular expression) ends too.
    PR_SET_PDEATHSIG would follow the parent's *thread*, and an actor may start us from a pool
    thread.
    """
    fcntl.fcntl(life_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life_fd, fcntl.F_SETFL, fcntl.fcntl(life_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([life_fd], [], [], 0)[0]:  # it closed before we asked to be told
        os._exit(1)


def _decode(line: bytes) -> Any:
    # surrogatepass: lone surrogates in a completion arrive as they were sent
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _send(fd: int, answer: Any) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
