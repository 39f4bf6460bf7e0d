"""Operator commands on a campaign: status, watch, pause, unpause, stop, add prompts, label.

Everything goes through files in the run directory, which the controller reads between two
iterations: no command needs Ray or a running campaign. rayhf/control/grpc_client.py offers the same
commands for a campaign elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from rayhf.control.status import Status, read_status
from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.checkpoints import accept_unhealthy
from rayhf.run_dir.files import MANIFEST, Check, open_file, sha256
from rayhf.run_dir.inbox import Submissions, Submitted, check_submission, label_id
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.names import event_logs
from rayhf.run_dir.operator_request import write_request
from rayhf.run_dir.progress import Event, parse_event
from rayhf.run_dir.state import CampaignState, read_state, write_state
from rayhf.types import JsonObject

if TYPE_CHECKING:
    from rayhf.control.questions import UncertainCompletion, UncertainPair

Start = Literal["unhealthy", "healthy"]
"""From which checkpoint a campaign continues after a guard's pause."""
_POLL_S = 0.5
_FIRST_EVENTS = 10
"""Past events that `watch` shows."""
MAX_ROWS = 10_000
"""Rows of one submission."""
_PIECE = 1 << 18
"""Bytes of an event log that are read at once; a longer line is skipped."""


class Control(Protocol):
    """The operator commands.

    Every method raises ConfigError where the command makes no sense, and says which would. Methods
    that return a string return one line that says what will happen.
    """

    def status(self) -> Status:
        """Return the campaign's status."""
        ...

    def watch(self, is_active: Callable[[], bool]) -> Iterator[Event]:
        """Yield the last events, then new ones as they come.

        Ends with the campaign, or soon after `is_active` returns False.
        """
        ...

    def request(self, request: Literal["pause", "stop"]) -> str:
        """Request that the campaign pauses or stops after its current iteration."""
        ...

    def unpause(self, *, start: Start = "unhealthy") -> str:
        """Resume a paused campaign.

        Args:
            start: after a guard's pause, "unhealthy" continues after the iteration that the guard
                objected to, and the guard only warns from then; "healthy" repeats from the last
                healthy commit, and the guard stays active.
        """
        ...

    def add_prompts(self, rows: Sequence[Mapping[str, object]], *, source: str) -> str:
        """Submit prompts, as rows of a prompt file, for the next iteration."""
        ...

    def uncertain_pairs(self, count: int) -> Sequence[UncertainPair]:
        """Return the pairs of completions that the scorers are least certain about."""
        ...

    def uncertain_completions(self, count: int) -> Sequence[UncertainCompletion]:
        """Return the single completions that the scorers are least certain about."""
        ...

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Submit labels: `pair_id`, and `verdict` (first, second or tie).

        Of a single completion `completion_id`, and `verdict` (up or down).
        """
        ...


class FileControl:
    """Control through a run directory that this process can read and write."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._prompts = Submissions(run, "prompts")
        self._labels = Submissions(run, "labels")

    def status(self) -> Status:
        """Return the campaign's status."""
        return read_status(self.run)

    def watch(self, is_active: Callable[[], bool]) -> Iterator[Event]:
        """Yield the last events, then new ones as they come."""
        self.status()
        log = self._newest_log()
        offset = 0 if log is None else max(0, log.stat().st_size - _PIECE)
        is_first = True
        while is_active():
            newest = self._newest_log()
            if newest != log:
                log = newest
                offset = 0
            lines, offset = ([], 0) if log is None else _complete_lines(log, offset)
            events = [event for line in lines if (event := parse_event(line)) is not None]
            yield from events[-_FIRST_EVENTS:] if is_first else events
            is_first = False
            if events and events[-1].kind == "end":
                return
            if not lines:
                time.sleep(_POLL_S)

    def _newest_log(self) -> Path | None:
        logs = event_logs(self.run)
        return logs[-1] if logs else None

    def request(self, request: Literal["pause", "stop"]) -> str:
        """Request that the campaign pauses or stops after its current iteration."""
        status = self.status()
        if status.state == "done":
            raise ConfigError(f"{self.run} is done: there is nothing to {request}")
        if not status.holder:
            raise ConfigError(
                f"{self.run} is not running ({status.state}), so it cannot {request}; "
                f"{status.advice}"
            )
        write_request(self.run, request)
        action = "pauses" if request == "pause" else "stops"
        return f"{self.run} {action} once iteration {status.iteration + 1} is committed"

    def unpause(self, *, start: Start = "unhealthy") -> str:
        """Resume a paused campaign."""
        status = self.status()
        if status.state != "paused":
            raise ConfigError(f"{self.run} is {status.state}, not paused")
        if not self._campaign().guards:
            write_request(self.run, "run")
            return f"{self.run} resumes"
        # The lock is free only once the paused process has ended, and keeps another one from
        # starting meanwhile.
        lock = RunLock(self.run)
        try:
            return self._end_pause(self._campaign(), start, lock.check)
        finally:
            lock.release()

    def _end_pause(self, campaign: CampaignState, start: Start, check: Check) -> str:
        """End a guard's pause in campaign.json; return what will happen."""
        changes: dict[str, object] = {
            "state": "stopped",
            "reason": None,
            "guards": (),
            "unhealthy": None,
        }
        guards = ", ".join(campaign.guards)
        word = f"{guards} stays active"
        problem = ""
        if start == "unhealthy":
            changes["accepted"] = tuple(sorted({*campaign.accepted, *campaign.guards}))
            word = f"{guards} only warns from now on"
            try:
                changes |= _accepted_checkpoint(self.run, campaign)
            except CheckpointError as error:
                problem = f"{error}, so the last healthy checkpoint is used; "
        continued = campaign.model_copy(update=changes)
        write_state(self.run, continued, check)
        return (
            f"{self.run}: {problem}{word}; the same `rayhf run` command continues after iteration "
            f"{continued.iteration}"
        )

    def _campaign(self) -> CampaignState:
        return read_state(self.run) or CampaignState()

    def add_prompts(self, rows: Sequence[Mapping[str, object]], *, source: str) -> str:
        """Submit prompts for the next iteration."""
        kept = checked_prompts(rows)
        status = self.status()
        submitted = self._prompts.submit(kept, source=source)
        return _confirmation("prompts", submitted, status)

    def uncertain_pairs(self, count: int) -> Sequence[UncertainPair]:
        """Return the pairs of completions that the scorers are least certain about."""
        from rayhf.control.questions import uncertain_pairs

        self.status()
        return uncertain_pairs(self.run, count, labeled=self._labeled())

    def uncertain_completions(self, count: int) -> Sequence[UncertainCompletion]:
        """Return the single completions that the scorers are least certain about."""
        from rayhf.control.questions import uncertain_completions

        self.status()
        return uncertain_completions(self.run, count, labeled=self._labeled())

    def _labeled(self) -> set[str]:
        return {judged for judged, _ in self._labels.last()}

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Submit labels of pairs or of single completions for the next iteration."""
        from rayhf.control.labels import check_labels, contradictions

        status = self.status()
        if not status.takes_labels:
            raise ConfigError(
                f"{self.run}: the algorithm {status.algorithm} does not train on human labels"
            )
        check_count(labels, "labels")
        rows = check_labels(self.run, labels)
        if not status.takes_thumbs and any("completion_id" in row for row in rows):
            raise ConfigError(
                f"{self.run}: the algorithm {status.algorithm} trains on pairs, not on single "
                "completions; expected `pair_id` and a verdict first, second or tie"
            )
        submitted = self._labels.submit(rows, source=source)
        here = set(map(label_id, rows))
        line = contradictions(
            (judged, verdict.partition(" ")[0])
            for (judged, _), verdict in self._labels.last().items()
            if judged in here
        )
        return "; ".join(filter(None, [_confirmation("labels", submitted, status), line]))


def checked_prompts(rows: Sequence[Mapping[str, object]]) -> list[JsonObject]:
    """Return prompts as they are stored. Raises ConfigError; see `check_submission`."""
    check_count(rows, "prompts")
    keys = ("prompt", "messages", "answer")
    return [
        check_submission(
            {key: row[key] for key in keys if key in row}, "prompts", f"prompts: row {number}"
        )
        for number, row in enumerate(rows, start=1)
    ]


def check_count(rows: Sequence[object], what: str) -> None:
    """Raise ConfigError for a submission of no rows, and of too many."""
    if not 0 < len(rows) <= MAX_ROWS:
        raise ConfigError(f"{len(rows)} {what} at once; expected 1 to {MAX_ROWS:,}")


def _confirmation(what: str, submitted: Submitted, status: Status) -> str:
    parts = [f"{submitted.new} {what} submitted for iteration {status.iteration + 1} or later"]
    if submitted.repeated:
        parts.append(f"{submitted.repeated} were submitted before")
    if submitted.replaced:
        parts.append(f"{submitted.replaced} replace an earlier verdict of yours")
    return "; ".join(parts)


def _accepted_checkpoint(run: Path, campaign: CampaignState) -> dict[str, object]:
    """Make the unhealthy checkpoint the newest; return what changes in campaign.json.

    Raises CheckpointError where it is damaged.
    """
    if campaign.unhealthy is None:
        return {}
    directory = run / "checkpoints" / campaign.unhealthy
    checkpoint = accept_unhealthy(directory, epoch=campaign.epoch)
    return {
        "iteration": checkpoint.iteration,
        "checkpoint": checkpoint.directory.name,
        "manifest": sha256(checkpoint.directory / MANIFEST),
    }


def _complete_lines(file: Path, offset: int) -> tuple[list[bytes], int]:
    """Return complete lines of one piece from `offset` on, and where the next one begins.

    An incomplete line that is as long as a piece is skipped.
    """
    with open_file(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(_PIECE)
    end = data.rfind(b"\n") + 1
    if not end and len(data) == _PIECE:
        return [b""], offset + _PIECE
    return data[:end].splitlines(), offset + end
