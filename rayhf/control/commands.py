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
from rayhf.errors import ConfigError
from rayhf.run_dir.inbox import submit_rows
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.operator_request import write_request
from rayhf.run_dir.progress import Event, parse_event
from rayhf.run_dir.state import CampaignState, read_state, write_state

if TYPE_CHECKING:
    from rayhf.control.labels import UncertainPair

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

    def unpause(self) -> str:
        """Resume a paused campaign; guards that paused it are accepted and only warn from then."""
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
        return max((self.run / "logs").glob("attempt-*/events.jsonl"), default=None)

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

    def unpause(self) -> str:
        """Resume a paused campaign; guards that paused it are accepted."""
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
            campaign = self._campaign()
            accepted = sorted({*campaign.accepted, *campaign.guards})
            changes = {
                "state": "stopped",
                "reason": None,
                "guards": (),
                "accepted": tuple(accepted),
            }
            write_state(self.run, campaign.model_copy(update=changes))
        finally:
            lock.release()
        return (
            f"{self.run}: {', '.join(campaign.guards)} only warns from now on; the same "
            f"`rayhf run` command continues after iteration {campaign.iteration}"
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
        for label in labels:
            check_label(self.run, label["pair_id"], label["verdict"])
        rows = [{key: label[key] for key in ("pair_id", "verdict")} for label in labels]
        submit_rows(self.run, "labels", rows, source=source)
        return f"{len(labels)} labels submitted for iteration {status.iteration + 1} or later"


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
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(), offset + end
