"""Attacks on the run directory of a campaign with fake roles.

Each function plays one attack in an empty folder and returns what it tried, what held, and the
first thing that did not. `python -m tests.chaos attack` plays them with more tries than the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, checkpoint_state
from rich.console import Console
from safetensors.numpy import save_file

from launch.export import checked_files, export
from rayhf.config.schema import CampaignConfig
from rayhf.control.commands import FileControl
from rayhf.control.questions import uncertain_pairs
from rayhf.errors import RayhfError, StorageError
from rayhf.monitoring.audit import audit
from rayhf.run_dir.inbox import Submissions
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.progress import Progress
from rayhf.run_dir.state import read_state
from rayhf.run_dir.store import RunDir

Figures = tuple[int, int, str]


class Tally:
    """Counts what was tried and what held."""

    def __init__(self) -> None:
        self.tried = 0
        self.held = 0
        self.failed: list[str] = []

    def count(self, held: bool, what: str) -> None:
        """Count one try; `what` describes it where it did not hold."""
        self.tried += 1
        self.held += held
        if not held:
            self.failed.append(what)

    def figures(self, text: str = "") -> Figures:
        """Return the counts, and the first failures."""
        return self.tried, self.held, "; ".join(self.failed[:3]) or text or "all"


class ExportingLearner(FakeLearner):
    """Exports a model with weights, and saves what it exports."""

    async def export(self, directory: Path) -> None:
        """Write config.json and 40 KB of weights."""
        await super().export(directory)
        weights = np.random.default_rng(self.steps).random(10_000, dtype=np.float32)
        save_file({"w": weights}, directory / "model.safetensors")


def campaign(folder: Path, iterations: int = 4) -> CampaignConfig:
    """Return the config of a campaign with a checkpoint after every second iteration."""
    return make_config(folder, run={"iterations": iterations})


def finished(folder: Path, iterations: int = 4) -> CampaignConfig:
    """Run a campaign to its end and return its config."""
    config = campaign(folder, iterations)
    run_campaign(config, learner=ExportingLearner())
    return config


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Return every file and link below `root`, with its content."""
    files: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            files[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file():
            files[str(path.relative_to(root))] = path.read_bytes()
    return files


def refusal(call: Callable[[], object]) -> str:
    """Return the name of the error that a call raises on purpose, with its one line."""
    try:
        call()
    except RayhfError as error:
        line = str(error)
        return f"{type(error).__name__} {error.exit_code}: {line}" if "\n" not in line else ""
    return ""


def flipped_bits(folder: Path, seed: int, *, tries: int, files: str) -> Figures:
    """Flip one bit at a time in the files that match a pattern; a deep audit names the file."""
    run = finished(folder).run.dir
    rng = random.Random(seed)
    candidates = sorted(file for file in run.glob(files) if file.is_file())
    tally = Tally()
    for _ in range(tries):
        file = rng.choice(candidates)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        position = rng.randrange(len(damaged))
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        seen = ""
        with contextlib.suppress(StopIteration):
            seen = first_problem(run)
        stem = file.name.split(".")[0].lower()
        tally.count(stem in seen.lower(), f"byte {position} of {file.relative_to(run)}: {seen!r}")
        if file.parent.name == "policy":
            refused = refusal(lambda: checked_files(run))
            tally.count("nothing was exported" in refused, f"export of a damaged {file.name}")
        file.write_bytes(whole)
    tally.count(not first_problem(run), "the restored campaign does not verify")
    return tally.figures()


def first_problem(run: Path) -> str:
    """Return the first finding of a deep audit with a problem; empty where there is none."""
    try:
        findings = audit(run, deep=True)
        return next((f"{f.what}: {f.problem}" for f in findings if f.problem), "")
    except RayhfError as error:
        return str(error)


STRAY = (
    "journal/.nfs0000001",
    "journal/iteration-000004.journal.swp",
    "samples/iteration-000002 (copy).parquet",
    "samples/.iteration-000002.parquet.swp",
    "examples/iteration-000002.parquet~",
    "checkpoints/iteration-000001.bak/state.json",
    "checkpoints/unhealthy-000009.bak/state.json",
    "checkpoints/.deleting-x/state.json",
    "checkpoints/iteration-000002/.nfs0000002",
    "checkpoints/iteration-000002/.DS_Store",
    "inbox/taken/labels-000003 (copy).json",
    "inbox/taken/.DS_Store",
    "logs/attempt-0001.bak/events.jsonl",
    "logs/.DS_Store",
    ".DS_Store",
    "notes.txt",
)


def stray_files(folder: Path, seed: int) -> Figures:
    """Leave files beside the campaign's own: it continues, and they stay."""
    whole = finished(folder / "whole", 6)
    config = finished(folder / "stray", 4)
    run = config.run.dir
    for name in STRAY:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("stray")
    Submissions(run, "labels").submit([{"pair_id": "x", "verdict": "tie"}], source="me")
    tally = Tally()
    tally.count(not first_problem(run), first_problem(run))
    run_campaign(campaign(folder / "stray", 6), learner=ExportingLearner())
    tally.count(metrics_of(config) == metrics_of(whole), "other metrics with stray files")
    tally.count(FileControl(run).status().state == "done", "status does not say done")
    for name in STRAY:
        kept = (run / name).exists() and (run / name).read_text() == "stray"
        pruned = name.startswith("checkpoints/iteration-000002/")
        tally.count(kept or pruned, f"{name} is gone")
    return tally.figures()


LINKED = (
    ".lock",
    "campaign.json",
    "config.yaml",
    "metrics.jsonl",
    "checksums.jsonl",
    "control.json",
    ".campaign.json.tmp",
    ".progress.json.tmp",
    "samples",
    "examples",
    "checkpoints",
    "journal",
    "logs",
    "inbox",
    "inbox/labels.jsonl",
    "inbox/taken",
    "policy",
    ".policy",
    "samples/iteration-000002.parquet",
    "samples/.iteration-000005.parquet.tmp",
    "examples/iteration-000003.parquet",
    "journal/iteration-000005.journal",
    "checkpoints/iteration-000004",
    "checkpoints/.saving-000001",
    "logs/attempt-0001",
)


def symbolic_links(folder: Path, seed: int) -> Figures:
    """Replace one thing at a time by a link to a copy outside: every command refuses it."""
    made = finished(folder / "made").run.dir
    Submissions(made, "labels").submit([{"pair_id": "x", "verdict": "tie"}], source="me")
    (made / "inbox/taken").mkdir()
    console = Console(quiet=True)
    tally = Tally()
    for number, name in enumerate(LINKED):
        world = folder / f"link-{number}"
        run = world / "run"
        shutil.copytree(made, run)
        outside = world / "outside" / Path(name).name
        outside.parent.mkdir()
        if (run / name).exists():
            (run / name).rename(outside)
        else:
            outside.write_text("outside")
        (run / name).symlink_to(outside)
        before = snapshot(world)
        config = campaign(world, 6)
        for command in (
            lambda: run_campaign(config),  # noqa: B023  called within the iteration
            lambda: FileControl(run).status(),  # noqa: B023
            lambda: FileControl(run).label([], source="me"),  # noqa: B023
            lambda: list(audit(run, deep=True)),  # noqa: B023
            lambda: export(run, world / "out", console),  # noqa: B023
        ):
            refused = refusal(command)
            tally.count("is a symbolic link" in refused, f"{name}: {refused!r}")
        tally.count(snapshot(world) == before, f"{name}: something was changed")
    reached = folder / "reached"
    reached.mkdir()
    (reached / "run").symlink_to(made)
    run_campaign(campaign(reached, 6), learner=ExportingLearner())
    tally.count(not first_problem(reached / "run"), "a run directory reached through a link")
    return tally.figures()


def removed_lock(folder: Path, seed: int) -> Figures:
    """Remove or replace .lock under a launcher: it writes nothing more, the next one commits."""
    tally = Tally()
    for second in (True, False):
        config = campaign(folder / f"second-{second}")
        first = RunDir(config)
        temporary = first.checkpoints.begin()
        (temporary / "weights").write_text("1")
        saved = first.policy_directory()
        (config.run.dir / ".lock").unlink()
        if second:
            run_campaign(config, learner=ExportingLearner())
        before = snapshot(config.run.dir)
        state = checkpoint_state(1)
        for write in (
            lambda: first.append_metrics({"iteration": 1.0}),  # noqa: B023  called right here
            lambda: first.set_state("paused"),  # noqa: B023
            lambda: first.commit(  # noqa: B023
                temporary,  # noqa: B023
                state,  # noqa: B023
                campaign_state="running",
                score=None,
            ),
            lambda: first.checkpoints.begin(),  # noqa: B023
            lambda: first.checkpoints.prune(None),  # noqa: B023
            lambda: first.publish_policy(saved, 1),  # noqa: B023
            lambda: first.rewind(None),  # noqa: B023
            lambda: first.write_progress(Progress()),  # noqa: B023
            lambda: first.acknowledge(),  # noqa: B023
        ):
            refused = refusal(write)
            unchanged = ignoring_own(snapshot(config.run.dir)) == ignoring_own(before)
            tally.count(refused.startswith("FencedError 4") and unchanged, f"a write: {refused!r}")
        first.close()
        tally.count((config.run.dir / ".lock").exists() == second, "it removed another's lock")
        if second:
            tally.count(not first_problem(config.run.dir), first_problem(config.run.dir))
        else:
            run_campaign(config, learner=ExportingLearner())
            tally.count(not first_problem(config.run.dir), first_problem(config.run.dir))
    return tally.figures()


def ignoring_own(files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """Leave out what a fenced launcher still owns: its temporary directories."""
    return {
        name: content
        for name, content in files.items()
        if not name.startswith(("checkpoints/.saving-", ".policy/"))
    }


def foreign_directories(folder: Path, seed: int) -> Figures:
    """Name a directory with other content as run.dir: it is refused, and nothing is touched."""
    tally = Tally()
    contents = (
        ("policy/model.safetensors", "samples/iteration-000001.parquet"),
        ("checkpoints/best.pt",),
        ("notes.txt",),
        (".lock", "thesis.tex"),
        (".policy/model.safetensors",),
        ("metrics.jsonl",),
        ("journal/a",),
    )
    for number, names in enumerate(contents):
        config = campaign(folder / str(number))
        for name in names:
            (config.run.dir / name).parent.mkdir(parents=True, exist_ok=True)
            (config.run.dir / name).write_text("mine")
        before = snapshot(config.run.dir)
        for start in (lambda: run_campaign(config), lambda: RunLock(config.run.dir)):  # noqa: B023
            refused = refusal(start)
            tally.count(refused.startswith("ConfigError 2") and "is not empty" in refused, refused)
        tally.count(snapshot(config.run.dir) == before, f"{names} were touched")
    return tally.figures()


def damaged_config(folder: Path, seed: int) -> Figures:
    """Delete or damage config.yaml: the same command writes it again, another seed is refused."""
    tally = Tally()
    for number, damage in enumerate((None, b"", b"seed: [", b"\xff\xfe", b"seed: 8\n", b"- 1\n")):
        world = folder / str(number)
        config = finished(world)
        file = config.run.dir / "config.yaml"
        whole = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        seen = first_problem(config.run.dir)
        tally.count("config.yaml" in seen and "writes it again" in seen, f"{damage!r}: {seen}")
        refused = refusal(lambda: export(config.run.dir, world / "out", Console(quiet=True)))  # noqa: B023
        tally.count(refused.startswith("CheckpointError 5"), f"export with {damage!r}: {refused}")
        if damage != b"seed: 8\n":
            refused = refusal(lambda: FileControl(config.run.dir).status())  # noqa: B023
            tally.count(refused.startswith("CheckpointError 5"), f"status, {damage!r}: {refused}")
        other = make_config(world).model_copy(update={"seed": 8})
        refused = refusal(lambda: run_campaign(other))  # noqa: B023
        tally.count(refused.startswith("ConfigError 2"), f"another seed, {damage!r}: {refused}")
        run_campaign(config)
        tally.count(file.read_bytes() == whole, "config.yaml was not written again")
        tally.count(not first_problem(config.run.dir), first_problem(config.run.dir))
    return tally.figures()


def lost_campaign_json(folder: Path, seed: int) -> Figures:
    """Delete campaign.json, also with damaged checkpoints: nothing starts, nothing is deleted."""
    tally = Tally()
    for number, damages in enumerate((False, True)):
        config = finished(folder / str(number))
        run = config.run.dir
        if damages:
            for checkpoint in (run / "checkpoints").iterdir():
                (checkpoint / "state.json").write_text("{}")
        (run / "campaign.json").unlink()
        before = snapshot(run)
        for _ in range(2):
            refused = refusal(lambda: run_campaign(config))  # noqa: B023
            expected = refused.startswith("CheckpointError 5") and "campaign.json" in refused
            tally.count(expected and snapshot(run) == before, refused)
        (run / "campaign.json").write_text("{}")
        refused = refusal(lambda: run_campaign(config))  # noqa: B023
        tally.count(refused.startswith("CheckpointError 5"), f"empty campaign.json: {refused}")
        (run / "campaign.json").unlink()
        after = {name: data for name, data in snapshot(run).items() if name != ".lock"}
        kept = {name: data for name, data in before.items() if name != ".lock"}
        tally.count(after == kept, "files changed")
    return tally.figures()


@contextlib.contextmanager
def few_files(free: int) -> Iterator[None]:
    """Let this process open only `free` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + free, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def too_many_open_files(folder: Path, seed: int) -> Figures:
    """Run out of file descriptors while checkpoints are read: none is set aside."""
    config = finished(folder)
    store = RunDir(campaign(folder, 6))
    root = store.checkpoints.root
    names = sorted(path.name for path in root.iterdir())
    tally = Tally()
    for free in range(8):
        with few_files(free):
            try:
                newest, problems = store.checkpoints.newest()
                held = newest is not None and newest.iteration == 4 and not problems
            except StorageError as error:
                held = "Too many open files" in str(error)
        kept = sorted(path.name for path in root.iterdir()) == names
        tally.count(held and kept, f"{free} free descriptors")
    store.close()
    tally.count(not first_problem(config.run.dir), "the campaign does not verify")
    return tally.figures()


def damaged_records(folder: Path, seed: int) -> Figures:
    """Damage a middle line of metrics.jsonl, and what an iteration took: it continues, warns."""
    tally = Tally()
    config = finished(folder / "metrics")
    file = config.run.dir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[2] = b"#" + lines[2][1:]
    file.write_bytes(b"\n".join(lines))
    run_campaign(campaign(folder / "metrics", 6), learner=ExportingLearner())
    kept = file.read_bytes().split(b"\n")
    tally.count(kept[:5] == lines[:5] and len(kept) == 8, "lines of metrics.jsonl were dropped")
    seen = first_problem(config.run.dir)
    tally.count("line 3 is damaged" in seen, seen)
    tally.count("metrics.jsonl: line 3 is damaged" in events(config), "no warning")

    config = finished(folder / "taken")
    run = config.run.dir
    pairs = uncertain_pairs(run, 4)
    FileControl(run).label(
        [{"pair_id": pair.pair_id, "verdict": "first"} for pair in pairs], source="me"
    )
    run_campaign(campaign(folder / "taken", 5), learner=ExportingLearner())
    taken = run / "inbox/taken/labels-000005.json"
    whole = taken.read_bytes()
    taken.write_bytes(whole.replace(b'"verdict": "first"', b'"verdict": "fjrst"', 1))
    more = uncertain_pairs(run, 1)
    FileControl(run).label([{"pair_id": more[0].pair_id, "verdict": "first"}], source="me")
    run_campaign(campaign(folder / "taken", 7), learner=ExportingLearner())
    human = [line.get("pairs/human", 0) for line in metrics_of(config)]
    tally.count(human == [0, 0, 0, 0, 0, 4, 1, 0], f"labels per iteration: {human}")
    return tally.figures()


def events(config: CampaignConfig) -> str:
    """Return the event logs of all attempts."""
    files = sorted((config.run.dir / "logs").glob("*/events.jsonl"))
    return "".join(json.loads(line)["message"] for f in files for line in f.open())


def label_on_damaged_checkpoint(folder: Path, seed: int) -> Figures:
    """Label pairs of iteration 4, damage its checkpoint: the labels wait for the repeated one."""
    config = finished(folder)
    run = config.run.dir
    pairs = [pair for pair in uncertain_pairs(run, 8) if pair.pair_id.startswith("4/")]
    FileControl(run).label(
        [{"pair_id": pair.pair_id, "verdict": "second"} for pair in pairs], source="me"
    )
    before = metrics_of(config)
    (run / "checkpoints/iteration-000004/learner/steps").write_text("9")
    run_campaign(campaign(folder, 6), learner=ExportingLearner())
    after = metrics_of(config)
    human = [line.get("pairs/human", 0) for line in after]
    tally = Tally()
    tally.count(human == [0, 0, 0, 0, 0, len(pairs), 0], f"labels per iteration: {human}")
    tally.count(after[:5] == before, "the repeated iterations differ")
    tally.count(not first_problem(run), first_problem(run))
    state = read_state(run)
    tally.count(state is not None and state.iteration == 6, "the campaign did not finish")
    return tally.figures()
