"""The run directory. One class owns it; every write is whole.

config.yaml      the config as resolved              campaign.json   committed state, replaced
                 atomically, last
metrics.jsonl    one object per iteration            samples/, pairs/   Parquet per iteration
checkpoints/iteration-000012/   learner, critic, reference, state.json; MANIFEST.json last
journal/         what unfinished rounds were told    logs/attempt-0003/events.jsonl   what happened,
                 one attempt each
inbox/           prompts and verdicts handed in, and which round took them
policy/          the latest exported Hugging Face model

Whoever opens it is the next *epoch*. The lock keeps a second launcher out; the epoch keeps out an
actor that outlived its launcher (a node that was cut off and came back): whatever it still wants to
write, a EpochGuard refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rayhf.config.load import dump_config
from rayhf.config.schema import CampaignConfig
from rayhf.control.commands import Wanted, read_control, write_control
from rayhf.errors import CheckpointError, ConfigError, PausedError
from rayhf.exploration.journal import Journal
from rayhf.run_dir import tables as records
from rayhf.run_dir.checkpoints import Checkpoint, Checkpoints, Retention, directory_name
from rayhf.run_dir.files import (
    MANIFEST,
    atomic_file,
    fsync_path,
    sha256,
    storage_errors,
    write_atomic,
    write_json,
)
from rayhf.run_dir.inbox import Inbox
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.state import FILE, new_state, read_state
from rayhf.types import Example, Group

Item = TypeVar("Item")

IDENTITY = (
    "seed",
    "policy",
    "prompts",
    "algorithm",
    "scorer.train",
    "scorer.combine",
    "rollout.temperature",
)
"""What makes a campaign this campaign: a run directory refuses a config that differs here."""


_PART = 4096
"""Prompts or examples that are made into a table at a time: a whole round's tables may be larger
than the round."""


def _parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + _PART] for start in range(0, len(items), _PART))


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

    def __init__(self, config: CampaignConfig, lock: RunLock | None = None) -> None:
        """Open or create; takes over `lock`, or takes one.

        Raises ConfigError for a directory that cannot be written or is another campaign's,
        LockedError.
        """
        self.path = config.run.dir.absolute()
        self._lock = lock or RunLock(config.run.dir)
        try:
            with storage_errors("write", self.path):
                for name in ("samples", "pairs", "checkpoints", "journal"):
                    (self.path / name).mkdir(exist_ok=True)
            self._check_identity(config)
            self.state: dict[str, Any] = read_state(self.path) or new_state()
            self.epoch = int(self.state["epoch"]) + 1
            self._write_state(epoch=self.epoch)
            write_atomic(self.path / "config.yaml", dump_config(config).encode())
            self.attempt = self.path / "logs" / f"attempt-{self.epoch:04d}"
            self.attempt.mkdir(parents=True)
            self._events = (self.attempt / "events.jsonl").open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise
        run = config.run
        self._making = _making_of(config)
        self.inbox = Inbox(self.path)
        self.history: list[dict[str, float]] = []
        """The lines of metrics.jsonl, once `rewind` has settled which of them count."""
        retention = Retention(last=run.keep_checkpoints, every=run.keep_every, best=run.keep_best)
        self.checkpoints = Checkpoints(
            self.path / "checkpoints", epoch=self.epoch, retention=retention
        )

    def _check_identity(self, config: CampaignConfig) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        import yaml

        old, new = (
            yaml.safe_load(file.read_text(encoding="utf-8")),
            yaml.safe_load(dump_config(config)),
        )
        for key in IDENTITY:
            try:
                before = _pick(old, key)
            except (KeyError, TypeError):
                before = None
            if difference := _difference(before, _pick(new, key), key):
                raise ConfigError(
                    f"run.dir {self.path} holds another campaign: {difference}; choose another run.dir"
                )

    def close(self) -> None:
        self._events.close()
        self._lock.release()

    def event(self, kind: str, message: str = "", **facts: Any) -> None:
        """A line in this attempt's event log."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "epoch": self.epoch, "kind": kind, "message": message, **facts}
        with storage_errors("write", self.attempt):
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()

    def check_paused(self) -> None:
        """Raises PausedError where a guard paused the campaign and nobody has accepted that."""
        if self.state["state"] == "paused" and self.state["guards"]:
            raise PausedError(
                f"{self.path} is paused: {self.state['reason']}. It goes on from round {self.state['iteration']} after "
                f"`rayhf unpause {self.path}`, with what you change in the config"
            )

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Where the campaign is now. Whole, but not forced to the disk: it is worth a second."""
        temporary = self.path / ".progress.json.tmp"
        with storage_errors("write", temporary):
            temporary.write_text(json.dumps({**progress, "epoch": self.epoch}), encoding="utf-8")
            temporary.replace(self.path / "progress.json")

    def wanted(self) -> Wanted:
        """What `rayhf pause | unpause | stop` asked for last."""
        return read_control(self.path)

    def heard(self) -> None:
        """What was asked for is done: the next attempt is not asked again."""
        write_control(self.path, "run")

    # ------------------------------------------------------------------ records

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line per iteration; refuses NaN."""
        self.history.append(dict(metrics))
        line = json.dumps(dict(metrics), allow_nan=False) + "\n"
        with (
            storage_errors("write", self.path / "metrics.jsonl"),
            (self.path / "metrics.jsonl").open("ab") as file,
        ):
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    async def write_samples(self, iteration: int, groups: Sequence[Group]) -> None:
        """Every completion of a round, one row each."""
        tables = (records.sample_table(iteration, part) for part in _parts(groups))
        await self._write_parquet(
            f"samples/iteration-{iteration:06d}.parquet", records.SAMPLES, tables
        )

    async def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Every training pair or example with its lineage: indices into the round's samples of its
        prompt."""
        tables = (records.example_table(iteration, part) for part in _parts(examples))
        await self._write_parquet(
            f"pairs/iteration-{iteration:06d}.parquet", records.EXAMPLES, tables
        )

    def read_examples(self, iteration: int) -> list[Example]:
        """The policy's examples of an earlier round, as they were selected; none for a round that
        never was."""
        file = self.path / "pairs" / f"iteration-{iteration:06d}.parquet"
        with storage_errors("read", file):
            return records.read_examples(file) if file.exists() else []

    async def _write_parquet(
        self, name: str, schema: pa.Schema, tables: Iterator[pa.Table]
    ) -> None:
        """Whole or not at all; whoever else has work gets a turn between two tables."""
        # Hardly a value comes twice: dictionaries take longer to build than all the rest, and make
        # the file larger.
        settings = {"compression": "zstd", "use_dictionary": False}
        with (
            atomic_file(self.path / name) as file,
            pq.ParquetWriter(file, schema, **settings) as writer,
        ):
            for table in tables:
                writer.write_table(table)
                await asyncio.sleep(0)

    def journal(self, iteration: int) -> Journal:
        """What this round's exploration was told so far; kept until a later checkpoint makes it
        superfluous."""
        return Journal(
            self.path / "journal" / f"iteration-{iteration:06d}.journal", making=self._making
        )

    # -------------------------------------------------------------- checkpoints

    def commit(
        self,
        temporary: Path,
        iteration: int,
        state: Mapping[str, Any],
        *,
        campaign_state: str,
        score: float | None,
    ) -> None:
        """Seal what was saved, then point campaign.json at it (the commit itself), then free what
        nobody needs any more.

        `score` is what this checkpoint is worth, higher is better; None where it was not evaluated.
        """
        metrics = self.path / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        final, manifest = self.checkpoints.commit(
            temporary, iteration, state, {"metrics_bytes": size}
        )
        best = self.state["best"]
        if score is not None and (best is None or score > best["score"]):
            best = {"iteration": iteration, "score": score}
        self._write_state(
            iteration=iteration,
            checkpoint=final.name,
            manifest=manifest,
            state=campaign_state,
            reason=None,
            best=best,
        )
        for old in (self.path / "journal").iterdir():
            if _number_of(old) <= iteration:
                with contextlib.suppress(OSError):  # failing to free space must not stop training
                    old.unlink()
        self.checkpoints.prune(best["iteration"] if best else None)

    def set_state(
        self, state: str, *, reason: str | None = None, guards: Sequence[str] = ()
    ) -> None:
        """new, running, paused or done, why, and which guards want a person's consent."""
        self._write_state(state=state, reason=reason, guards=list(guards))

    def _write_state(self, **changes: Any) -> None:
        self.state = {**self.state, **changes}
        write_json(self.path / FILE, self.state)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None only for a campaign that never committed one.

        A checkpoint that does not verify is set aside. One that was sealed but not yet acknowledged
        is as good as any. Raises CheckpointError where a committed campaign has none left: it never
        starts from scratch by itself.
        """
        checkpoint, problems = self.checkpoints.newest()
        if checkpoint is None and self.state["checkpoint"] is not None:
            raise CheckpointError(
                f"no valid checkpoint in {self.path}: {'; '.join(problems) or 'the directory is empty'}"
            )
        for problem in problems:
            self.event("fault", f"checkpoint set aside: {problem}")
        if checkpoint is not None and checkpoint.directory.name != self.state["checkpoint"]:
            best = self.state["best"]
            self._write_state(
                iteration=checkpoint.iteration,
                checkpoint=checkpoint.directory.name,
                manifest=sha256(checkpoint.directory / MANIFEST),
                best=best
                if best and (self.checkpoints.root / directory_name(best["iteration"])).exists()
                else None,
            )
        return checkpoint

    def rewind(self, iteration: int) -> None:
        """Forget records after `iteration`: they will be made again. The old metrics lines are kept
        beside the file."""
        metrics = self.path / "metrics.jsonl"
        self.history = []
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _iteration_of(line) <= iteration]
            self.history = [json.loads(line) for line in kept]
            if len(kept) != len(lines):
                with (self.path / "metrics.rewound.jsonl").open("ab") as rewound:
                    rewound.writelines(lines[len(kept) :])
                write_atomic(metrics, b"".join(kept))
        for folder in ("samples", "pairs"):
            for file in (self.path / folder).glob("iteration-*.parquet"):
                if _number_of(file) > iteration:
                    file.unlink()

    def policy_directory(self, policy: str = "policy") -> Path:
        """An empty directory for an exported model; `publish_policy` puts it in place."""
        temporary = self.path / f".{policy}"
        with storage_errors("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def publish_policy(self, temporary: Path, policy: str = "policy") -> None:
        final, old = self.path / policy, self.path / f".old-{policy}"
        with storage_errors("replace", final):
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_path(file)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)


def _making_of(config: CampaignConfig) -> str:
    """A hash of what decides the weights: all sections but those that say where the campaign runs
    and for how long."""
    decides = config.model_dump(
        mode="json",
        exclude={"run", "cluster", "trackers", "guards", "evaluations", "service"},
    )
    if config.learner.schedule != "constant":
        decides["iterations"] = config.run.iterations
    decides |= {"staleness": config.run.max_staleness, "in_flight": config.run.max_in_flight}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _number_of(file: Path) -> int:
    return int(file.stem.removeprefix("iteration-"))


def _iteration_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError):
        return float("inf")  # a torn last line
