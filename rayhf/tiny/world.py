"""Build the tiny world on disk; each task is built, measured and cached on its own.

In: a directory and a seed. Out: for each task a policy, prompts, a manifest, and for some a reward
model:

    DIR/<task>/policy/          Hugging Face model directory with a tokenizer that has a chat
                                template
    DIR/<task>/train.jsonl, heldout.jsonl         {"prompt": ...}, with "answer" for arithmetic
    DIR/words/reward_model/, pairs_train.jsonl, pairs_test.jsonl
    DIR/<task>/manifest.json    seed, recipe version, file sizes, measured figures

Synchronization: a task is built in a temporary directory and renamed when complete, so that a task
directory is never partial. A second builder of the same task waits for the first one's lock and
then uses its result. A task is rebuilt only if its manifest differs from the seed, the recipe (a
hash of the code that builds the task) or the sizes of the files.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rayhf.errors import ConfigError

THREADS = min(2, os.cpu_count() or 1)

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the completed share of that stage, 0 to 1."""

_SOURCES = {
    "arithmetic": ("arithmetic.py", "arithmetic_world.py", "tokenizer.py", "language_model.py"),
    "words": ("words.py", "words_world.py", "tokenizer.py", "language_model.py", "reward_model.py"),
    "game": ("game.py", "game_world.py", "tokenizer.py", "language_model.py"),
    "instructions": (
        "instructions.py",
        "instructions_world.py",
        "tokenizer.py",
        "language_model.py",
    ),
}


TASKS = tuple(_SOURCES)


class _Built(TypedDict):
    """Result of a recipe."""

    sizes: dict[str, int]
    measured: dict[str, float]
    seconds: float
    cpu_seconds: float
    torch: str


class _Manifest(_Built):
    """Content of manifest.json."""

    task: str
    seed: int
    recipe: str
    files: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """Files and figures of one task."""

    task: str
    directory: Path
    policy: Path
    train: Path
    heldout: Path
    reward_model: Path | None
    sizes: Mapping[str, int]
    """Parameters of each model, rows of each data file, entries of the vocabulary."""
    measured: Mapping[str, float]
    """Accuracies and scores of the models, by name."""
    seconds: float
    """Wall time of the build."""
    cpu_seconds: float
    cached: bool
    """Whether the task existed already."""


def build(
    directory: Path,
    *,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, TaskInfo]:
    """Build the tasks that are missing and return all by name. Uses up to two threads.

    Raises ConfigError for an unknown task, a negative seed or a directory that cannot be written.
    """
    unknown = [task for task in tasks if task not in _SOURCES]
    if unknown:
        raise ConfigError(
            f"tiny.tasks: unknown task {unknown[0]!r}, expected one of {', '.join(_SOURCES)}"
        )
    if seed < 0:
        raise ConfigError(f"tiny.seed: got {seed}, expected 0 or more")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"tiny.dir: cannot make {directory}: {error.strerror}") from error
    report = progress or (lambda stage, fraction: None)
    return {task: _ensure(directory, task, seed, report) for task in tasks}


def _ensure(directory: Path, task: str, seed: int, progress: Progress) -> TaskInfo:
    task_dir = directory / task
    recipe = recipe_version(task)
    expected = {"task": task, "seed": seed, "recipe": recipe}
    if (existing := _read_manifest(task_dir, expected)) is not None:
        return _info(task_dir, existing, cached=True)
    with _lock(directory / f".{task}.lock"):
        if (existing := _read_manifest(task_dir, expected)) is not None:
            return _info(task_dir, existing, cached=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=f".{task}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            built = _make(task, new, seed, progress)
            files = {str(path.relative_to(new)): path.stat().st_size for path in _files(new)}
            manifest: _Manifest = {
                "task": task,
                "seed": seed,
                "recipe": recipe,
                **built,
                "files": files,
            }
            (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            if task_dir.exists():
                task_dir.rename(Path(scratch) / "old")
            new.rename(task_dir)
    return _info(task_dir, manifest, cached=False)


def _make(task: str, directory: Path, seed: int, progress: Progress) -> _Built:
    """Run the task's recipe.

    Imports are local because rule scorers import this package and do not need torch.
    """
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():  # DeepSpeed, which transformers imports, would warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable_progress_bar()
    make = importlib.import_module(f"rayhf.tiny.{task}_world").make
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        sizes, measured = make(
            directory, seed, lambda stage, fraction: progress(f"{task}: {stage}", fraction)
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "sizes": sizes,
        "measured": measured,
        "seconds": round(time.perf_counter() - wall_start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "torch": str(torch.__version__),
    }


def recipe_version(task: str) -> str:
    """Return a hash of the code that builds the task, without comments, docstrings and layout."""
    digest = hashlib.sha256()
    for name in _SOURCES[task]:
        tree = ast.parse((Path(__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                body[:] = [part for part in body if not _is_docstring(part)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _read_manifest(task_dir: Path, expected: Mapping[str, object]) -> _Manifest | None:
    """Return the manifest if it matches `expected` and every file in it has its size."""
    try:
        manifest: _Manifest = json.loads((task_dir / "manifest.json").read_text())
        if any(manifest.get(key) != value for key, value in expected.items()):
            return None
        if any(
            (task_dir / name).stat().st_size != size for name, size in manifest["files"].items()
        ):
            return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _info(task_dir: Path, manifest: _Manifest, *, cached: bool) -> TaskInfo:
    reward_model = task_dir / "reward_model"
    return TaskInfo(
        task=manifest["task"],
        directory=task_dir,
        policy=task_dir / "policy",
        train=task_dir / "train.jsonl",
        heldout=task_dir / "heldout.jsonl",
        reward_model=reward_model if reward_model.is_dir() else None,
        sizes=manifest["sizes"],
        measured=manifest["measured"],
        seconds=manifest["seconds"],
        cpu_seconds=manifest["cpu_seconds"],
        cached=cached,
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on `path`; the system releases it when the process ends for any reason."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
