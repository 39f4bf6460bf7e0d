"""`rayhf submit`: a campaign as a job of a Ray cluster, with `ray job submit`'s own means.

In: a config below the current directory, and the URL of the cluster's job server. Out: a job that
does `rayhf run`. It gets this directory, without what runs and tools leave in it, and an allow-list
of our environment: what a job is given, everybody on the cluster can read. Who waits: with --follow
we wait for the job, show its log, and end with its exit code; it waits for nobody.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launch.cluster_auth import check_server, check_token_file, insecure, refusal
from launch.sanitize import plain
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

ALLOWED = ("HF_HUB_OFFLINE", "NCCL_DEBUG", "RAYHF_DEBUG")
"""Environment variables that a job gets without being asked for. None is a secret, and none names a
place on this machine."""
EXCLUDED = (
    "runs", ".git", ".venv", "venv", ".tiny", "wandb", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info",
    ".env", ".env.*", ".netrc", ".ssh", ".aws", "*.pem", "*.key", "auth_token",
)  # fmt: skip
"""What stays here, besides what .gitignore and .rayignore say: what runs and tools leave behind,
and where secrets are kept."""
LIMIT_BYTES = 100 << 20
"""Of a working directory: Ray's job server takes no more."""
LEFT = 130
"""Our exit code after Ctrl-C: the job goes on."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_SILENCE_S = 60.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of the cluster."""

    name: str
    """The submission id without its number: the run directory's name, and a hash of its whole
    path."""
    run: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    excludes: tuple[str, ...]
    cpus: float | None
    """Of the node that the command runs on; None: the head, whatever it has."""

    def line(self, url: str, submission_id: str) -> str:
        """The `ray job submit` line that does the same."""
        runtime_env = {"excludes": list(self.excludes), "env_vars": self.environment}
        words = [
            "ray",
            "job",
            "submit",
            "--address",
            url,
            "--submission-id",
            submission_id,
            "--working-dir",
            ".",
        ]
        words += ["--runtime-env-json", json.dumps(runtime_env)]
        words += [] if self.cpus is None else ["--entrypoint-num-cpus", f"{self.cpus:g}"]
        return _mode() + shlex.join([*words, "--", *self.command])


def _mode() -> str:
    """What Ray's own commands need to be told."""
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
    console: Console,
) -> int:
    """Submit; with `follow`, the job's exit code. Raises the errors of rayhf.errors, and then
    nothing was submitted."""
    job = plan(config, overrides, env=env, cpus=cpus, supervised=supervised)
    url = _url(address)
    check_token_file()
    check_server(url)
    client = _connect(url)
    submission_id = _next_id(client, job)
    with tempfile.TemporaryDirectory() as folder:
        working_dir = _package(Path.cwd(), Path(folder) / "working_dir.zip", job, config, console)
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
                f"{job.run} was submitted by somebody else just now, as job {submission_id}"
            ) from None
    console.print(f"submitted {submission_id}, the same as", markup=False, highlight=False)
    console.print(job.line(url, submission_id), markup=False, highlight=False, soft_wrap=True)
    if not follow:
        return 0
    try:
        return _exit_code(submission_id, _follow(client, submission_id, console))
    except KeyboardInterrupt:
        console.print(
            f"\nthe job goes on. `rayhf stop {job.run}` stops it after its round, "
            f"`{_mode()}ray job stop {submission_id} --address {url}` at once",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return LEFT


def plan(
    config: Path,
    overrides: Sequence[str],
    *,
    env: Sequence[str],
    cpus: float | None,
    supervised: bool,
) -> Job:
    """What to ask for. Raises ConfigError for what would be refused on the cluster, and for what
    would not be found there."""
    from rayhf.planning.preflight import check_settings

    loaded = load_config(config, overrides)
    check_settings(loaded)
    run = loaded.run.dir
    if not run.is_absolute():
        raise ConfigError(
            f"run.dir {run} is relative, and a job's own directory goes away with it; expected an absolute path that every node "
            f"sees, for example run.dir=/shared/{run}"
        )
    here = Path.cwd().resolve()
    try:
        inside = config.resolve().relative_to(here)
    except ValueError:
        raise ConfigError(
            f"config {config} is not below {here}, the directory that the job gets; start above it"
        ) from None
    command = [
        "rayhf",
        *(["--insecure-cluster"] if insecure() else []),
        "run",
        str(inside),
        *overrides,
    ]
    command += ["cluster.address=auto"] if loaded.cluster.address != "auto" else []
    command += ["--supervise"] if supervised else []
    runs = sorted(
        file.parent for depth in (1, 2, 3) for file in here.glob("*/" * depth + "campaign.json")
    )
    run = Path(os.path.normpath(run))
    slug = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40]
    return Job(
        name=f"rayhf-{slug}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}",
        run=run,
        command=tuple(command),
        environment=_environment(env),
        excludes=(*EXCLUDED, *(f"/{each.relative_to(here)}" for each in runs)),
        cpus=cpus,
    )


