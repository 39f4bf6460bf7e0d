"""The processes of one user's function: calls are divided among them, lost processes are replaced.

In: calls, in tasks of one call or, where the function takes lists, of several. Out: one Outcome per
call, in order, whatever process answered it and when.

When a process hangs or exits, one call is to blame: of a plain function the first without a
response; of a task of several, or of a coroutine function, it is found by repeating the unanswered
ones one at a time in a new process. Only that call is Failed.

Synchronization: `run` may be called from several threads; their tasks share the processes. A thread
has a process to itself for a chunk of tasks.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from rayhf.errors import ConfigError
from rayhf.scorer.rule_arguments import Call, Parameters
from rayhf.scorer.rule_process import Child, Payload
from rayhf.scorer.rule_reply import LostError, Result
from rayhf.types import Failed, Outcome

logger = logging.getLogger(__name__)

LOST_PER_PROMPT = 3
"""Calls of one prompt in a row that may be lost before its others are given up."""
LOST_PROMPTS = 4
"""Prompts in a row, with no response between them, that may be given up before all others are."""
LOST_S = 300.0
"""Time that the lost calls of one `run` may take in each process before all others are given up."""
OUTAGE_PROMPTS = 4
"""Where a function raises TimeoutError for everything, and for as many prompts, what it calls is
down. For fewer, it is their completions that take too long."""

Task = tuple[int, ...]
"""Numbers of the calls that the function gets together."""


class Losses:
    """Calls of one `run` that were lost, and what is given up because of them."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._by_prompt: dict[str, int] = {}
        self._in_a_row: set[str] = set()
        self._seconds = 0.0
        self._reason = ""

    def add(self, prompt_id: str, reason: str, seconds: float) -> None:
        """Note a lost call."""
        with self._lock:
            self._by_prompt[prompt_id] = self._by_prompt.get(prompt_id, 0) + 1
            self._seconds += seconds
            self._reason = reason
            if self._by_prompt[prompt_id] >= LOST_PER_PROMPT:
                self._in_a_row.add(prompt_id)

    def answered(self, prompt_ids: set[str]) -> None:
        """Note a response to calls of these prompts."""
        with self._lock:
            self._in_a_row.clear()
            for prompt_id in prompt_ids:
                self._by_prompt.pop(prompt_id, None)

    def skipping(self, prompt_id: str) -> str | None:
        """Return why a call of this prompt is not made; None where it is."""
        with self._lock:
            if len(self._in_a_row) >= LOST_PROMPTS:
                return f"skipped: all calls of {LOST_PROMPTS} prompts were lost: {self._reason}"
            if self._seconds >= self._limit_s:
                return f"skipped: lost calls took {self._seconds:.0f} s: {self._reason}"
            lost = self._by_prompt.get(prompt_id, 0)
            if lost >= LOST_PER_PROMPT:
                return f"skipped: {lost} calls in a row of this prompt were lost: {self._reason}"
            return None


