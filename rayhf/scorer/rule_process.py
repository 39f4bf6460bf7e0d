"""The parent's side of a rule's process: starts it with few rights, exchanges lines, ends it.

In: lines, one per call. Out: responses in order, or LostError.

Synchronization: the parent waits for the child (rule_child.py), never longer than the limit per
call; the child waits for lines, and dies with the parent.

The child has limits on memory, files and CPU time, few of our environment variables, and where the
kernel allows it a user namespace of its own, without a network. That contains accidents and hostile
completions. It does not contain a rule that is hostile itself: it may read and write what its user
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PositiveFloat

from rayhf.config.scorers import ScorerEntryConfig
from rayhf.errors import ConfigError, did_you_mean

MEMORY_BYTES = 4 << 30
"""Limit on the address space of a rule's process."""
FILE_BYTES = 1 << 30
"""Limit on each file that a rule writes."""
START_TIMEOUT_S = 60.0
"""Limit on importing the user's module, in seconds."""

_CHILD = Path(__file__).with_name("rule_child.py")
_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")
_KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
)  # fmt: skip
"""Environment variables that a rule sees. Tokens and keys are not among them: a rule that needs one
reads it from a file."""
_COOKIE = "RAYHF_RULE"
"""Environment variable that marks everything a rule started."""
_SWEEPS = 10
"""Searches for processes that a rule left behind: one forked during a search is found by the
next."""
_RESPONSE_BYTES = 1 << 20
"""Limit on one response."""


def _check_function(function: str) -> str:
    if _FUNCTION.fullmatch(function):
        return function
    dotted = function.replace(".py:", ":").replace("/", ".")
    module, _, name = dotted.rpartition(":" if ":" in function else ".")
    guess = f"{module.strip('.')}:{name}"
    hint = f"; did you mean {guess}?" if _FUNCTION.fullmatch(guess) else ""
    raise ValueError(f"{function!r} is not of the form module:function{hint}")


