"""The run directory of one campaign: one class owns it, and every write is complete or absent.

config.yaml      the config as resolved          campaign.json        committed state, replaced last
metrics.jsonl    one object per iteration        samples/, examples/  Parquet per iteration
checkpoints/iteration-000012/  roles, state.json; MANIFEST.json last
journal/         responses of unfinished iterations
logs/attempt-0003/events.jsonl  what happened in one attempt
inbox/           prompts and labels that were submitted, and which iteration took them
policy/          the latest exported Hugging Face model

Every attempt at the campaign opens the directory under a new *epoch*. The lock keeps a second
launcher out; the epoch keeps out an actor that outlived its launcher (a node that was cut off and
came back): EpochGuard refuses its writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rayhf.config.load import dump_config, read_mapping
from rayhf.config.schema import CampaignConfig
from rayhf.config.yaml_text import parse_yaml
from rayhf.errors import CheckpointError, ConfigError, PausedError
from rayhf.run_dir import tables
from rayhf.run_dir.checkpoints import Checkpoint, Checkpoints, Retention
from rayhf.run_dir.files import (
    MANIFEST,
    fsync_path,
    iteration_name,
    iteration_of,
    sha256,
    storage_errors,
    write_atomic,
)
from rayhf.run_dir.inbox import Inbox
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.operator_request import OperatorRequest, read_request, write_request
from rayhf.run_dir.progress import Progress, write_progress
from rayhf.run_dir.state import (
    Best,
    CampaignState,
    CheckpointState,
    StateName,
    read_state,
    write_state,
)
from rayhf.run_dir.table_writer import TableWriter
from rayhf.types import Example, Group

IDENTITY = (
    "seed",
    "policy",
    "prompts",
    "algorithm",
    "scorer.train",
    "scorer.combine",
    "rollout.temperature",
)
"""Config keys that identify a campaign: its run directory refuses a config that differs here."""


class RunDir:
    """The owner of one campaign's run directory; holds its lock until `close`."""

    def __init__(
        self,
        config: CampaignConfig,
        lock: RunLock | None = None,
        *,
        takes_labels: bool = False,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Open or create the directory; takes over `lock`, or takes one.

        Args:
            config: the resolved config.
            lock: the directory's lock, where the caller holds it.
            takes_labels: whether the algorithm trains on human labels; shown by `rayhf status`.
            models: commit of each hub name in the config.

        Raises ConfigError for a directory that cannot be written or is another campaign's, and
        LockedError.
        """
        self.path = config.run.dir.absolute()
        self._lock = lock or RunLock(config.run.dir)
        try:
            with storage_errors("write", self.path):
                for name in ("samples", "examples", "checkpoints", "journal"):
                    (self.path / name).mkdir(exist_ok=True)
            self._check_identity(config)
            self.state = read_state(self.path) or CampaignState()
            self.epoch = self.state.epoch + 1
            self._write_state(
                epoch=self.epoch,
                takes_labels=takes_labels,
                models=self.state.models | dict(models or {}),
            )
            write_atomic(self.path / "config.yaml", dump_config(config).encode())
            self.attempt = self.path / "logs" / f"attempt-{self.epoch:04d}"
            self.attempt.mkdir(parents=True)
            self._events = (self.attempt / "events.jsonl").open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise
        run = config.run
        self.config_hash = _config_hash(config)
        """Hash of everything that decides the weights; a journal under another one is dropped."""
        self.inbox = Inbox(self.path)
        self._tables = TableWriter()
        self.history: list[dict[str, float]] = []
        """The lines of metrics.jsonl, once `rewind` has dropped those after the checkpoint."""
        retention = Retention(last=run.keep_checkpoints, every=run.keep_every, best=run.keep_best)
        self.checkpoints = Checkpoints(
            self.path / "checkpoints", epoch=self.epoch, retention=retention
        )

    def record_datasets(self, commits: Mapping[str, str]) -> None:
        """Record the commits of hub data sets, by name."""
        self._write_state(datasets={**self.state.datasets, **commits})

    def _check_identity(self, config: CampaignConfig) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        old = read_mapping(file)
        new = parse_yaml(dump_config(config))
        for key in IDENTITY:
            if difference := _difference(_pick(old, key), _pick(new, key), key):
                raise ConfigError(
                    f"run.dir {self.path} holds another campaign: {difference}; "
                    "choose another run.dir"
                )

    def close(self) -> None:
        """Close the event log and release the lock."""
        self._tables.close()
        self._events.close()
        self._lock.release()

    def event(self, kind: str, message: str = "", **facts: object) -> None:
        """Append a line to this attempt's event log."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "epoch": self.epoch, "kind": kind, "message": message, **facts}
        with storage_errors("write", self.attempt):
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()

    def check_paused(self) -> None:
        """Raise PausedError where guards paused the campaign and no operator accepted that."""
        if self.state.state == "paused" and self.state.guards:
            raise PausedError(
                f"{self.path} is paused: {self.state.reason}. "
                f"{self.state.ways_to_continue(self.path)}. Then start the same command again"
            )

    def write_progress(self, progress: Progress) -> None:
        """Replace progress.json, with this attempt's epoch."""
        with storage_errors("write", self.path / "progress.json"):
            write_progress(self.path, replace(progress, epoch=self.epoch))

    def requested(self) -> OperatorRequest:
        """Return what the operator requested last."""
        return read_request(self.path)

    def acknowledge(self) -> None:
        """Clear the operator's request, so that the next attempt does not repeat it."""
        write_request(self.path, "run")

    # ------------------------------------------------------------------ records

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append an iteration's line. Raises ValueError for NaN and infinity."""
        self.history.append(dict(metrics))
        line = json.dumps(dict(metrics), allow_nan=False) + "\n"
        file = self.path / "metrics.jsonl"
        with storage_errors("write", file), file.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def write_samples(self, iteration: int, groups: Sequence[Group]) -> None:
        """Start writing every completion of an iteration, one row each; see `tables_written`."""
        self._tables.start(
            self._table("samples", iteration),
            tables.SAMPLES,
            groups,
            partial(tables.sample_table, iteration),
        )

    def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Start writing every training example with its lineage.

        That is indices into its prompt's samples. See `tables_written`.
        """
        self._tables.start(
            self._table("examples", iteration),
            tables.EXAMPLES,
            examples,
            partial(tables.example_table, iteration),
        )

    async def tables_written(self) -> None:
        """Wait until the tables that were started are on the disk. Raises StorageError."""
        await self._tables.written()

    def read_examples(self, iteration: int) -> list[Example]:
        """Return the policy's examples of an earlier iteration; none where there was none."""
        file = self._table("examples", iteration)
        with storage_errors("read", file):
            return tables.read_examples(file) if file.exists() else []

    def _table(self, folder: str, iteration: int) -> Path:
        return self.path / folder / f"{iteration_name(iteration)}.parquet"

    def journal_file(self, iteration: int) -> Path:
        """Return where an iteration's journal belongs; deleted by a later commit."""
        return self.path / "journal" / f"{iteration_name(iteration)}.journal"

    # -------------------------------------------------------------- checkpoints

    def commit(
        self,
        temporary: Path,
        state: CheckpointState,
        *,
        campaign_state: StateName,
        score: float | None,
    ) -> None:
        """Seal a saved checkpoint, commit it in campaign.json, then delete what is obsolete.

        Args:
            temporary: the directory of `checkpoints.begin`, filled by the roles.
            state: the controller's own state.
            campaign_state: the campaign's state from now on.
            score: evaluation score of this checkpoint, higher is better; None without one.
        """
        final, manifest = self.checkpoints.commit(temporary, state, self._facts())
        best = self.state.best
        if score is not None and (best is None or score > best.score):
            best = Best(iteration=state.iteration, score=score)
        self._write_state(
            iteration=state.iteration,
            checkpoint=final.name,
            manifest=manifest,
            unhealthy=None,
            state=campaign_state,
            reason=None,
            best=best,
        )
        for journal in (self.path / "journal").iterdir():
            if iteration_of(journal) <= state.iteration:
                with contextlib.suppress(OSError):  # failing to free space must not stop training
                    journal.unlink()
        self.checkpoints.prune(best.iteration if best else None)

    def commit_unhealthy(
        self, temporary: Path, state: CheckpointState, *, reason: str, guards: Sequence[str]
    ) -> None:
        """Seal a saved checkpoint beside the healthy ones and record that guards paused here.

        It is loaded only after an operator accepted it; the next healthy commit deletes it.
        """
        final, _ = self.checkpoints.commit(temporary, state, self._facts(), healthy=False)
        self._write_state(state="paused", reason=reason, guards=tuple(guards), unhealthy=final.name)

    def _facts(self) -> dict[str, object]:
        """Return what a manifest says besides its files."""
        metrics = self.path / "metrics.jsonl"
        return {"metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}

    def set_state(self, state: StateName, *, reason: str | None = None) -> None:
        """Record the campaign's state, and why."""
        self._write_state(state=state, reason=reason, guards=())

    def _write_state(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        write_state(self.path, self.state)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None where none was ever committed.

        A checkpoint that does not verify is set aside; one that was sealed but not yet committed
        counts. Raises CheckpointError where a committed campaign has none left: it must not start
        from scratch unnoticed.
        """
        checkpoint, problems = self.checkpoints.newest()
        if checkpoint is None and self.state.checkpoint is not None:
            why = "; ".join(problems) or "the directory is empty"
            raise CheckpointError(f"no valid checkpoint in {self.path}: {why}")
        for problem in problems:
            self.event("fault", f"checkpoint set aside: {problem}")
        if checkpoint is not None and checkpoint.directory.name != self.state.checkpoint:
            best = self.state.best
            if best and not (self.checkpoints.root / iteration_name(best.iteration)).exists():
                best = None
            self._write_state(
                iteration=checkpoint.iteration,
                checkpoint=checkpoint.directory.name,
                manifest=sha256(checkpoint.directory / MANIFEST),
                best=best,
            )
        return checkpoint

    def rewind(self, iteration: int) -> None:
        """Drop the records after `iteration`: those iterations will be repeated.

        Their metrics are kept in metrics.rewound.jsonl.
        """
        metrics = self.path / "metrics.jsonl"
        self.history = []
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _iteration_in(line) <= iteration]
            self.history = [json.loads(line) for line in kept]
            if len(kept) != len(lines):
                with (self.path / "metrics.rewound.jsonl").open("ab") as rewound:
                    rewound.writelines(lines[len(kept) :])
                write_atomic(metrics, b"".join(kept))
        for folder in ("samples", "examples"):
            for file in (self.path / folder).glob("iteration-*.parquet"):
                if iteration_of(file) > iteration:
                    file.unlink()

    def policy_directory(self, policy: str = "policy") -> Path:
        """Create an empty directory for an exported model; `publish_policy` moves it into place."""
        temporary = self.path / f".{policy}"
        with storage_errors("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def publish_policy(self, temporary: Path, policy: str = "policy") -> None:
        """Replace the exported model of a policy."""
        final = self.path / policy
        old = self.path / f".old-{policy}"
        with storage_errors("replace", final):
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_path(file)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)


def _pick(config: object, key: str) -> object:
    """Return the value at a dotted key; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _difference(old: object, new: object, key: str) -> str | None:
    """Describe the first difference at or below `key`; None where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if difference := _difference(old.get(name), new.get(name), f"{key}.{name}"):
                return difference
        return None
    return None if old == new else f"{key} was {old!r}, now {new!r}"


def _config_hash(config: CampaignConfig) -> str:
    """Hash what decides the weights: all but where the campaign runs, how long, and who watches."""
    content = config.model_dump(
        mode="json",
        exclude={"run", "cluster", "trackers", "guards", "evaluations", "service"},
    )
    if config.learner.schedule != "constant":
        content["iterations"] = config.run.iterations
    content |= {"staleness": config.run.max_staleness, "in_flight": config.run.max_in_flight}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _iteration_in(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError):
        return float("inf")  # a torn last line
