"""An operator's end of a campaign: look, watch, pause, let go on, stop, hand in prompts and
verdicts.

Everything is said through files in the run directory. The controller reads them between two rounds,
so none of this needs Ray or a campaign that is running; over gRPC, rayhf/service offers the same
verbs.

control.json     what is wanted of the campaign: run, pause or stop
inbox/           prompts and verdicts (rayhf/run_dir/inbox.py)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rayhf.control.status import Status, read_status
from rayhf.errors import ConfigError
from rayhf.run_dir.files import write_json
from rayhf.run_dir.inbox import submit_rows
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.state import FILE, new_state, read_state

Wanted = Literal["run", "pause", "stop"]
_POLL_S = 0.5
_FIRST_EVENTS = 10
MAX_ROWS = 10_000
"""Of one hand-in."""
MAX_ROW_BYTES = 1 << 20


def read_control(run: Path) -> Wanted:
    """ "run" where nobody asked for anything, or the file says nothing that is known."""
    try:
        wanted = json.loads((run / "control.json").read_text(encoding="utf-8"))["wanted"]
    except (OSError, ValueError, KeyError, TypeError):
        return "run"
    return wanted if wanted in ("pause", "stop") else "run"


def write_control(run: Path, wanted: Wanted) -> None:
    write_json(run / "control.json", {"wanted": wanted})


class Control(Protocol):
    """What an operator may do. Every method raises ConfigError where it makes no sense, with what
    would."""

    def status(self) -> Status: ...

    def watch(self, going: Callable[[], bool]) -> Iterator[Mapping[str, Any]]:
        """The last events, then new ones as they come, as in events.jsonl, while `going` says so;
        ends with the campaign."""
        ...

    def ask(self, wanted: Literal["pause", "stop"]) -> str:
        """Leave word; returns a line that says what will happen."""
        ...

    def unpause(self) -> str:
        """Take a pause back. Guards that paused the campaign are accepted: they only warn from now
        on."""
        ...

    def add_prompts(self, rows: Sequence[Mapping[str, Any]], *, source: str) -> str:
        """Rows as in a prompt file; they take places in the next round."""
        ...

    def pairs(self, count: int) -> Sequence[Any]:
        """The answers that the scorers are least sure about (rayhf.control.labels.UncertainPair)."""
        ...

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Verdicts on pairs: pair_id, and first, second or tie; they are trained on in the next
        round."""
        ...


class FileControl:
    """Control over a run directory that can be reached."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def status(self) -> Status:
        return read_status(self.run)

    def watch(self, going: Callable[[], bool]) -> Iterator[Mapping[str, Any]]:
        self.status()
        file, offset, first = self._newest_log(), 0, True
        while going():
            newest = self._newest_log()
            if newest != file:
                file, offset = newest, 0
            lines, offset = _whole_lines(file, offset) if file is not None else ([], 0)
            events = [json.loads(line) for line in lines]
            yield from events[-_FIRST_EVENTS:] if first else events
            first = False
            if events and events[-1]["kind"] == "end":
                return
            time.sleep(_POLL_S)

    def _newest_log(self) -> Path | None:
        return max((self.run / "logs").glob("attempt-*/events.jsonl"), default=None)

    def ask(self, wanted: Literal["pause", "stop"]) -> str:
        status = self.status()
        if status.state == "done":
            raise ConfigError(f"{self.run} is done: there is nothing to {wanted}")
        if not status.holder:
            raise ConfigError(
                f"{self.run} is not running ({status.state}): there is nobody to {wanted}; {status.advice}"
            )
        write_control(self.run, wanted)
        after = "pauses" if wanted == "pause" else "stops"
        return f"{self.run} {after} when round {status.iteration + 1} is done and committed"

    def unpause(self) -> str:
        status = self.status()
        if status.state != "paused":
            raise ConfigError(f"{self.run} is {status.state}, not paused")
        if not (read_state(self.run) or new_state())["guards"]:
            write_control(self.run, "run")
            return f"{self.run} goes on"
        lock = RunLock(self.run)  # the process that was paused must be gone, and no other may come
        try:
            state = read_state(self.run) or new_state()
            accepted = sorted({*state["accepted"], *state["guards"]})
            write_json(
                self.run / FILE,
                {**state, "state": "stopped", "reason": None, "guards": [], "accepted": accepted},
            )
        finally:
            lock.release()
        return (
            f"{self.run}: {', '.join(state['guards'])} only warns from now on; the same `rayhf run` command goes on after round "
            f"{state['iteration']}"
        )

    def add_prompts(self, rows: Sequence[Mapping[str, Any]], *, source: str) -> str:
        from rayhf.data.prompts import check_row

        _check_size(rows, "prompts")
        for number, row in enumerate(rows, start=1):
            check_row(row, f"prompts: row {number}")
        status = self.status()
        kept = [
            {key: row[key] for key in ("prompt", "messages", "answer") if key in row}
            for row in rows
        ]
        submit_rows(self.run, "prompts", kept, source=source)
        return f"{len(kept)} prompts wait for round {status.iteration + 1} or later"

    def pairs(self, count: int) -> Sequence[Any]:
        from rayhf.control.labels import unsure_pairs

        self.status()
        return unsure_pairs(self.run, count)

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        from rayhf.control.labels import check_label

        status = self.status()
        if not status.takes_labels:
            raise ConfigError(
                f"{self.run}: {status.algorithm} does not train on pairs as people judge them; "
                "online_dpo, iterative_dpo and hypo do"
            )
        _check_size(labels, "labels")
        for row in labels:
            check_label(self.run, row["pair_id"], row["verdict"])
        submit_rows(
            self.run,
            "labels",
            [{"pair_id": row["pair_id"], "verdict": row["verdict"]} for row in labels],
            source=source,
        )
        return f"{len(labels)} verdicts wait for round {status.iteration + 1} or later"


def _check_size(rows: Sequence[Mapping[str, Any]], what: str) -> None:
    if not 0 < len(rows) <= MAX_ROWS:
        raise ConfigError(f"{len(rows)} {what} at once; expected 1 to {MAX_ROWS:,}")
    for number, row in enumerate(rows, start=1):
        if (size := len(json.dumps(dict(row)))) > MAX_ROW_BYTES:
            raise ConfigError(
                f"{what}: row {number} has {size:,} bytes; expected at most {MAX_ROW_BYTES:,}"
            )


def _whole_lines(file: Path, offset: int) -> tuple[list[bytes], int]:
    """Lines that are complete, and where the next one begins."""
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(), offset + end
