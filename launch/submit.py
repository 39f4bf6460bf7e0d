"""`rayhf submit`: run a campaign as a job of a Ray cluster, with the means of `ray job submit`.

In: a config below the current directory, and the URL of the cluster's job server. Out: a job that
runs `rayhf run`. It gets this directory, without the files that runs and tools leave in it and
without what looks like a secret (launch/secret_files.py), and an
allow-list of our environment variables: everyone on the cluster can read a job's environment.

Synchronization: with --follow we wait for the job, print its log, and exit with its code. The job
waits for nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from actors.ray_internals import create_package
from launch.cluster_auth import check_server, check_token_file, insecure, refusal
from launch.sanitize import plain, print_plain
from launch.secret_files import secrets_in, text_problem, variable_problem
from rayhf.config.load import load_config
from rayhf.errors import (
    ActorLostError,
    ConfigError,
    DeadlineError,
    InterruptedRunError,
    LockedError,
    SecurityError,
)

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ALLOWED = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "NCCL_DEBUG", "RAYHF_DEBUG")
"""Environment variables that every job gets. None is a secret or names a place on this machine."""
EXCLUDED = (
    "runs", ".git", ".venv", "venv", ".tiny", "wandb", "__pycache__", ".*_cache", ".hypothesis",
    "*.egg-info",
)  # fmt: skip
"""Output of runs and tools, which stays here, besides the files of .gitignore and .rayignore and
what looks like a secret (launch/secret_files.py)."""
LIMIT_BYTES = 100 << 20
"""Maximum size of a working directory that Ray's job server accepts."""
DETACHED = 130
"""Our exit code after Ctrl-C: the job continues."""
_ADVICE = (
    "everyone on the cluster can read a job's files, environment and command; put it into a file "
    "of mode 600 that every node sees, or into the environment of the nodes (docs/security.md)"
)
_SILENCE_S = 60.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job to submit."""

    name: str
    """Submission id without its number: the run directory's name, and a hash of its whole path."""
    run: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    excludes: tuple[str, ...]
    cpus: float | None
    """CPUs of the node that runs the command; None: the head, whatever it has."""

    def command_line(self, url: str, submission_id: str) -> str:
        """Return the `ray job submit` line that does the same."""
        runtime_env = {"excludes": list(self.excludes), "env_vars": self.environment}
        words = ["ray", "job", "submit", "--address", url, "--submission-id", submission_id]
        words += ["--working-dir", ".", "--runtime-env-json", json.dumps(runtime_env)]
        words += [] if self.cpus is None else ["--entrypoint-num-cpus", f"{self.cpus:g}"]
        return _mode() + shlex.join([*words, "--", *self.command])


def _mode() -> str:
    """Return the prefix that Ray's own commands need."""
    return "" if insecure() else "RAY_AUTH_MODE=token "


