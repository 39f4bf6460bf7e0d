"""Templates rendered in a process of their own, with limits on time, memory and size.

A chat template comes with a model, and what a template renders may come from anywhere: either may
loop, or fill the memory. All templates of a process share one child (jinja_child.py), which is
started at the first rendering, and again after one that ended it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rayhf.data.jinja_child import CPU_S, MEMORY_BYTES
from rayhf.errors import ConfigError

Kind = Literal["chat", "text", "text_newline", "expression"]
MAX_TEXT = 4 << 20
"""Characters of a rendered text."""
_CHILD = Path(__file__).with_name("jinja_child.py")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LANG")
_SILENCE_S = 120.0
"""Wall-clock limit, for a machine on which the child gets no CPU time."""


class TemplateFailedError(ValueError):
    """A template or an expression that failed; its text is one line."""

    def __init__(
        self, kind: str, message: str, *, refuses: bool = False, line: int | None = None
    ) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        """Name of the error's class."""
        self.message = message
        self.refuses = refuses
        """Whether jinja2 or the template itself refuses its input."""
        self.line = line


class SandboxedTemplate:
    """A template whose undefined variables are errors.

    Raises TemplateFailedError where it is not valid; with a config key, ConfigError that names it.
    """

    def __init__(self, source: str, *, key: str = "", keep_trailing_newline: bool = False) -> None:
        self._kind: Kind = "text_newline" if keep_trailing_newline else "text"
        self._source = source
        self._key = key
        self._evaluate([])

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text. Raises as the class."""
        (text,) = self._evaluate([variables])
        return str(text)

    def _evaluate(self, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        try:
            results = list(evaluate(self._kind, self._source, items))
            if results and isinstance(results[0], TemplateFailedError):
                raise results[0]
            return results
        except TemplateFailedError as error:
            if not self._key:
                raise
            raise ConfigError(f"{self._key}: {error}") from None


def evaluate(
    kind: Kind, source: str, items: Sequence[Mapping[str, Any]], *, limit: int = MAX_TEXT
) -> Iterator[Any]:
    """Yield the text (or value), or a TemplateFailedError, for the variables of each rendering.

    Raises TemplateFailedError where the source is not valid.
    """
    done = 0
    while True:
        results = _worker.run(kind, source, items[done:], limit)
        for result in results:
            done += 1
            yield result
        if done == len(items):
            return


class _Worker:
    """The parent's end of the child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def run(
        self, kind: Kind, source: str, items: Sequence[Mapping[str, Any]], limit: int
    ) -> list[Any]:
        """Return the results of the first items, up to one that ended the child."""
        job = {"kind": kind, "source": source, "limit": limit, "items": list(items)}
        line = json.dumps(job, default=dict) + "\n"
        with self._lock:
            process = self._started()
            late = threading.Timer(_SILENCE_S + CPU_S * (len(items) + 1), process.kill)
            late.daemon = True
            late.start()
            try:
                return self._exchange(process, line, len(items))
            finally:
                late.cancel()

    def _exchange(self, process: subprocess.Popen[str], line: str, count: int) -> list[Any]:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        if isinstance(compiled := self._result(process), TemplateFailedError):
            raise compiled
        results: list[Any] = []
        while len(results) < count and self._process is process:
            results.append(self._result(process))
        return results

    def _result(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            return self._lost(process)
        answer = json.loads(line)
        if "value" in answer:
            return answer["value"]
        error = answer["error"]
        return TemplateFailedError(
            error["type"], error["message"], refuses=error["refuses"], line=error["line"]
        )

    def _lost(self, process: subprocess.Popen[str]) -> TemplateFailedError:
        """Forget the child; return why it ended."""
        self._process = None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if code == -signal.SIGPROF:
            return TemplateFailedError("TimeoutError", f"no end after {CPU_S:g} s of CPU time")
        return TemplateFailedError(
            "MemoryError",
            f"its process ended (exit code {code}); it may use {MEMORY_BYTES >> 20:,} MiB",
        )

    def _started(self) -> subprocess.Popen[str]:
        # After a fork, the pipes are the parent's.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment | {"PYTHONIOENCODING": "utf-8"},
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._process

    def close(self) -> None:
        """End the child."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
            self._process = None


_worker = _Worker()
atexit.register(_worker.close)