def _environment(wanted: Sequence[str]) -> dict[str, str]:
    """The allowed variables that are set here, and those asked for."""
    for name in wanted:
        if _SECRET.search(name):
            raise SecurityError(
                f"--env {name} looks like a secret, and everybody on the cluster can read a job's environment; put it into a "
                "file, or into the environment of the nodes"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: no such variable here")
    return {name: os.environ[name] for name in (*ALLOWED, *wanted) if name in os.environ}


def _url(address: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise ConfigError(
            f"--address {address!r}: expected the URL of a job server, for example http://HEAD:8265"
        )
    return address.rstrip("/")


def _connect(url: str) -> JobSubmissionClient:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would take them for --address
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise SecurityError(f"--address {url}: {refusal(error.message)}") from None


def _next_id(client: JobSubmissionClient, job: Job) -> str:
    """A cluster takes an id once. Raises LockedError where a job of this run is not over."""
    numbers = [0]
    for other in client.list_jobs():
        found = re.fullmatch(rf"{re.escape(job.name)}-(\d+)", other.submission_id or "")
        if found is None:
            continue
        if not other.status.is_terminal():
            raise LockedError(
                f"{job.run} is job {other.submission_id} already ({other.status}); stop it, or let it"
            )
        numbers.append(int(found[1]))
    return f"{job.name}-{max(numbers) + 1}"


def _package(directory: Path, file: Path, job: Job, config: Path, console: Console) -> Path:
    """Zip the working directory as Ray would. Raises ConfigError where it is too large, or lacks
    the config."""
    from ray._private.runtime_env.packaging import create_package

    quiet = logging.getLogger(__name__)
    create_package(
        str(directory), file, include_gitignore=True, excludes=list(job.excludes), logger=quiet
    )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.stat().st_size
    if size > LIMIT_BYTES:
        largest = sorted(entries, key=lambda entry: -entry.file_size)[:3]
        named = ", ".join(
            f"{entry.filename} {entry.file_size / 2**20:,.0f} MiB" for entry in largest
        )
        raise ConfigError(
            f"{directory} has {size / 2**20:,.0f} MiB, a job gets at most {LIMIT_BYTES >> 20} MiB; the largest: {named}. Name "
            "them in .rayignore, and give models and data as absolute paths that every node sees"
        )
    if str(config.resolve().relative_to(directory.resolve())) not in {
        entry.filename for entry in entries
    }:
        raise ConfigError(
            f"config {config} is left out by .gitignore or .rayignore: the job would not find it"
        )
    console.print(
        f"working directory: {len(entries)} files, {size / 2**20:,.1f} MiB",
        markup=False,
        highlight=False,
    )
    return file


# ------------------------------------------------------------------------------------------------------- following


def _follow(client: JobSubmissionClient, submission_id: str, console: Console) -> JobDetails:
    """Show the log until the job is over, through broken connections. Raises DeadlineError where
    nobody answers any more."""
    from aiohttp import ClientError

    shown, heard = [0], time.monotonic()
    while True:
        with contextlib.suppress(
            RuntimeError, ClientError, OSError
        ):  # the next look shows what was missed
            asyncio.run(_tail(client, submission_id, shown, console))
        try:
            info = client.get_job_info(submission_id)
            heard = time.monotonic()
            if info.status.is_terminal():
                return info
        except (RuntimeError, OSError) as error:
            if time.monotonic() - heard > _SILENCE_S:
                raise DeadlineError(
                    f"submit: no answer from the job server for {_SILENCE_S:g} s ({error}); job {submission_id} may go on"
                ) from None
        time.sleep(_POLL_S)


async def _tail(
    client: JobSubmissionClient, submission_id: str, shown: list[int], console: Console
) -> None:
    """The log from its beginning, but what was `shown`."""
    seen = 0
    async for chunk in client.tail_job_logs(submission_id):
        new = chunk[max(0, shown[0] - seen) :]
        seen += len(chunk)
        shown[0] = max(shown[0], seen)
        console.out(plain(new), end="", highlight=False)


def _exit_code(submission_id: str, info: Any) -> int:
    """The job's. Raises InterruptedRunError for a job that was stopped, ActorLostError for one that
    was lost."""
    from ray.job_submission import JobStatus

    if info.status == JobStatus.STOPPED:
        raise InterruptedRunError(
            f"job {submission_id} was stopped; submit it again and it continues"
        )
    code: int | None = info.driver_exit_code
    if code is None:
        why = " ".join(str(info.message).split())[:300]
        raise ActorLostError(
            f"job {submission_id} ended without an exit code ({why}); submit it again and it continues"
        )
    return code if code >= 0 else 128 - code