def submit(
    config: Path,
    overrides: Sequence[str],
    *,
    address: str,
    env: Sequence[str],
    cpus: float | None,
    supervised: bool,
    follow: bool,
    include: Sequence[str] = (),
    console: Console,
) -> int:
    """Submit a job and return 0; with `follow`, wait for it and return its exit code.

    Raises the errors of rayhf.errors; then nothing was submitted.
    """
    job = plan(config, overrides, env=env, cpus=cpus, supervised=supervised)
    url = _url(address)
    check_token_file()
    check_server(url)
    client = _connect(url)
    submission_id = _next_id(client, job)
    with tempfile.TemporaryDirectory() as folder:
        job, working_dir = package(Path.cwd(), Path(folder), job, config, console, include)
        runtime_env = {"working_dir": str(working_dir), "env_vars": job.environment}
        try:
            client.submit_job(
                entrypoint=shlex.join(job.command),
                submission_id=submission_id,
                runtime_env=runtime_env,
                entrypoint_num_cpus=job.cpus,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            raise LockedError(
                f"{job.run} was submitted at the same time by another user, as job {submission_id}"
            ) from None
    print_plain(console, f"submitted {submission_id}, the same as")
    print_plain(console, job.command_line(url, submission_id))
    if not follow:
        return 0
    try:
        return _exit_code(submission_id, _follow(client, submission_id, console))
    except KeyboardInterrupt:
        print_plain(
            console,
            f"\nthe job continues. `rayhf stop {job.run}` stops it after its iteration, "
            f"`{_mode()}ray job stop {submission_id} --address {url}` at once",
        )
        return DETACHED


def plan(
    config: Path,
    overrides: Sequence[str],
    *,
    env: Sequence[str],
    cpus: float | None,
    supervised: bool,
) -> Job:
    """Return the job.

    Raises ConfigError for a config that would be refused on the cluster, and for files that would
    not exist there.
    """
    from rayhf.planning.preflight import check_settings

    loaded = load_config(config, overrides)
    check_settings(loaded)
    if not loaded.run.dir.is_absolute():
        raise ConfigError(
            f"run.dir {loaded.run.dir} is relative, and a job's own directory is deleted with it; "
            "expected an absolute path that every node sees, for example "
            f"run.dir=/shared/{loaded.run.dir}"
        )
    here = Path.cwd().resolve()
    try:
        inside = config.resolve().relative_to(here)
    except ValueError:
        raise ConfigError(
            f"config {config} is not below {here}, the directory that the job gets; run this "
            "command in a directory above it"
        ) from None
    for override in overrides:
        if problem := text_problem(override.encode(errors="replace"), urls=True):
            key = override.partition("=")[0]
            raise SecurityError(f"override {key} looks like a secret ({problem}): {_ADVICE}")
    command = ["rayhf", *(["--insecure-cluster"] if insecure() else [])]
    command += ["run", str(inside), *overrides]
    command += ["cluster.address=auto"] if loaded.cluster.address != "auto" else []
    command += ["--supervise"] if supervised else []
    run = Path(os.path.normpath(loaded.run.dir))
    slug = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40]
    return Job(
        name=f"rayhf-{slug}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}",
        run=run,
        command=tuple(command),
        environment=_environment(env),
        excludes=(*EXCLUDED, *_run_directories(here)),
        cpus=cpus,
    )


def _run_directories(here: Path) -> list[str]:
    """Return the run directories up to three levels below `here`, as patterns of .gitignore."""
    states = [file for depth in (1, 2, 3) for file in here.glob("*/" * depth + "campaign.json")]
    return [f"/{run.relative_to(here)}" for run in sorted(file.parent for file in states)]


def _environment(requested: Sequence[str]) -> dict[str, str]:
    """Return the job's variables: the allowed ones that are set here, and `requested`."""
    for name in requested:
        if problem := variable_problem(name, os.environ.get(name, "")):
            raise SecurityError(f"--env {name} looks like a secret ({problem}): {_ADVICE}")
        if name not in os.environ:
            raise ConfigError(f"--env {name}: no such variable here")
    return {name: os.environ[name] for name in (*ALLOWED, *requested) if name in os.environ}


