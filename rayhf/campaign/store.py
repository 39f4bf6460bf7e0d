"""The run directory. One class owns it; every write is whole.

config.yaml      the config as resolved              campaign.json   committed state, replaced atomically, last
metrics.jsonl    one object per iteration            samples/, pairs/   Parquet per iteration
checkpoints/iteration-000012/   learner, critic, reference, state.json; MANIFEST.json last
policy/          the latest exported Hugging Face model
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.campaign import records
from rayhf.campaign.files import seal, storage_errors, verify, write_atomic, write_json
from rayhf.config.load import dump_config
from rayhf.config.schema import CampaignConfig
from rayhf.errors import CheckpointError, ConfigError, LockedError
from rayhf.experience import Example, Group

IDENTITY = ("seed", "policy", "prompts", "algorithm", "scorer.train", "scorer.combine", "rollout.temperature")
"""What makes a campaign this campaign: a run directory refuses a config that differs here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    directory: Path
    state: Mapping[str, Any]
    """The controller's state at the end of `iteration`."""


def _pick(config: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


def _difference(old: Any, new: Any, where: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if found := _difference(old.get(key), new.get(key), f"{where}.{key}"):
                return found
        return None
    return None if old == new else f"{where} was {old!r}, now {new!r}"


class RunDir:
    """Owns the run directory of one campaign; holds its lock until `close`."""

    def __init__(self, config: CampaignConfig) -> None:
        """Open or create. Raises ConfigError for a directory that cannot be written or is another campaign's, LockedError."""
        self.path = config.run.dir
        self._keep = config.run.keep_checkpoints
        try:
            for name in ("samples", "pairs", "checkpoints"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir {self.path} cannot be written: {error.strerror or error}") from None
        self._lock = self._acquire(file)
        try:
            self._check_identity(config)
            self.state: dict[str, Any] = self._read_state()
            write_atomic(self.path / "config.yaml", dump_config(config).encode())
        except BaseException:
            self.close()
            raise

    def _acquire(self, file: IO[str]) -> IO[str]:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            raise LockedError(f"run directory {self.path} is in use by {holder}") from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        return file

    def _check_identity(self, config: CampaignConfig) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        import yaml

        old, new = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(dump_config(config))
        for key in IDENTITY:
            try:
                before = _pick(old, key)
            except (KeyError, TypeError):
                before = None
            if difference := _difference(before, _pick(new, key), key):
                raise ConfigError(f"run.dir {self.path} holds another campaign: {difference}; choose another run.dir")

    def _read_state(self) -> dict[str, Any]:
        file = self.path / "campaign.json"
        if not file.exists():
            return {"iteration": 0, "checkpoint": None, "metrics_bytes": 0, "state": "new"}
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return state
        except ValueError as error:
            raise CheckpointError(f"{file}: not valid JSON ({error})") from None

    def close(self) -> None:
        self._lock.close()

    # ------------------------------------------------------------------ records

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line per iteration; refuses NaN."""
        line = json.dumps(dict(metrics), allow_nan=False) + "\n"
        with storage_errors("write", self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_samples(self, iteration: int, groups: Sequence[Group]) -> None:
        """Every completion of a round, one row each."""
        self._write_parquet(f"samples/iteration-{iteration:06d}.parquet", records.sample_table(iteration, groups))

    def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Every training pair or example with its lineage: indices into the round's samples of its prompt."""
        self._write_parquet(f"pairs/iteration-{iteration:06d}.parquet", records.example_table(iteration, examples))

    def read_examples(self, iteration: int) -> list[Example]:
        """The policy's examples of an earlier round, as they were selected; none for a round that never was."""
        file = self.path / "pairs" / f"iteration-{iteration:06d}.parquet"
        with storage_errors("read", file):
            return records.read_examples(file) if file.exists() else []

    def _write_parquet(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomic(self.path / name, sink.getvalue().to_pybytes())

    # -------------------------------------------------------------- checkpoints

    def checkpoint_directory(self) -> Path:
        """An empty directory to save into; nothing counts until `commit`."""
        temporary = self.path / "checkpoints" / ".saving"
        with storage_errors("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, iteration: int, state: Mapping[str, Any], *, campaign_state: str) -> None:
        """Seal what was saved, then point campaign.json at it, then remove what retention no longer keeps."""
        write_json(temporary / "state.json", dict(state))
        final = self.path / "checkpoints" / f"iteration-{iteration:06d}"
        if final.exists():  # the same iteration saved again after a resume: its content is equal or newer
            with storage_errors("replace", final):
                shutil.rmtree(final)
        seal(temporary, final, {"iteration": iteration})
        metrics = self.path / "metrics.jsonl"
        self.state = {
            "iteration": iteration,
            "checkpoint": final.name,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "state": campaign_state,
        }
        write_json(self.path / "campaign.json", self.state)
        kept = sorted(p for p in (self.path / "checkpoints").glob("iteration-*") if p.is_dir())
        for old in kept[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)  # failing to free space must not stop training

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None only for a campaign that never committed one.

        A checkpoint that does not verify is moved aside (`.corrupt-...`). Raises CheckpointError when none is left.
        """
        if self.state["checkpoint"] is None:
            return None
        problems = []
        for directory in sorted((self.path / "checkpoints").glob("iteration-*"), reverse=True):
            try:
                iteration = int(verify(directory)["iteration"])
                state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
                return Checkpoint(iteration=iteration, directory=directory, state=state)
            except CheckpointError as error:
                problems.append(str(error))
                directory.rename(directory.with_name(f".corrupt-{directory.name}"))
        raise CheckpointError(f"no valid checkpoint in {self.path}: {'; '.join(problems) or 'the directory is empty'}")

    def rewind(self, iteration: int) -> None:
        """Forget records after `iteration`: they will be made again. The old metrics lines are kept beside the file."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _iteration_of(line) <= iteration]
            if len(kept) != len(lines):
                with (self.path / "metrics.rewound.jsonl").open("ab") as rewound:
                    rewound.writelines(lines[len(kept) :])
                write_atomic(metrics, b"".join(kept))
        for folder in ("samples", "pairs"):
            for file in (self.path / folder).glob("iteration-*.parquet"):
                if int(file.stem.removeprefix("iteration-")) > iteration:
                    file.unlink()

    def policy_directory(self, policy: str = "policy") -> Path:
        """An empty directory for an exported model; `publish_policy` puts it in place."""
        temporary = self.path / f".{policy}"
        with storage_errors("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def publish_policy(self, temporary: Path, policy: str = "policy") -> None:
        final = self.path / policy
        with storage_errors("replace", final):
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)


def _iteration_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError):
        return float("inf")  # a torn last line