class RulePool:
    """`workers` processes of one function.

    Args:
        name: of the function, for messages.
        start: starts a process. It is called at once for the first, and raises ConfigError where
            the function cannot be called.
        workers: number of processes.
        concurrency: calls in flight in one process of a coroutine function.
        conversational: of Parameters.arguments.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Child],
        *,
        workers: int,
        concurrency: int,
        conversational: bool | None = None,
    ) -> None:
        first = start()
        self.parameters: Parameters = first.parameters
        self.apart = first.apart
        self.unprotected = first.unprotected
        self._name = name
        self._start = start
        self._workers = workers
        self._width = concurrency if self.parameters.is_async else 1
        self._conversational = conversational
        self._fingerprint = first.fingerprint
        self._closed = False
        self._processes = [_Process(first), *(_Process(None) for _ in range(workers - 1))]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=f"rule {name}")

    def run(self, calls: Sequence[Call], *, batch: int = 1) -> list[Outcome]:
        """Return the function's results, in order; never raise for a call without one.

        `batch` calls at most go to the function together.
        """
        work = _Work(self.parameters, calls, LOST_S * self._workers, self._conversational)
        tasks = list(work.tasks(batch))
        try:
            for done in [
                self._threads.submit(self._run_chunk, work, chunk)
                for chunk in _chunks(tasks, workers=self._workers, width=self._width)
            ]:
                done.result()
        except BaseException:
            work.canceled = True
            self._interrupt()
            raise
        return work.outcomes()

    def close(self) -> None:
        """End the processes and the threads."""
        self._closed = True
        self._interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _interrupt(self) -> None:
        """Let the calls in flight end: the thread that waits for a process finds it dead."""
        for process in self._processes:
            if process.child is not None:
                process.child.interrupt()

    def _run_chunk(self, work: _Work, tasks: Sequence[Task]) -> None:
        process = self._idle.get()
        try:
            self._run_tasks(process, work, tasks)
        finally:
            self._idle.put(process)

    def _run_tasks(self, process: _Process, work: _Work, tasks: Sequence[Task]) -> None:
        """Answer all tasks, in new processes where one is lost."""
        while tasks := work.remaining(tasks):
            if work.canceled or self._closed:
                return
            if self._send(process, work, tasks) is None:
                continue
            tasks = work.remaining(tasks)
            suspects = [number for task in tasks[: self._width] for number in task]
            for number in suspects:
                self._run_alone(process, work, number, is_only=len(suspects) == 1)

    def _run_alone(self, process: _Process, work: _Work, number: int, *, is_only: bool) -> None:
        """Answer one call that a process was lost with."""
        reason = process.lost_with
        seconds = process.lost_after_s
        if not is_only:  # others were in flight with it
            if work.canceled or self._closed or not work.remaining([(number,)]):
                return
            lost = self._send(process, work, [(number,)])
            if lost is None:
                return
            reason, seconds = lost, process.lost_after_s
        prompt = work.calls[number][0]
        logger.warning(
            "rule %s: %s for prompt %s; restarting its process",
            self._name,
            reason,
            prompt.prompt_id,
        )
        work.results[number] = Failed(reason=reason)
        work.losses.add(prompt.prompt_id, reason, seconds)

    def _send(self, process: _Process, work: _Work, tasks: Sequence[Task]) -> str | None:
        """Make calls in one process. Return why it was lost with some of them; None if it was not.

        Where no process can be started, every call is Failed.
        """
        try:
            child = process.live(self._restart)
        except (ConfigError, OSError) as error:
            failed = Failed(reason=f"the rule's process could not be restarted: {error}")
            work.fail(tasks, failed)
            return None
        began = time.monotonic()
        try:
            for position, results in child.call([work.payload(task) for task in tasks]):
                work.answer(tasks[position], results)
                began = time.monotonic()
        except (LostError, OSError) as lost:
            process.kill()
            process.lost_with = str(lost)
            process.lost_after_s = time.monotonic() - began
            return process.lost_with
        return None

    def _restart(self) -> Child:
        child = self._start()
        if child.fingerprint != self._fingerprint:
            child.kill()
            raise ConfigError(f"the source of {self._name} changed since the scorer started")
        return child


class _Process:
    """A place for one process at a time, used by one thread at a time."""

    def __init__(self, child: Child | None) -> None:
        self.child = child
        self.lost_with = ""
        """Why the last process was lost."""
        self.lost_after_s = 0.0
        """Time that its last call took."""

    def live(self, start: Callable[[], Child]) -> Child:
        """Return the running process, or a new one."""
        if self.child is not None and not self.child.is_alive():
            self.kill()
        if self.child is None:
            self.child = start()
        return self.child

    def kill(self) -> None:
        """End the process, if there is one."""
        if self.child is not None:
            self.child.kill()
            self.child = None


class _Work:
    """The calls of one `run` and their results."""

    def __init__(
        self,
        parameters: Parameters,
        calls: Sequence[Call],
        lost_s: float,
        conversational: bool | None,
    ) -> None:
        self.calls = calls
        self.results: list[Outcome | None] = [None] * len(calls)
        self.losses = Losses(lost_s)
        self.canceled = False
        self._late: set[int] = set()
        """Calls whose function raised TimeoutError."""
        self._alone: set[int] = set()
        """Calls to be made without others, since the function raised for several together."""
        self._parameters = parameters
        self._conversational = conversational
        for number, (prompt, _) in enumerate(calls):
            missing = self._parameters.missing(prompt.row)
            if missing is not None:
                self.results[number] = Failed(reason=missing)

    def tasks(self, batch: int) -> Iterator[Task]:
        """Yield tasks of up to `batch` calls; a prompt's calls stay together where they fit."""
        size = batch if self._parameters.style == "trl" else 1
        task: list[int] = []
        for group in self._by_prompt():
            if task and len(task) + len(group) > size:
                yield tuple(task)
                task = []
            task += group
            while len(task) > size:
                yield tuple(task[:size])
                task = task[size:]
        if task:
            yield tuple(task)

    def _by_prompt(self) -> Iterator[list[int]]:
        """Yield the calls that can be made, those of each prompt together."""
        group: list[int] = []
        for number, (prompt, _) in enumerate(self.calls):
            if self.results[number] is not None:
                continue
            if group and self.calls[group[0]][0] is not prompt:
                yield group
                group = []
            group.append(number)
        if group:
            yield group

    def payload(self, task: Task) -> Payload:
        """Return what the process gets for one task."""
        arguments = self._parameters.arguments(
            [self.calls[number] for number in task], conversational=self._conversational
        )
        # Not ascii: escapes would join a lone pair of surrogates into one character on the other
        # side.
        text = json.dumps(arguments, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return len(task), text

    def remaining(self, tasks: Sequence[Task]) -> list[Task]:
        """Return what is still to be answered; give up what was lost too often."""
        left = []
        for task in tasks:
            open_calls = [number for number in task if self.results[number] is None]
            for number in list(open_calls):
                reason = self.losses.skipping(self.calls[number][0].prompt_id)
                if reason is not None:
                    self.results[number] = Failed(reason=reason)
                    open_calls.remove(number)
            if self._alone.isdisjoint(open_calls):
                left += [tuple(open_calls)] if open_calls else []
            else:
                left += [(number,) for number in open_calls]
        return left

    def answer(self, task: Task, results: Sequence[Result]) -> None:
        """Note the results of one task. Raise LostError where the process must be replaced.

        Where a function raised for several completions together, they stay open.
        """
        statuses = {status for status, _ in results}
        for status, outcome in results:
            if status == "broken" and isinstance(outcome, Failed):
                raise LostError(outcome.reason)
        if "hung" not in statuses:
            self.losses.answered({self.calls[number][0].prompt_id for number in task})
        if len(task) > 1 and statuses & {"failed", "hung", "late", "unreachable"}:
            self._alone.update(task)
            return
        for number, (status, outcome) in zip(task, results, strict=True):
            self.results[number] = outcome
            if status == "late":
                self._late.add(number)
            if status == "hung" and isinstance(outcome, Failed):  # its process went on with others
                self.losses.add(self.calls[number][0].prompt_id, outcome.reason, 0.0)

    def fail(self, tasks: Sequence[Task], failed: Failed) -> None:
        """Give all calls of the tasks the same outcome."""
        for task in tasks:
            for number in task:
                self.results[number] = failed

    def outcomes(self) -> list[Outcome]:
        """Return the results of all calls."""
        outcomes = [
            Failed(reason="the scorer was closed") if result is None else result
            for result in self.results
        ]
        prompts = {prompt.prompt_id for prompt, _ in self.calls}
        if len(self._late) == len(outcomes) and len(prompts) >= OUTAGE_PROMPTS:
            return [
                Failed(reason=outcome.reason, transient=True)
                for outcome in outcomes
                if isinstance(outcome, Failed)
            ]
        return outcomes


def _chunks(tasks: Sequence[Task], *, workers: int, width: int) -> Iterator[Sequence[Task]]:
    """Divide tasks into chunks that get smaller, so that all processes end at the same time.

    Those of a coroutine function are small: what hangs is given up from one chunk to the next.
    """
    start = 0
    while start < len(tasks):
        left = len(tasks) - start
        size = left if workers == 1 else max(width, left // (4 * workers))
        if width > 1:
            size = min(size, 4 * width)
        yield tasks[start : start + size]
        start += size