def _url(address: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise ConfigError(
            f"--address {address!r}: expected the URL of a job server, for example http://HEAD:8265"
        )
    return address.rstrip("/")


def _connect(url: str) -> JobSubmissionClient:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer them to --address
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise SecurityError(f"--address {url}: {refusal(error.message)}") from None


def _next_id(client: JobSubmissionClient, job: Job) -> str:
    """Return a submission id that the cluster has not seen.

    Raises LockedError where a job of this run is not over.
    """
    numbers = [0]
    for other in client.list_jobs():
        match = re.fullmatch(rf"{re.escape(job.name)}-(\d+)", other.submission_id or "")
        if match is None:
            continue
        if not other.status.is_terminal():
            raise LockedError(
                f"{job.run} is job {other.submission_id} already ({other.status}); stop that job, "
                "or wait for it"
            )
        numbers.append(int(match[1]))
    return f"{job.name}-{max(numbers) + 1}"


def package(
    directory: Path,
    folder: Path,
    job: Job,
    config: Path,
    console: Console,
    include: Sequence[str] = (),
) -> tuple[Job, Path]:
    """Zip the working directory without what looks like a secret, and print what was left out.

    Args:
        folder: where the zip file is written.
        include: files, relative to the directory, that are no secrets.

    Returns the job, which now excludes the secrets, and the file. Raises ConfigError where it is
    too large or lacks the config, SecurityError where the config itself looks like a secret.
    """
    for name in include:
        if not (directory / name).is_file():
            raise ConfigError(f"--include {name}: no such file in {directory}")
    file = folder / "all.zip"
    create_package(directory, file, excludes=job.excludes)
    with zipfile.ZipFile(file) as archive:
        kept = {os.path.normpath(name) for name in include}
        secrets = {name: why for name, why in secrets_in(archive).items() if name not in kept}
    inside = str(config.resolve().relative_to(directory.resolve()))
    if inside in secrets:
        raise SecurityError(f"config {config} looks like a secret ({secrets[inside]}): {_ADVICE}")
    if secrets:
        for name, why in secrets.items():
            print_plain(console, f"left out {name}: {why} (--include {shlex.quote(name)} packs it)")
        job = replace(job, excludes=(*job.excludes, *map(_pattern, secrets)))
        file = folder / "working_dir.zip"
        create_package(directory, file, excludes=job.excludes)
    _check_package(directory, file, config, inside, console)
    return job, file


def _pattern(name: str) -> str:
    """Return the pattern of .gitignore that matches this file only."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)


def _check_package(
    directory: Path, file: Path, config: Path, inside: str, console: Console
) -> None:
    """Raise ConfigError where the zip file is too large, or lacks the config."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.stat().st_size
    if size > LIMIT_BYTES:
        largest = ", ".join(
            f"{entry.filename} {entry.file_size / 2**20:,.0f} MiB"
            for entry in sorted(entries, key=lambda entry: -entry.file_size)[:3]
        )
        raise ConfigError(
            f"{directory} has {size / 2**20:,.0f} MiB, a job gets at most {LIMIT_BYTES >> 20} MiB; "
            f"the largest: {largest}. Name them in .rayignore, and give models and data as "
            "absolute paths that every node sees"
        )
    if inside not in {entry.filename for entry in entries}:
        raise ConfigError(
            f"config {config} is left out by .gitignore or .rayignore: the job would not find it"
        )
    print_plain(console, f"working directory: {len(entries)} files, {size / 2**20:,.1f} MiB")


# -------------------------------------------------------------------------------------- following


def _follow(client: JobSubmissionClient, submission_id: str, console: Console) -> JobDetails:
    """Print the log until the job is over, through broken connections.

    Raises DeadlineError where the job server does not respond any more.
    """
    from aiohttp import ClientError

    heartbeat = time.monotonic()
    log = _Log(console)
    while True:
        with contextlib.suppress(RuntimeError, ClientError, OSError):  # the next tail catches up
            asyncio.run(log.tail(client, submission_id))
        try:
            details = client.get_job_info(submission_id)
            heartbeat = time.monotonic()
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError) as error:
            if time.monotonic() - heartbeat > _SILENCE_S:
                raise DeadlineError(
                    f"submit: no response from the job server for {_SILENCE_S:g} s ({error}); "
                    f"job {submission_id} may still run"
                ) from None
        time.sleep(_POLL_S)


class _Log:
    """A job's log on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = 0
        """Number of characters."""

    async def tail(self, client: JobSubmissionClient, submission_id: str) -> None:
        """Read the log from its beginning; print what was not printed before."""
        read = 0
        async for chunk in client.tail_job_logs(submission_id):
            new = chunk[max(0, self._printed - read) :]
            read += len(chunk)
            self._printed = max(self._printed, read)
            self._console.out(plain(new), end="", highlight=False)


def _exit_code(submission_id: str, details: JobDetails) -> int:
    """Return the job's exit code.

    Raises InterruptedRunError for a job that was stopped, ActorLostError for one that was lost.
    """
    from ray.job_submission import JobStatus

    if details.status == JobStatus.STOPPED:
        raise InterruptedRunError(
            f"job {submission_id} was stopped; submit it again and it continues"
        )
    code: int | None = details.driver_exit_code
    if code is None:
        reason = " ".join(str(details.message).split())[:300]
        raise ActorLostError(
            f"job {submission_id} ended without an exit code ({reason}); submit it again and it "
            "continues"
        )
    return code if code >= 0 else 128 - code