class FunctionEntryConfig(ScorerEntryConfig):
    """Settings of a function that runs in a process of its own."""

    function: Annotated[str, AfterValidator(_check_function)]
    """module:function."""
    timeout_s: PositiveFloat = 10.0
    """Limit on one call, in seconds."""
    network: bool = False
    """The function calls a service. Otherwise its process has no network where the kernel allows
    that."""

    @property
    def default_name(self) -> str:
        """Name where the config gives none: the function's."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a user's function is called; with `messages`, too, where it accepts that."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.positional)}, *, {', '.join(self.keywords)}"


class LostError(Exception):
    """The current call got no response: the child is too slow, has exited or is broken."""


class Child:
    """The parent's end of one rule_child.py process.

    Raises ConfigError unless the function can be imported and called with `signature`.
    """

    def __init__(self, config: FunctionEntryConfig, signature: Signature, *, base: Path) -> None:
        function = config.function
        module, _, name = function.partition(":")
        base = base.resolve()
        if not base.is_dir():
            raise ConfigError(f"rule {function}: {base} is not a directory")
        self._spawn(base)
        self._buffer = b""
        hello = {
            "path": [str(base), *(entry for entry in sys.path if entry not in ("", str(base)))],
            "module": module,
            "function": name,
            "positional": signature.positional,
            "keywords": signature.keywords,
            "timeout_s": config.timeout_s,
            "network": config.network,
            "memory_bytes": MEMORY_BYTES,
            "file_bytes": FILE_BYTES,
        }
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
        """Whether it has a user namespace of its own."""

    def _spawn(self, base: Path) -> None:
        request_in, self._requests = os.pipe()
        self._responses, response_out = os.pipe()
        life_in, self._life = os.pipe()
        inherited = (request_in, response_out, life_in)
        self._cookie = secrets.token_hex(16)
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | {
            _COOKIE: self._cookie,
            "PYTHONHASHSEED": "0",  # a rule that walks a set gives the same score after a restart
            "PYTHONIOENCODING": "utf-8:backslashreplace",  # a rule may print any completion
            "OMP_NUM_THREADS": "1",
        }
        try:
            # -P: rayhf/scorer is not on the rule's import path. stdout=2: its prints go to stderr.
            # A session of its own: one kill ends what the rule started, too.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=inherited,
                cwd=base,
                env=environment,
                start_new_session=True,
            )
        except OSError:
            for fd in (self._requests, self._responses, self._life):
                os.close(fd)
            raise
        finally:
            for fd in inherited:
                os.close(fd)
        os.set_blocking(self._requests, False)

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def call(
        self, lines: Sequence[bytes], *, first: int, timeout_s: float
    ) -> Iterator[tuple[str, Any]]:
        """Yield (status, value) for lines[first:] as they arrive.

        Raises LostError when one does not arrive.
        """
        for number, response in enumerate(self._exchange(lines[first:], timeout_s), first):
            if not (isinstance(response, list) and len(response) == 3 and response[0] == number):
                raise LostError("the rule's process responded out of order")
            yield response[1], response[2]

    def _exchange(self, lines: Sequence[bytes], timeout_s: float) -> Iterator[Any]:
        """Send all lines while reading one response per line.

        Neither side waits for the other's full pipe.
        """
        outgoing = memoryview(b"".join(lines))
        missing = len(lines)
        poll = select.poll()
        poll.register(self._responses, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while missing:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise LostError(f"no response within {timeout_s:g} s")
            if self._requests in ready:
                outgoing = self._write(outgoing)
                # Time to send a long text does not count against the rule.
                deadline = time.monotonic() + timeout_s
                if not outgoing:
                    poll.unregister(self._requests)
            if self._responses in ready:
                data = os.read(self._responses, 1 << 16)
                if not data:
                    raise LostError(f"the rule's process exited ({self._exit_reason()})")
                *responses, self._buffer = (self._buffer + data).split(b"\n")
                if responses:
                    deadline = time.monotonic() + timeout_s
                if len(self._buffer) > _RESPONSE_BYTES:
                    raise LostError("the rule's process sent something other than a response")
                missing -= len(responses)
                for response in responses:
                    yield _parse(response)

    def _write(self, outgoing: memoryview) -> memoryview:
        """Return what is left to send.

        Nothing is left once the child has exited: its last responses are still to be read.
        """
        try:
            return outgoing[os.write(self._requests, outgoing[: 1 << 20]) :]
        except BlockingIOError:
            return outgoing
        except BrokenPipeError:
            return outgoing[:0]

    def _exit_reason(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def kill(self) -> None:
        """End the child and every process that it started.

        Those of its session's process group, and those that left it but kept their environment.
        """
        with suppress(ProcessLookupError):  # it exited, and nothing it started is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for _ in range(_SWEEPS):
            strays = _carriers(f"{_COOKIE}={self._cookie}".encode())
            for stray in strays:
                with suppress(ProcessLookupError):
                    os.kill(stray, signal.SIGKILL)
            if not strays:
                break
        for fd in (self._requests, self._responses, self._life):
            os.close(fd)


def _carriers(entry: bytes) -> list[int]:
    """Return the running processes that were started with this environment entry.

    Processes of other users cannot be read, and could not be ended either.
    """
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry in (process / "environ").read_bytes():  # empty for a zombie
                pids.append(int(process.name))
    return pids


def _refusal(function: str, signature: Signature, base: Path, ready: dict[str, Any]) -> str:
    module, _, name = function.partition(":")
    refused = ready["refused"]
    if refused == "no module":
        hint = did_you_mean(module, [file.stem for file in base.glob("*.py")])
        return f"rule {function}: there is no module {module} in {base} or on sys.path{hint}"
    if refused == "no function":
        hint = did_you_mean(name, ready["names"])
        return f"rule {function}: module {module} has no function {name}{hint}"
    if refused == "import":
        return f"rule {function}: importing {module} failed: {ready['reason']}"
    return f"rule {function} cannot be called as {name}({signature}): {ready['reason']}"


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise LostError("the rule's process sent something other than a response") from None
