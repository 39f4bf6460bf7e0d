"""The run directory of one campaign: one class owns it, and every write is complete or absent.

config.yaml      the config as resolved          campaign.json        committed state, replaced last
checksums.jsonl  of samples, examples, metrics   .lock                held by the launcher
metrics.jsonl    one object per iteration        samples/, examples/  Parquet per iteration
                                                credit/, heldout/, evaluations/  likewise, where
                                                there are any
checkpoints/iteration-000012/  roles, state.json; MANIFEST.json last
journal/         responses of unfinished iterations
population/      past policies that a loop plays against, where it does
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
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rayhf.config.algorithms import PopulationConfig
from rayhf.config.load import dump_config
from rayhf.config.schema import CampaignConfig
from rayhf.errors import CheckpointError, PausedError
from rayhf.evaluation.values import PromptValues
from rayhf.run_dir.checkpoints import Checkpoint, Checkpoints, Retention
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.run_dir.files import (
    MANIFEST,
    open_file,
    publish,
    sha256,
    storage_errors,
    write_atomic,
    write_manifest,
)
from rayhf.run_dir.identity import FILE as CONFIG
from rayhf.run_dir.identity import check_identity, config_hash, identity_hash
from rayhf.run_dir.inbox import Inbox
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.names import iteration_name, numbered
from rayhf.run_dir.operator_request import OperatorRequest, read_request, write_request
from rayhf.run_dir.population import PastPolicies
from rayhf.run_dir.progress import Progress, write_progress
from rayhf.run_dir.records import TABLES, Records
from rayhf.run_dir.state import (
    Best,
    CampaignState,
    CheckpointState,
    StateName,
    read_state,
    write_state,
)
from rayhf.types import Example, Group


class RunDir:
    """The owner of one campaign's run directory; holds its lock until `close`."""

    def __init__(
        self,
        config: CampaignConfig,
        lock: RunLock | None = None,
        *,
        takes_labels: bool = False,
        takes_thumbs: bool = False,
        population: PopulationConfig | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Open or create the directory; takes over `lock`, or takes one.

        Args:
            config: the resolved config.
            lock: the directory's lock, where the caller holds it.
            takes_labels: whether the algorithm trains on human labels of pairs.
            takes_thumbs: whether it trains on human labels of single completions.
            population: past policies that the algorithm reads.
            models: commit of each hub name in the config.

        Raises ConfigError for a directory that cannot be written or is another campaign's, and
        LockedError.
        """
        self._lock = lock or RunLock(config.run.dir)
        try:
            self.path = config.run.dir.resolve()
            self.state = read_state(self.path) or CampaignState()
            damage = check_identity(self.path, self.state, config)
            attempts = numbered(self.path / "logs", "attempt-", digits=4)
            # Higher than any before, also where campaign.json was restored from an older copy.
            self.epoch = max(self.state.epoch, *attempts, 0) + 1
            written = dump_config(config).encode()
            self.state = self.state.model_copy(
                update={
                    "epoch": self.epoch,
                    "takes_labels": takes_labels,
                    "takes_thumbs": takes_thumbs,
                    "models": self.state.models | dict(models or {}),
                    "identity": identity_hash(config),
                    "config": hashlib.sha256(written).hexdigest(),
                }
            )
            # First of all: files without it are not taken for a campaign's.
            write_state(self.path, self.state, self._lock.check)
            write_atomic(self.path / CONFIG, written, self.check_owner)
            self.attempt = self.path / "logs" / f"attempt-{self.epoch:04d}"
            with storage_errors("write", self.path):
                for name in (*TABLES, "checkpoints", "journal"):
                    (self.path / name).mkdir(exist_ok=True)
                self.attempt.mkdir(parents=True)
                self._events = open_file(self.attempt / "events.jsonl", "ab")
        except BaseException:
            self._lock.release()
            raise
        warn = partial(self.event, "warn")
        if damage:
            warn(damage)
        run = config.run
        self.config_hash = config_hash(config)
        """Hash of everything that decides the weights; a journal under another one is dropped."""
        self.inbox = Inbox(self.path, check=self.check_owner)
        self._records = Records(self.path, check=self.check_owner, warn=warn)
        self.population = PastPolicies(
            self.path,
            population or PopulationConfig(size=0),
            epoch=self.epoch,
            check=self.check_owner,
        )
        retention = Retention(last=run.keep_checkpoints, every=run.keep_every, best=run.keep_best)
        self.checkpoints = Checkpoints(
            self.path / "checkpoints",
            epoch=self.epoch,
            retention=retention,
            check=self.check_owner,
        )

    def check_owner(self) -> None:
        """Raise FencedError unless this process holds the lock and its attempt is the newest."""
        self._lock.check()
        EpochGuard(self.path, self.epoch).check()

    def record_datasets(self, commits: Mapping[str, str]) -> None:
        """Record the commits of hub data sets, by name."""
        self._write_state(datasets={**self.state.datasets, **commits})

    def close(self) -> None:
        """Close the event log and release the lock."""
        self._records.close()
        self._events.close()
        self._lock.release()

    def event(self, kind: str, message: str = "", **facts: object) -> None:
        """Append a line to this attempt's event log."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "epoch": self.epoch, "kind": kind, "message": message, **facts}
        with storage_errors("write", self.attempt):
            self._events.write(json.dumps(line).encode() + b"\n")
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
        self._lock.check()
        with storage_errors("write", self.path / "progress.json"):
            write_progress(self.path, replace(progress, epoch=self.epoch))

    def requested(self) -> OperatorRequest:
        """Return what the operator requested last."""
        return read_request(self.path)

    def acknowledge(self) -> None:
        """Clear the operator's request, so that the next attempt does not repeat it."""
        write_request(self.path, "run", self.check_owner)

    # ------------------------------------------------------------------ records

    @property
    def history(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, once `rewind` has dropped those after the checkpoint."""
        return self._records.history

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append an iteration's line. Raises ValueError for NaN and infinity."""
        self._records.append_metrics(metrics)

    def write_samples(self, iteration: int, groups: Sequence[Group]) -> None:
        """Start writing every completion of an iteration, one row each; see `tables_written`."""
        self._records.write_samples(iteration, groups)

    def write_examples(self, iteration: int, examples: Sequence[Example]) -> None:
        """Start writing every training example with its lineage; see `tables_written`.

        The lineage is indices into its prompt's samples.
        """
        self._records.write_examples(iteration, examples)

    def write_credit(self, iteration: int, examples: Sequence[Example]) -> None:
        """Start writing the token values that training added to the policy's examples, if any."""
        self._records.write_credit(iteration, examples)

    def write_heldout(self, iteration: int, groups: Sequence[Group]) -> None:
        """Start writing an evaluation's completions of the held-out prompts."""
        self._records.write_heldout(iteration, groups)

    def write_evaluations(self, iteration: int, values: Sequence[PromptValues]) -> None:
        """Start writing the figures of an iteration's evaluations by prompt."""
        self._records.write_evaluations(iteration, values)

    async def tables_written(self) -> None:
        """Wait until the tables that were started are on the disk. Raises their first error."""
        await self._records.tables_written()

    def read_examples(self, iteration: int, *, objective: str = "policy") -> list[Example]:
        """Return an objective's examples of an earlier iteration; none where there was none."""
        return self._records.read_examples(iteration, objective=objective)

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Drop the records after a checkpoint, or all: those iterations will be repeated."""
        if checkpoint is None:
            self._records.rewind(-1, {})
            self.population.rewind(-1)
        else:
            self._records.rewind(checkpoint.iteration, checkpoint.facts)
            self.population.rewind(checkpoint.iteration)

    def keep_past_policy(self, temporary: Path, iteration: int) -> None:
        """Add the policy after `iteration` to the population, and delete those not read any more.

        Reads all its files: call it in a thread.
        """
        self.population.add(temporary, iteration)
        self.population.prune((iteration, *numbered(self.checkpoints.root, "iteration-")))

    def journal_file(self, iteration: int) -> Path:
        """Return where an iteration's journal belongs; deleted by a later commit."""
        self.check_owner()
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

        Reads all its files: call it in a thread.

        Args:
            temporary: the directory of `checkpoints.begin`, filled by the roles.
            state: the controller's own state.
            campaign_state: the campaign's state from now on.
            score: evaluation score of this checkpoint, higher is better; None without one.
        """
        final, manifest = self.checkpoints.commit(temporary, state, self._records.facts())
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
        journals = numbered(self.path / "journal", "iteration-", ".journal")
        for iteration, journal in journals.items():
            if iteration <= state.iteration:
                with contextlib.suppress(OSError):  # failing to free space must not stop training
                    journal.unlink()
        self.checkpoints.prune(best.iteration if best else None)
        self.population.prune(numbered(self.checkpoints.root, "iteration-"))

    def commit_unhealthy(
        self, temporary: Path, state: CheckpointState, *, reason: str, guards: Sequence[str]
    ) -> None:
        """Seal a saved checkpoint beside the healthy ones and record that guards paused here.

        It is loaded only after an operator accepted it; the next healthy commit deletes it.
        """
        final, _ = self.checkpoints.commit(temporary, state, self._records.facts(), healthy=False)
        self._write_state(state="paused", reason=reason, guards=tuple(guards), unhealthy=final.name)

    def set_state(self, state: StateName, *, reason: str | None = None) -> None:
        """Record the campaign's state, and why."""
        self._write_state(state=state, reason=reason, guards=())

    def _write_state(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        write_state(self.path, state, self.check_owner)
        self.state = state

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

    def policy_directory(self, policy: str = "policy") -> Path:
        """Create an empty directory for an exported model; `publish_policy` moves it into place."""
        self.check_owner()
        temporary = self.path / f".{policy}"
        with storage_errors("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        return temporary

    def publish_policy(self, temporary: Path, iteration: int, policy: str = "policy") -> None:
        """Replace the exported model of a policy; its manifest has a checksum of every file.

        Reads all its files: call it in a thread.
        """
        self.check_owner()
        write_manifest(temporary, {"iteration": iteration, "epoch": self.epoch})
        self.check_owner()
        final = self.path / policy
        old = self.path / f".old-{policy}"
        with storage_errors("replace", final):
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            publish(temporary, final)
            shutil.rmtree(old, ignore_errors=True)

    def has_policy(self) -> bool:
        """Return whether the policy was exported and not deleted since."""
        return (self.path / "policy" / MANIFEST).exists()
