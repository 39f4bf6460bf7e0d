"""Rule functions of the user, run in a child process that may hang, crash or grow without harm to the campaign.

In: ScoreRequests. Out: one Outcome per completion (Rule), or one verdict per pair of completions (PairwiseRule). Calls are
pipelined to the child (rule_child.py) over a pipe and answered in order. Whoever is first in the queue is the one being
judged: it alone is Failed when no answer comes within the time limit or the child dies; a fresh child goes on behind it.
The parent waits for the child, never longer than the limit per call; the child waits for lines, and dies with the parent.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError
from rayhf.experience import Comparison, Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest
from rayhf.scorer.pairs import Pair, compare_pairs, compare_scores, mean_wins

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("rule_child.py")
_SPEC = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
START_TIMEOUT_S = 60.0
"""For importing the user's module, in seconds."""
MAX_LOST = 3
"""Calls in a row that may hang or kill the child before the rest is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a function of the user is called; with `messages`, too, where it accepts that."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.positional)}, *, {', '.join(self.keywords)}"


ONE = Signature(positional=("completion",), keywords=("prompt", "answer", "finish_reason"))
TWO = Signature(positional=("first", "second"), keywords=("prompt", "answer"))


class _RuleProcess:
    """One function of the user in its own process. One caller at a time.

    Args:
        function: `module:function`, called with `signature`. `prompt` is the content of the last user message.
        base: first on the child's sys.path, and its working directory.
        timeout_s: limit per call, in seconds.
        memory_bytes: limit on the child's address space.

    Raises ConfigError where the function cannot be imported or called.
    """

    signature = ONE

    def __init__(self, function: str, *, base: Path, timeout_s: float = 10.0, memory_bytes: int = 4 << 30) -> None:
        self._function, self._base = function, base
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._child: _Child | None = self._start()
        self.fingerprint = self._child.fingerprint
        """SHA-256 of the module's source file, as first loaded."""

    def _call(self, calls: Sequence[tuple[Prompt, tuple[Completion, ...]]]) -> list[Outcome]:
        """What the function says of each, in order. Never raises for one that the function cannot judge."""
        lines = [_encode(number, prompt, shown, self.signature) for number, (prompt, shown) in enumerate(calls)]
        outcomes: list[Outcome] = []
        lost = 0
        try:
            while len(outcomes) < len(lines) and lost < MAX_LOST:
                before = len(outcomes)
                alive = self._judge(lines, outcomes)
                lost = 0 if alive else 1 if len(outcomes) > before + 1 else lost + 1
        except BaseException:
            self.close()  # answers may still be under way; the next call starts with a clean pipe
            raise
        if missing := len(lines) - len(outcomes):
            # A rule that hangs on everything would take timeout_s for each call of the round.
            last = outcomes[-1]
            reason = last.reason if isinstance(last, Failed) else ""
            outcomes.extend([Failed(reason=f"not judged, {lost} in a row were lost: {reason}")] * missing)
        return outcomes

    def close(self) -> None:
        """Kill the child. A later call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _judge(self, lines: list[bytes], outcomes: list[Outcome]) -> bool:
        """Append outcomes until all are there (True), or the child is lost, which costs the call it was at (False)."""
        try:
            child = self._live_child()
        except (ConfigError, OSError) as error:
            reason = f"the rule's process could not be started again: {error}"
            outcomes.extend([Failed(reason=reason)] * (len(lines) - len(outcomes)))
            return True
        try:
            for kind, value in child.answers(lines, first=len(outcomes), timeout_s=self._timeout_s):
                if kind == "scored":
                    outcomes.append(Scored(value=value))
                elif kind == "invalid":
                    outcomes.append(Invalid(reason=value))
                elif kind in ("failed", "unreachable"):
                    outcomes.append(Failed(reason=value, transient=kind == "unreachable"))
                else:
                    raise _LostError(value)
        except _LostError as lost:
            logger.warning("rule %s: %s; starting a fresh process", self._function, lost)
            outcomes.append(Failed(reason=str(lost)))
            self.close()
            return False
        return True

    def _live_child(self) -> _Child:
        if self._child is not None and not self._child.alive():
            self.close()
        if self._child is None:
            child = self._start()
            if child.fingerprint != self.fingerprint:
                child.kill()
                raise ConfigError(f"the source of {self._function} changed since the scorer started")
            self._child = child
        return self._child

    def _start(self) -> _Child:
        return _Child(self._function, self.signature, base=self._base, memory_bytes=self._memory_bytes)


class Rule(_RuleProcess):
    """`function(completion, *, prompt, answer, finish_reason) -> float`: a score for each completion."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion, in order. Never raises for a completion that the rule cannot judge."""
        outcomes = iter(
            self._call([(request.prompt, (completion,)) for request in requests for completion in request.completions])
        )
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Sigmoids of score differences."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]


