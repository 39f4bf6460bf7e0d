"""`build`: the tiny world on disk, each task made, measured and cached on its own.

In: a directory and a seed. Out: per task a policy, prompts, where the task has one a reward model,
and manifest.json:

    DIR/<task>/policy/          Hugging Face model directory with a tokenizer that has a chat
                                template
    DIR/<task>/train.jsonl, heldout.jsonl         {"prompt": ..., "answer": ... where there is one}
    DIR/words/reward_model/, pairs_train.jsonl, pairs_test.jsonl
    DIR/<task>/manifest.json    seed, recipe version, file sizes, measured figures

A task is built in a temporary directory beside its place and renamed into it when complete: what
lies there is whole. A second builder of the same task waits for the first one's lock and then finds
the work done. Nothing is rebuilt while the manifest agrees with the seed, with the recipe (a hash
of the code that makes the task) and with the files' sizes.
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
from typing import Any

from rayhf.errors import ConfigError

THREADS = min(2, os.cpu_count() or 1)

Progress = Callable[[str, float], None]
"""Called with a stage's name and the share of that stage that is done, 0 to 1."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """What was built for one task."""

    task: str
    directory: Path
    policy: Path
    train: Path
    heldout: Path
    reward_model: Path | None
    sizes: Mapping[str, int]
    """Parameters of each model, rows of each data file, entries of the vocabulary."""
    measured: Mapping[str, float]
    """Accuracies and scores of what was built; names say on what and how."""
    seconds: float
    """Wall time of the build."""
    cpu_seconds: float
    cached: bool
    """True when the task lay there already and nothing was built."""


def build(
    directory: Path,
    *,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, TaskInfo]:
    """Make what is missing and return what is there, by task. Uses up to two threads.

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
    home = directory / task
    expected = {"task": task, "seed": seed, "recipe": recipe_version(task)}
    if (manifest := _read_manifest(home, expected)) is not None:
        return _info(home, manifest, cached=True)
    with _lock(directory / f".{task}.lock"):
        if (manifest := _read_manifest(home, expected)) is not None:
            return _info(home, manifest, cached=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=f".{task}-") as scratch:
            made, old = Path(scratch) / "new", Path(scratch) / "old"
            made.mkdir()
            manifest = expected | _make(task, made, seed, progress)
            manifest["files"] = {
                str(path.relative_to(made)): path.stat().st_size for path in _files(made)
            }
            (made / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            if home.exists():
                home.rename(old)
            made.rename(home)
    return _info(home, manifest, cached=False)


def _make(task: str, directory: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Run the task's recipe. The imports are here because rule scorers import this package and need
    no torch."""
    import torch

    make = importlib.import_module(f"rayhf.tiny.{task}_world").make
    wall, cpu, threads = time.perf_counter(), time.process_time(), torch.get_num_threads()
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
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "torch": str(torch.__version__),
    }


def recipe_version(task: str) -> str:
    """Hash of the code that makes the task; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in _SOURCES[task]:
        tree = ast.parse((Path(__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [part for part in body if not _is_docstring(part)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """JSON Lines, for the recipes."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _read_manifest(home: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest, when it is what would be built and every file it names has its size."""
    try:
        manifest: dict[str, Any] = json.loads((home / "manifest.json").read_text())
        if any(manifest.get(key) != value for key, value in expected.items()):
            return None
        if any((home / name).stat().st_size != size for name, size in manifest["files"].items()):
            return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _info(home: Path, manifest: Mapping[str, Any], *, cached: bool) -> TaskInfo:
    reward_model = home / "reward_model"
    return TaskInfo(
        task=manifest["task"],
        directory=home,
        policy=home / "policy",
        train=home / "train.jsonl",
        heldout=home / "heldout.jsonl",
        reward_model=reward_model if reward_model.is_dir() else None,
        sizes=manifest["sizes"],
        measured=manifest["measured"],
        seconds=manifest["seconds"],
        cpu_seconds=manifest["cpu_seconds"],
        cached=cached,
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one builder at a time; the system lets go of it when that process ends, however it
    ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
