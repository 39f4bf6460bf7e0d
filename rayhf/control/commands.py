"""Operator commands on a campaign: status, watch, pause, unpause, stop, add prompts, label.

Everything goes through files in the run directory, which the controller reads between two
iterations: no command needs Ray or a running campaign. rayhf/control/grpc_client.py offers the same
commands for a campaign elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from rayhf.control.status import Status, read_status
from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.checkpoints import accept_unhealthy
from rayhf.run_dir.files import MANIFEST, Check, open_file, sha256
from rayhf.run_dir.inbox import submit_rows
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.names import event_logs
from rayhf.run_dir.operator_request import write_request
from rayhf.run_dir.progress import Event, parse_event
from rayhf.run_dir.state import CampaignState, read_state, write_state

if TYPE_CHECKING:
    from rayhf.control.labels import UncertainPair

Start = Literal["unhealthy", "healthy"]
"""From which checkpoint a campaign continues after a guard's pause."""
_POLL_S = 0.5
_FIRST_EVENTS = 10
"""Past events that `watch` shows."""
MAX_ROWS = 10_000
"""Rows of one submission."""
MAX_ROW_BYTES = 1 << 20


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

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Submit labels of pairs: `pair_id`, and `verdict` (first, second or tie)."""
        ...


class FileControl:
    """Control through a run directory that this process can read and write."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def status(self) -> Status:
        """Return the campaign's status."""
        return read_status(self.run)

    def watch(self, is_active: Callable[[], bool]) -> Iterator[Event]:
        """Yield the last events, then new ones as they come."""
        self.status()
        file = self._newest_log()
        offset = 0
        is_first = True
        while is_active():
            newest = self._newest_log()
            if newest != file:
                file = newest
                offset = 0
            lines, offset = _complete_lines(file, offset) if file is not None else ([], 0)
            events = [event for line in lines if (event := parse_event(line)) is not None]
            yield from events[-_FIRST_EVENTS:] if is_first else events
            is_first = False
            if events and events[-1].kind == "end":
                return
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
        from rayhf.data.prompts import check_row

        _check_size(rows, "prompts")
        for number, row in enumerate(rows, start=1):
            check_row(row, f"prompts: row {number}")
        status = self.status()
        keys = ("prompt", "messages", "answer")
        kept = [{key: row[key] for key in keys if key in row} for row in rows]
        submit_rows(self.run, "prompts", kept, source=source)
        return f"{len(kept)} prompts submitted for iteration {status.iteration + 1} or later"

    def uncertain_pairs(self, count: int) -> Sequence[UncertainPair]:
        """Return the pairs of completions that the scorers are least certain about."""
        from rayhf.control.labels import uncertain_pairs

        self.status()
        return uncertain_pairs(self.run, count)

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Submit labels of pairs for the next iteration."""
        from rayhf.control.labels import check_label

        status = self.status()
        if not status.takes_labels:
            raise ConfigError(
                f"{self.run}: the algorithm {status.algorithm} does not train on human labels"
            )
        _check_size(labels, "labels")
        rows = []
        for label in labels:
            completions = check_label(self.run, label["pair_id"], label["verdict"])
            row = {key: label[key] for key in ("pair_id", "verdict")}
            rows.append({**row, "completions": completions})
        submit_rows(self.run, "labels", rows, source=source)
        return f"{len(labels)} labels submitted for iteration {status.iteration + 1} or later"


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


def _check_size(rows: Sequence[Mapping[str, object]], what: str) -> None:
    """Raise ConfigError for a submission of no rows, of too many, or of one too large."""
    if not 0 < len(rows) <= MAX_ROWS:
        raise ConfigError(f"{len(rows)} {what} at once; expected 1 to {MAX_ROWS:,}")
    for number, row in enumerate(rows, start=1):
        if (size := len(json.dumps(dict(row)))) > MAX_ROW_BYTES:
            raise ConfigError(
                f"{what}: row {number} has {size:,} bytes; expected at most {MAX_ROW_BYTES:,}"
            )


def _complete_lines(file: Path, offset: int) -> tuple[list[bytes], int]:
    """Return the complete lines from `offset` on, and where the next one begins."""
    with open_file(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(), offset + end
