"""The parent's side of a rule's process: starts it with few rights, exchanges lines, ends it.

In: lines, one per call. Out: responses in order, or LostError.

Synchronization: the parent waits for the child (rule_child.py), never longer than the limit per
call; the child waits for lines, and dies with the parent.

The child has limits on memory, files and CPU time, few of our environment variables, and where the
kernel allows it namespaces of its own: for users, for processes, and without a network. That
contains accidents and hostile completions. It does not contain a rule that is hostile itself: it
may read and write what its user may.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from rayhf.config.import_path import import_path
from rayhf.errors import ConfigError, did_you_mean
from rayhf.scorer.rule_arguments import OWN, Parameters
from rayhf.scorer.rule_config import FunctionEntryConfig
from rayhf.scorer.rule_reply import LostError, Result, read_ready, read_response

MEMORY_BYTES = 4 << 30
"""Limit on the address space of a rule's process."""
FILE_BYTES = 1 << 30
"""Limit on each file that a rule writes."""
OUTPUT_BYTES = 1 << 18
"""What a process prints is passed on up to here; the rest is read and dropped."""

_CONTROL = bytes(set(range(32)) - set(b"\n\t"))
"""Control characters are not passed on: a rule may print any completion."""
_CHILD = Path(__file__).with_name("rule_child.py")
_GRACE_S = 2.0
"""Of a coroutine function, the child ends a late call itself; the parent waits so much longer."""
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
"""Searches for processes that a rule left behind: the next search sees one forked meanwhile."""
_RESPONSE_BYTES = 1 << 20
"""Limit on one response."""


Payload = tuple[int, bytes]
"""Number of completions of a call, and its arguments as JSON. 0 checks a reference answer."""


