"""The files of one run directory, read without a lock and while a campaign may write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rayhf.control.status import Status, read_status
from rayhf.errors import ConfigError
from rayhf.run_dir.files import MANIFEST
from rayhf.run_dir.identity import read_config
from rayhf.run_dir.inbox import RowFile, label_id
from rayhf.run_dir.names import event_logs, numbered
from rayhf.run_dir.progress import Event, parse_event
from rayhf.run_dir.records import read_metrics
from rayhf.run_dir.state import CampaignState, read_state
from rayhf.view.tokens import TokenTexts

MAX_DEPTH = 6
"""Levels of directories that are searched for runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedEvent:
    """An event, and the iteration that was under way."""

    event: Event
    iteration: int


class Run:
    """Read access to one run directory.

    Raises ConfigError for a directory that is none, CheckpointError where its campaign.json is
    damaged.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        """Name in pages: unique among the runs that are shown together."""
        if read_state(path) is None:
            raise ConfigError(f"{path} is not a run directory: there is no campaign.json in it")

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config, not validated: it may be of another version of rayhf."""
        return _config(self.path, _stamp(self.path / "config.yaml"))

    @property
    def state(self) -> CampaignState:
        """The committed state."""
        return read_state(self.path) or CampaignState()

    def status(self) -> Status:
        """Return what `rayhf status` shows."""
        return read_status(self.path)

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of metrics.jsonl; one that is not complete yet is left out."""
        return [
            {name: value for name, value in line.items() if isinstance(value, int | float)}
            for line in read_metrics(self.path)
        ]

    def events(self) -> list[TimedEvent]:
        """Return the events of all attempts, oldest first."""
        events = []
        for file in event_logs(self.path):
            iteration = 0
            for line in _lines(file):
                event = parse_event(line)
                if event is None:
                    continue
                if event.kind == "phase":
                    iteration = int(json.loads(line).get("iteration") or 0)
                events.append(TimedEvent(event=event, iteration=iteration))
        return events

    def tables(self, folder: str) -> dict[int, Path]:
        """Return the Parquet files of `folder` by iteration, in order."""
        return numbered(self.path / folder, "iteration-", ".parquet")

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return name, size in bytes, time in seconds since 1970 and health of each checkpoint."""
        found = []
        for directory in sorted((self.path / "checkpoints").glob("*-*")):
            try:
                manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
                size = sum(entry["bytes"] for entry in manifest["files"].values())
                saved = (directory / MANIFEST).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # being written, or being deleted
            healthy = directory.name.startswith("iteration-")
            found.append({"name": directory.name, "bytes": size, "time": saved, "healthy": healthy})
        return found

    def packages(self) -> Mapping[str, str]:
        """Return the versions of the packages that the last checkpoint was written with."""
        name = self.state.checkpoint
        if name is None:
            return {}
        try:
            text = (self.path / "checkpoints" / name / "state.json").read_text(encoding="utf-8")
            packages = json.loads(text)["packages"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {str(key): str(value) for key, value in dict(packages).items()}

    def labeled(self) -> dict[tuple[int, str, int], str]:
        """Return what people said of samples: (iteration, prompt, sample) -> verdict."""
        said = {}
        for row in RowFile(self.path, "labels").read()[0]:
            try:
                iteration, prompt, *samples = label_id(row).split("/")
                verdict = str(row["verdict"])
                number = int(iteration)
                indices = list(map(int, samples))
            except (KeyError, ValueError):
                continue
            if len(indices) == 1:
                said[number, prompt, indices[0]] = f"thumb {verdict}"
                continue
            for index, own in zip(indices, ("first", "second"), strict=False):
                word = "tie" if verdict == "tie" else "better" if verdict == own else "worse"
                said[number, prompt, index] = word
        return said

    @cached_property
    def tokens(self) -> TokenTexts:
        """Texts of token ids."""
        return TokenTexts(self.path / "policy" / "tokenizer.json")

    def version(self) -> str:
        """Return a string that changes when the pages about the run may."""
        files = ("campaign.json", "metrics.jsonl", "progress.json")
        return " ".join(_stamp(self.path / name) for name in files)


@lru_cache(maxsize=100)
def _config(run: Path, _changed: str) -> Mapping[str, Any]:
    return read_config(run)


def scorer_names(config: Mapping[str, Any]) -> list[str]:
    """Return what the training scorers are called: by name, or type and function."""
    entries = config.get("scorer", {}).get("train") or []
    return [
        str(e.get("name") or " ".join(str(e[key]) for key in ("type", "function") if e.get(key)))
        for e in entries
        if isinstance(e, Mapping)
    ]


def find_runs(root: Path) -> dict[str, Path]:
    """Return the run directories at or below `root` by their names relative to it.

    Symbolic links and hidden directories are not followed.
    """
    found: dict[str, Path] = {}

    def search(directory: Path, depth: int) -> None:
        if (directory / "campaign.json").is_file():
            name = directory.relative_to(root).as_posix()
            found[root.resolve().name if name == "." else name] = directory
            return
        if depth == MAX_DEPTH:
            return
        try:
            children = sorted(directory.iterdir())
        except OSError:
            return
        for child in children:
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                search(child, depth + 1)

    search(root, 0)
    return found


def _stamp(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError:
        return "-"
    return f"{stat.st_size}.{stat.st_mtime_ns}"


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines()
    except OSError:
        return []
