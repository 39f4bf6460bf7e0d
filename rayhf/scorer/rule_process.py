"""The parent's end of a rule's process: starts it with few rights, talks to it with deadlines, and
ends all that it started.

In: lines, one per call. Out: answers in order, or LostError. The parent waits for the child
(rule_child.py), never longer than the limit per call; the child waits for lines, and dies with the
parent.

The child has limits on memory, files and CPU time, few of our environment variables, and where the
kernel allows it a user namespace of its own, without a network. That contains accidents and hostile
completions. It is no prison for a rule that is hostile itself: it may read and write what its user
may.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError, did_you_mean

_CHILD = Path(__file__).with_name("rule_child.py")
_SPEC = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
_KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
)  # fmt: skip
"""Environment variables that a rule sees. Tokens and keys are not among them: a rule that needs one
reads it from a file."""
_COOKIE = "RAYHF_RULE"
_SWEEPS = 10
"""Looks for what a rule has left behind: what forks meanwhile is seen by the next one."""
_ANSWER_BYTES = 1 << 20
"""Longer answers are no answers."""
START_TIMEOUT_S = 60.0
"""For importing the user's module, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a function of the user is called; with `messages`, too, where it accepts that."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.positional)}, *, {', '.join(self.keywords)}"


ONE = Signature(positional=("completion",), keywords=("prompt", "answer", "finish_reason"))
TWO = Signature(positional=("first", "second"), keywords=("prompt", "answer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """Of one rule's process."""

    timeout_s: float = 10.0
    """Per call."""
    memory_bytes: int = 4 << 30
    """Address space."""
    file_bytes: int = 1 << 30
    """Of each file that it writes."""
    network: bool = False
    """It may use ours. Where the kernel gives it no namespace of its own it has it anyway."""


DEFAULT_LIMITS = ProcessLimits()


class LostError(Exception):
    """The child did not answer the call it was at: too slow, dead, or broken. The message is the
    reason."""


class Child:
    """The parent's end of one rule_child.py process. Raises ConfigError unless the rule is ready to
    be called."""

    def __init__(
        self, function: str, signature: Signature, *, base: Path, limits: ProcessLimits
    ) -> None:
        module, name = parse_function(function)
        base = base.resolve()
        if not base.is_dir():
            raise ConfigError(f"rule {function}: {base} is not a directory")
        self._spawn(base)
        self._buffer = b""
        path = [str(base), *(entry for entry in sys.path if entry not in ("", str(base)))]
        hello = {
            "path": path, "module": module, "function": name,
            "positional": signature.positional, "keywords": signature.keywords, **asdict(limits),
        }  # fmt: skip
        try:
            ready = next(self._exchange([json.dumps(hello).encode() + b"\n"], START_TIMEOUT_S))
        except LostError as lost:
            self.kill()
            raise ConfigError(
                f"rule {function}: {module} could not be imported from {base}: {lost}"
            ) from None
        if not ready.get("ready"):
            self.kill()
            raise ConfigError(_refusal(function, signature, base, ready))
        self.fingerprint: str = ready["fingerprint"]
        self.apart: bool = ready["apart"]
        """It has a user namespace of its own."""

    def _spawn(self, base: Path) -> None:
        request_in, self._requests = os.pipe()
        self._replies, reply_out = os.pipe()
        life_in, self._life = os.pipe()
        inherited = (request_in, reply_out, life_in)
        self._cookie = secrets.token_hex(16)
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | {
            _COOKIE: self._cookie,
            "PYTHONHASHSEED": "0",  # a rule that walks a set gives the same score after a restart
            "PYTHONIOENCODING": "utf-8:backslashreplace",  # a rule may print any completion
            "OMP_NUM_THREADS": "1",
        }
        try:
            # -P: the scorer folder is not on the rule's path. stdout=2: its prints go to stderr.
            # Own session: one kill ends what the rule started, too.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), *map(str, inherited)],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=inherited, cwd=base, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError:
            for fd in (self._requests, self._replies, self._life):
                os.close(fd)
            raise
        finally:
            for fd in inherited:
                os.close(fd)
        os.set_blocking(self._requests, False)

    def alive(self) -> bool:
        return self._process.poll() is None

    def answers(
        self, lines: Sequence[bytes], *, first: int, timeout_s: float
    ) -> Iterator[tuple[str, Any]]:
        """(kind, value) for lines[first:], as they come. Raises LostError when one does not."""
        for number, answer in enumerate(self._exchange(lines[first:], timeout_s), first):
            if not (isinstance(answer, list) and len(answer) == 3 and answer[0] == number):
                raise LostError("the rule's process answered out of order")
            yield answer[1], answer[2]

    def _exchange(self, lines: Sequence[bytes], timeout_s: float) -> Iterator[Any]:
        """Send all lines while reading one answer per line: neither side waits for the other's full
        pipe."""
        outgoing, missing = memoryview(b"".join(lines)), len(lines)
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while missing:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise LostError(f"no answer within {timeout_s:g} s")
            if self._requests in ready:
                outgoing = self._write(outgoing)
                deadline = (
                    time.monotonic() + timeout_s
                )  # a long text on its way is not the rule's time
                if not outgoing:
                    poll.unregister(self._requests)
            if self._replies in ready:
                data = os.read(self._replies, 1 << 16)
                if not data:
                    raise LostError(f"the rule's process died: {self._cause_of_death()}")
                *answers, self._buffer = (self._buffer + data).split(b"\n")
                if answers:
                    deadline = time.monotonic() + timeout_s
                if len(self._buffer) > _ANSWER_BYTES:
                    raise LostError("the rule's process sent something other than an answer")
                missing -= len(answers)
                for answer in answers:
                    yield _parse(answer)

    def _write(self, outgoing: memoryview) -> memoryview:
        """What is left to send; nothing once the child has gone, since its last answers are still
        to be read."""
        try:
            return outgoing[os.write(self._requests, outgoing[: 1 << 20]) :]
        except BlockingIOError:
            return outgoing
        except BrokenPipeError:
            return outgoing[:0]

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def kill(self) -> None:
        """End the child, every process of its session's group, and those that left it but kept
        their environment."""
        with suppress(ProcessLookupError):  # already gone, and nothing it started is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for _ in range(_SWEEPS):
            strays = _carriers(f"{_COOKIE}={self._cookie}".encode())
            for stray in strays:
                with suppress(ProcessLookupError):
                    os.kill(stray, signal.SIGKILL)
            if not strays:
                break
        for fd in (self._requests, self._replies, self._life):
            os.close(fd)


def _carriers(entry: bytes) -> list[int]:
    """The processes that were started with this environment entry and still run; what is not ours
    to read is not ours to end."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry in (process / "environ").read_bytes():  # empty for a zombie
                found.append(int(process.name))
    return found


def parse_function(function: str) -> tuple[str, str]:
    """("module", "function"). Raises ConfigError with the nearest valid form."""
    match = _SPEC.fullmatch(function)
    if match is None:
        head, _, tail = (
            function.replace(".py:", ":")
            .replace("/", ".")
            .rpartition(":" if ":" in function else ".")
        )
        guess = f"{head.strip('.')}:{tail}"
        hint = f"; did you mean {guess}?" if _SPEC.fullmatch(guess) else ""
        raise ConfigError(f"rule {function!r} is not of the form module:function{hint}")
    return match["module"], match["function"]


def _refusal(function: str, signature: Signature, base: Path, answer: dict[str, Any]) -> str:
    module, name = parse_function(function)
    if answer["refused"] == "no module":
        modules = [file.stem for file in base.glob("*.py")]
        return f"rule {function}: there is no module {module} in {base} or on sys.path{did_you_mean(module, modules)}"
    if answer["refused"] == "no function":
        return f"rule {function}: module {module} has no function {name}{did_you_mean(name, answer['names'])}"
    if answer["refused"] == "import":
        return f"rule {function}: importing {module} failed: {answer['reason']}"
    return f"rule {function} cannot be called as {name}({signature}): {answer['reason']}"


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise LostError("the rule's process sent something other than an answer") from None