class Child:
    """The parent's end of one rule_child.py process.

    Raises ConfigError unless the function can be imported and called in `style` ("" recognizes it).
    """

    script: ClassVar[Path] = _CHILD
    """What the process runs."""
    subject: ClassVar[str] = "rule"
    """What runs in it, for messages."""
    python: str = sys.executable
    """Interpreter that runs it."""

    def __init__(self, config: FunctionEntryConfig, style: str, *, base: Path) -> None:
        function = config.function
        module, _, name = function.partition(":")
        base = base.resolve()
        if not base.is_dir():
            raise ConfigError(f"rule {function}: {base} is not a directory")
        self._timeout_s = config.timeout_s
        load = {
            "module": module,
            "function": name,
            "style": style,
            "concurrency": config.concurrency,
            "timeout_s": config.timeout_s,
            "network": config.network,
        }
        try:
            ready = self._greet(base, load, config.import_timeout_s)
        except LostError as lost:
            raise ConfigError(
                f"rule {function}: {module} could not be imported from {base}: {lost} "
                "(import_timeout_s, in the scorer's entry, is the limit)"
            ) from None
        if "refused" in ready:
            raise ConfigError(_refusal(function, base, ready))
        self.fingerprint: str = ready["fingerprint"]
        self.checks_answers: bool = ready["checks_answers"]
        """Whether the function can say which reference answers it can use."""
        self.parameters = Parameters(
            style=ready["style"],
            names=tuple(ready["names"]),
            required=tuple(ready["required"]),
            takes_any=ready["takes_any"],
            is_async=ready["is_async"],
        )
        if self.parameters.is_async:
            self._timeout_s += _GRACE_S

    @property
    def unprotected(self) -> str:
        """What the kernel does not allow, and what follows; "" where it allows all namespaces."""
        if not self.apart:
            return (
                "the kernel allows it no namespaces of its own; it shares its user's network and "
                "processes, and what it starts may outlive it"
            )
        if not self.contained:
            return "the kernel allows it no process namespace; what it starts may outlive it"
        return ""

    def _greet(self, base: Path, load: Mapping[str, object], timeout_s: float) -> Mapping[str, Any]:
        """Start the process, send it what to load, and return its answer.

        Ends the process where it refuses, and where there is no answer: then raises LostError.
        """
        self.apart = False
        """Whether it has a user namespace of its own."""
        self.contained = False
        """Whether it has a process namespace of its own: then all that it started ends with it."""
        self._buffer = b""
        self._spawn(base)
        own_path = self.python != sys.executable
        greeting = {
            **load,
            "path": [] if own_path else import_path(sys.path, str(base)),
            "memory_bytes": MEMORY_BYTES,
            "file_bytes": FILE_BYTES,
        }
        line = json.dumps(greeting).encode() + b"\n"
        try:
            ready: Mapping[str, Any] = read_ready(next(self._exchange([line], timeout_s)))
        except LostError:
            self.kill()
            raise
        if "refused" in ready:
            self.kill()
        else:
            self.apart = ready["apart"]
            self.contained = ready["contained"]
        return ready

    def _spawn(self, base: Path) -> None:
        request_in, self._requests = os.pipe()
        self._responses, response_out = os.pipe()
        life_in, self._life = os.pipe()
        output, printed = os.pipe()
        inherited = (request_in, response_out, life_in)
        self._cookie = secrets.token_hex(16)
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | {
            _COOKIE: self._cookie,
            "PYTHONHASHSEED": "0",  # a rule that walks a set gives the same score after a restart
            "PYTHONIOENCODING": "utf-8:backslashreplace",  # a rule may print any completion
            "OMP_NUM_THREADS": "1",
        }
        try:
            # -P: rayhf/scorer is not on the rule's import path. A session of its own: one kill
            # ends what the rule started, too.
            self._process = subprocess.Popen(
                [self.python, "-P", str(self.script), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=inherited,
                cwd=base,
                env=environment,
                start_new_session=True,
            )
        except OSError:
            for fd in (self._requests, self._responses, self._life, output):
                os.close(fd)
            raise
        finally:
            for fd in (*inherited, printed):
                os.close(fd)
        os.set_blocking(self._requests, False)
        self._drain = threading.Thread(target=_pass_on, args=(output,), daemon=True)
        self._drain.start()

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def call(self, payloads: Sequence[Payload]) -> Iterator[tuple[int, list[Result]]]:
        """Yield (number of the call, its results) as they arrive; of a plain function in order.

        Raises LostError when a response does not arrive in time.
        """
        lines = [
            b"[%d,%d,%s]\n" % (number, count, arguments)
            for number, (count, arguments) in enumerate(payloads)
        ]
        missing = {number: max(count, 1) for number, (count, _) in enumerate(payloads)}
        for due, line in enumerate(self._exchange(lines, self._timeout_s)):
            expected = missing if self.parameters.is_async else {due: missing[due]}
            number, results = read_response(line, expected)
            del missing[number]
            yield number, results

    def _exchange(self, lines: Sequence[bytes], timeout_s: float) -> Iterator[bytes]:
        """Send all lines while reading one response per line.

        Neither side waits for the other's full pipe.
        """
        outgoing = memoryview(b"".join(lines))
        missing = len(lines)
        poll = select.poll()
        poll.register(self._responses, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while missing > 0:
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
                    raise LostError(f"the {self.subject}'s process exited ({self._exit_reason()})")
                *responses, self._buffer = (self._buffer + data).split(b"\n")
                if responses:
                    deadline = time.monotonic() + timeout_s
                if len(self._buffer) > _RESPONSE_BYTES:
                    raise LostError("the rule's process sent something other than a response")
                missing -= len(responses)
                yield from responses

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
        if 128 < code <= 192:  # a signal, passed on by the processes around the rule's
            code = 128 - code
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):  # a real-time signal has no name
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"

    def interrupt(self) -> None:
        """Kill the child alone; who waits for its responses finds that it exited."""
        self._process.kill()

    def kill(self) -> None:
        """End the child and every process that it started.

        Without a process namespace these are its session's process group, and those that left it
        but kept their environment.
        """
        with suppress(ProcessLookupError):  # it exited, and nothing it started is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self.contained:
            _kill_carriers(f"{_COOKIE}={self._cookie}".encode())
        for fd in (self._requests, self._responses, self._life):
            os.close(fd)
        self._drain.join(timeout=1.0)


def _pass_on(output: int) -> None:
    """Copy what a process prints to our stderr, up to OUTPUT_BYTES; read and drop the rest."""
    left = OUTPUT_BYTES
    with open(output, "rb", buffering=0) as pipe:
        while data := pipe.read(1 << 16):
            if left <= 0:
                continue
            with suppress(OSError):  # a full disk must not stop the rule
                os.write(2, data[:left].translate(None, _CONTROL))
                if left <= len(data):
                    os.write(2, b"\n[what this rule prints further is dropped]\n")
            left -= len(data)


def _kill_carriers(entry: bytes) -> None:
    """Kill the processes that were started with this environment entry."""
    for _ in range(_SWEEPS):
        strays = _carriers(entry)
        for stray in strays:
            with suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)
        if not strays:
            break


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


def _refusal(function: str, base: Path, ready: Mapping[str, Any]) -> str:
    module, _, name = function.partition(":")
    refused = ready["refused"]
    if refused == "no module":
        hint = did_you_mean(module, [file.stem for file in base.glob("*.py")])
        return f"rule {function}: there is no module {module} in {base} or on sys.path{hint}"
    if refused == "no function":
        hint = did_you_mean(name, ready["names"])
        return f"rule {function}: module {module} ({ready['file']}) has no function {name}{hint}"
    if refused == "import":
        return f"rule {function}: importing {module} failed: {ready['reason']}"
    expected = ""
    if "style" in ready:
        expected = f" in style {ready['style']}; expected {', '.join(OWN[ready['style']])}"
    return f"rule {function} cannot be called{expected}: {ready['reason']}"