class PairwiseRule(_RuleProcess):
    """`function(first, second, *, prompt, answer) -> float`: the probability that the first text is better than the second.

    Asked once for each i < j and mirrored; equal texts are 1/2 and nobody is asked. A number outside [0, 1] is Invalid.
    """

    signature = TWO

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """One matrix per request, NaN for a pair that the rule cannot judge."""
        pairs = [list(combinations(range(len(request.completions)), 2)) for request in requests]
        verdicts: list[dict[Pair, float | Invalid | Failed]] = [dict.fromkeys(of_request, 0.5) for of_request in pairs]
        asked: list[tuple[int, Pair]] = []
        calls: list[tuple[Prompt, tuple[Completion, ...]]] = []
        for index, (request, of_request) in enumerate(zip(requests, pairs, strict=True)):
            for i, j in of_request:
                if request.completions[i].text != request.completions[j].text:
                    asked.append((index, (i, j)))
                    calls.append((request.prompt, (request.completions[i], request.completions[j])))
        for (index, pair), outcome in zip(asked, self._call(calls), strict=True):
            verdicts[index][pair] = _probability(outcome)
        return [compare_pairs(len(request.completions), known) for request, known in zip(requests, verdicts, strict=True)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Mean win probability against the request's other completions."""
        compared = zip(requests, self.compare(requests), strict=True)
        return [mean_wins(comparison, len(request.completions)) for request, comparison in compared]


def _probability(outcome: Outcome) -> float | Invalid | Failed:
    if not isinstance(outcome, Scored):
        return outcome
    if not 0.0 <= outcome.value <= 1.0:
        return Invalid(reason=f"the rule returned {outcome.value:g}, not a probability")
    return outcome.value


def check_function(function: str, *, base: Path, signature: Signature = ONE) -> None:
    """Import the function in a child, as Rule will. Raises ConfigError with one line that names module and function."""
    _Child(function, signature, base=base, memory_bytes=4 << 30).kill()


class _LostError(Exception):
    """The child did not answer the call it was at: too slow, dead, or broken. The message is the reason."""


class _Child:
    """The parent's end of one rule_child.py process. Raises ConfigError unless the rule is ready to be called."""

    def __init__(self, function: str, signature: Signature, *, base: Path, memory_bytes: int) -> None:
        module, name = parse_function(function)
        base = base.resolve()
        if not base.is_dir():
            raise ConfigError(f"rule {function}: {base} is not a directory")
        self._spawn(base)
        self._buffer = b""
        path = [str(base), *(entry for entry in sys.path if entry not in ("", str(base)))]
        hello = {
            "path": path, "module": module, "function": name, "memory_bytes": memory_bytes,
            "positional": signature.positional, "keywords": signature.keywords,
        }  # fmt: skip
        try:
            ready = next(self._exchange([json.dumps(hello).encode() + b"\n"], START_TIMEOUT_S))
        except _LostError as lost:
            self.kill()
            raise ConfigError(f"rule {function}: {module} could not be imported from {base}: {lost}") from None
        if not ready.get("ready"):
            self.kill()
            raise ConfigError(_refusal(function, signature, base, ready))
        self.fingerprint: str = ready["fingerprint"]

    def _spawn(self, base: Path) -> None:
        request_in, self._requests = os.pipe()
        self._replies, reply_out = os.pipe()
        life_in, self._life = os.pipe()
        inherited = (request_in, reply_out, life_in)
        environment = os.environ | {
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

    def answers(self, lines: Sequence[bytes], *, first: int, timeout_s: float) -> Iterator[tuple[str, Any]]:
        """(kind, value) for lines[first:], as they come. Raises _LostError when one does not."""
        for number, answer in enumerate(self._exchange(lines[first:], timeout_s), first):
            if not (isinstance(answer, list) and len(answer) == 3 and answer[0] == number):
                raise _LostError("the rule's process answered out of order")
            yield answer[1], answer[2]

    def _exchange(self, lines: Sequence[bytes], timeout_s: float) -> Iterator[Any]:
        """Send all lines while reading one answer per line: neither side waits for the other's full pipe."""
        outgoing, missing = memoryview(b"".join(lines)), len(lines)
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while missing:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise _LostError(f"no answer within {timeout_s:g} s")
            if self._requests in ready:
                outgoing = self._write(outgoing)
                deadline = time.monotonic() + timeout_s  # a long text on its way is not the rule's time
                if not outgoing:
                    poll.unregister(self._requests)
            if self._replies in ready:
                data = os.read(self._replies, 1 << 16)
                if not data:
                    raise _LostError(f"the rule's process died: {self._cause_of_death()}")
                *answers, self._buffer = (self._buffer + data).split(b"\n")
                if answers:
                    deadline = time.monotonic() + timeout_s
                missing -= len(answers)
                for answer in answers:
                    yield _parse(answer)

    def _write(self, outgoing: memoryview) -> memoryview:
        """What is left to send; nothing once the child has gone, since its last answers are still to be read."""
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
        """End the child and every process of its session's group."""
        with suppress(ProcessLookupError):  # already gone, and nothing it started is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for fd in (self._requests, self._replies, self._life):
            os.close(fd)


def parse_function(function: str) -> tuple[str, str]:
    """("module", "function"). Raises ConfigError with the nearest valid form."""
    match = _SPEC.fullmatch(function)
    if match is None:
        head, _, tail = function.replace(".py:", ":").replace("/", ".").rpartition(":" if ":" in function else ".")
        guess = f"{head.strip('.')}:{tail}"
        hint = f"; did you mean {guess}?" if _SPEC.fullmatch(guess) else ""
        raise ConfigError(f"rule {function!r} is not of the form module:function{hint}")
    return match["module"], match["function"]


def _refusal(function: str, signature: Signature, base: Path, answer: dict[str, Any]) -> str:
    module, name = parse_function(function)
    if answer["refused"] == "no module":
        modules = [file.stem for file in base.glob("*.py")]
        return f"rule {function}: there is no module {module} in {base} or on sys.path{_nearest(module, modules)}"
    if answer["refused"] == "no function":
        return f"rule {function}: module {module} has no function {name}{_nearest(name, answer['names'])}"
    if answer["refused"] == "import":
        return f"rule {function}: importing {module} failed: {answer['reason']}"
    return f"rule {function} cannot be called as {name}({signature}): {answer['reason']}"


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise _LostError("the rule's process sent something other than an answer") from None


def _encode(number: int, prompt: Prompt, shown: Sequence[Completion], signature: Signature) -> bytes:
    messages = [dict(message) for message in prompt.messages]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    known = {
        "prompt": contents[-1] if contents else messages[-1]["content"],
        "answer": prompt.answer,
        "finish_reason": shown[0].finish_reason,
    }
    context = {keyword: known[keyword] for keyword in signature.keywords}
    request = [number, [completion.text for completion in shown], context, messages]
    # Not ascii: escapes would join a lone pair of surrogates into one character on the other side.
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
