"""`rayhf submit`: the job, refusals and templates; tests/e2e/test_jobs.py has a real cluster."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from campaigns import make_config
from ray.job_submission import JobDetails
from rich.console import Console

from launch import submit
from launch.cli import app
from launch.cluster_auth import check_server, check_token_file
from launch.local import _session_directory
from launch.secret_files import variable_problem
from rayhf.config.load import dump_config, load_config
from rayhf.errors import (
    ActorLostError,
    ConfigError,
    InterruptedRunError,
    PlacementError,
    SecurityError,
)
from rayhf.planning.preflight import check_settings
from rayhf.service.credentials import read_private

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "launch/templates"
RUN = "run.dir=/shared/runs/Ein Lauf"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with a config, files to package and files to leave out."""
    for name in (
        "my_rules.py",
        "data/train.jsonl",
        ".env",
        "deploy.key",
        "runs/old/campaign.json",
        "other/campaign.json",
        "big.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("big.bin\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/c.yaml").write_text(dump_config(make_config(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for name in (*submit.ALLOWED, "RAYHF_INSECURE_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


TRACKERS = """trackers=[{type: wandb, name: "it's; touch x"}]"""
"""An override that a shell must not interpret."""


def planned(*overrides: str, config: str = "configs/c.yaml", **more: Any) -> submit.Job:
    settings = {"env": (), "cpus": None, "supervised": False, **more}
    return submit.plan(Path(config), overrides, **settings)


def test_job(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MINE", "a 'quoted' $value")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    job = planned(RUN, TRACKERS, env=["MINE"], supervised=True, cpus=1)
    assert job.command == (
        *("rayhf", "run", "configs/c.yaml"),
        *(RUN, TRACKERS, "cluster.address=auto", "--supervise"),
    )
    assert job.environment == {"NCCL_DEBUG": "INFO", "MINE": "a 'quoted' $value"}
    assert re.fullmatch(r"rayhf-ein-lauf-[0-9a-f]{8}", job.name)
    assert (
        planned("run.dir=/shared/x/../runs/Ein Lauf").name
        == job.name
        != planned("run.dir=/shared/other/Ein Lauf").name
    )


def test_command_line_survives_a_shell(here: Path) -> None:
    job = planned(RUN, TRACKERS, cpus=0.5)
    line = job.command_line("http://head:8265", f"{job.name}-3")
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    )
    words = echoed.stdout.splitlines()
    assert words[:6] == [
        "RAY_AUTH_MODE=token",
        "ray",
        "job",
        "submit",
        "--address",
        "http://head:8265",
    ]
    assert tuple(words[words.index("--") + 1 :]) == job.command and "canary" not in line
    assert json.loads(words[words.index("--runtime-env-json") + 1])["excludes"] == list(
        job.excludes
    )
    assert words[words.index("--entrypoint-num-cpus") + 1] == "0.5"
    from ray.dashboard.modules.job.cli import submit as ray_submit

    options = ray_submit.make_context("submit", words[4:]).params
    assert options["entrypoint"] == job.command and options["submission_id"] == f"{job.name}-3"


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({}, ConfigError, "run.dir .* is relative|expected an absolute path"),
        ({"overrides": [RUN, "learner.lrr=1"]}, ConfigError, "did you mean lr"),
        ({"overrides": [RUN, "learner.prompts_per_step=3"]}, ConfigError, "nearest valid values"),
        (
            {"overrides": [RUN], "env": ["NOWHERE"]},
            ConfigError,
            "--env NOWHERE: no such variable here",
        ),
        ({"overrides": [RUN], "env": ["NAME=VALUE"]}, ConfigError, "no such variable here"),
        ({"overrides": [RUN], "config": "../c.yaml"}, ConfigError, "is not below"),
    ],
)
def test_refusal_before_any_request(
    here: Path, arguments: dict[str, Any], error: type[Exception], expected: str
) -> None:
    (here.parent / "c.yaml").write_text((here / "configs/c.yaml").read_text())
    text = (here / "configs/c.yaml").read_text()
    (here / "configs/c.yaml").write_text(text.replace(f"dir: {here}/run", "dir: runs/one"))
    overrides = arguments.pop("overrides", [])
    with pytest.raises(error, match=expected) as refused:
        planned(*overrides, **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "MY_PASSWORD",
        "db_passwd",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "DB_PASS",
        "GITHUB_PAT",
        "JWT",
        "DATABASE_URL",
        "MYTOKEN",
        "SENTRY_DSN",
    ],
)
def test_secrets_are_refused_by_name(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "canary")
    with pytest.raises(SecurityError, match=f"--env {name} looks like a secret") as refused:
        planned(RUN, env=[name])
    assert "canary" not in str(refused.value)


def test_working_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, console = planned(RUN), Console(record=True, width=200)
    folder = here.parent / f"{here.name}-zips"
    folder.mkdir()
    job, file = submit.package(here, folder, job, Path("configs/c.yaml"), console)
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == [
            ".gitignore",
            "configs/c.yaml",
            "data/train.jsonl",
            "my_rules.py",
        ]
    said = console.export_text()
    assert "working directory: 4 files, 0.0 MiB" in said and "left out .env: its name" in said
    monkeypatch.setattr(submit, "LIMIT_BYTES", 1 << 20)
    (here / "model.safetensors").write_bytes(bytes(3 << 20))
    with pytest.raises(
        ConfigError,
        match=r"has 3 MiB, a job gets at most 1 MiB; the largest: model.safetensors 3 MiB",
    ):
        submit.package(here, _fresh(folder), job, Path("configs/c.yaml"), console)
    (here / ".rayignore").write_text("model.safetensors\nconfigs\n")
    with pytest.raises(ConfigError, match=r"is left out by .gitignore or .rayignore"):
        submit.package(here, _fresh(folder), job, Path("configs/c.yaml"), console)


def _fresh(folder: Path) -> Path:
    for file in folder.iterdir():
        file.unlink()
    return folder


SECRETS = {
    "token": "x", "auth_token": "x", "hf_token.txt": "x", "id_rsa": "x", "keys/id_ed25519": "x",
    ".git-credentials": "x", ".huggingface/token": "x", ".kube/config": "x", ".netrc": "x",
    "credentials.json": "x", "secrets.yaml": "x", "prod.env": "x", "server.pem": "x",
    "my [1].key": "x", "notes.txt": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "late.bin": "." * (1 << 20) + "hf_" + "a1B2" * 9, "a.py": 'key = "sk-' + "a1B2" * 9 + '"',
    "b.md": "ghp_" + "a1B2" * 9, "c.sh": "AKIA" + "Q1" * 8,
}  # fmt: skip
INNOCENT = {
    "token.py": "def tokenize(): ...", "tokenizer.json": "{}", "added_tokens.json": "{}",
    "special_tokens_map.json": "{}", "id_rsa.pub": "ssh-rsa AAAA", "keys.py": "sk-learn-is-a-name",
    "monkey.txt": "hf_transformers", "tokens.jsonl": "{}",
}  # fmt: skip


def test_secrets_are_left_out_by_name_and_content(here: Path) -> None:
    for name, content in (SECRETS | INNOCENT).items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(content)
    folder = here.parent / f"{here.name}-zips"
    folder.mkdir()
    console = Console(record=True, width=200)
    config = Path("configs/c.yaml")
    job, file = submit.package(here, folder, planned(RUN), config, console, ["credentials.json"])
    with zipfile.ZipFile(file) as archive:
        packed = set(archive.namelist())
    assert packed & SECRETS.keys() == {"credentials.json"} and INNOCENT.keys() <= packed
    said = console.export_text()
    for name in SECRETS.keys() - {"credentials.json"}:
        assert f"left out {name}: " in said
    assert "/my\\ \\[1\\].key" in job.excludes
    with pytest.raises(ConfigError, match="--include nothing: no such file"):
        submit.package(here, folder, planned(RUN), config, console, ["nothing"])
    with (here / "configs/c.yaml").open("a") as text:
        text.write("# AKIA" + "Q1" * 8)
    with pytest.raises(SecurityError, match=r"c.yaml looks like a secret .it contains an AWS key"):
        submit.package(here, _fresh(folder), planned(RUN), config, console)
    with pytest.raises(SecurityError, match="override trackers looks like a secret"):
        planned(RUN, "trackers=[{type: wandb, name: AKIA" + "Q1" * 8 + "}]")


@pytest.mark.parametrize(
    "address",
    ["auto", "head:8265", "ray://head:10001", "http://", "http://a b", "https://head/path", ""],
)
def test_address_that_is_no_url(address: str) -> None:
    with pytest.raises(ConfigError, match="for example http://HEAD:8265"):
        submit._url(address)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 12}, 12),
        ({"status": "FAILED", "driver_exit_code": 75}, 75),
        ({"status": "FAILED", "driver_exit_code": -9}, 137),
        ({"status": "STOPPED"}, InterruptedRunError),
        ({"status": "FAILED", "message": "node\ndied"}, ActorLostError),
    ],
)
def test_exit_codes(facts: dict[str, Any], expected: Any) -> None:
    info = JobDetails(type="SUBMISSION", entrypoint="rayhf run", **facts)
    if isinstance(expected, int):
        assert submit._exit_code("one", info) == expected
    else:
        with pytest.raises(expected, match="submit it again and it continues"):
            submit._exit_code("one", info)


# ------------------------------------------------------------ clusters without token authentication


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """Start an HTTP server that responds with the last entry of the list."""
    answers: list[tuple[int, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers[-1]
            self.send_response(code if self.path == "/api/authentication_mode" else 500)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            return None

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", answers
    running.shutdown()
    running.server_close()
    thread.join()


def test_cluster_without_token_authentication(
    server: tuple[str, list[tuple[int, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    monkeypatch.delenv("RAYHF_INSECURE_CLUSTER", raising=False)
    answers.append((200, b'{"authentication_mode": "token"}'))
    check_server(url)
    for bad in ((200, b'{"authentication_mode": "disabled"}'), (404, b""), (200, b"{}")):
        answers.append(bad)
        with pytest.raises(SecurityError, match="has no token authentication"):
            check_server(url)
    for odd in (b"no json", b"[]", b"\xff"):
        answers.append((200, odd))
        with pytest.raises(PlacementError, match="no Ray job server responds there"):
            check_server(url)
    monkeypatch.setenv("RAYHF_INSECURE_CLUSTER", "1")
    check_server(url)
    monkeypatch.delenv("RAYHF_INSECURE_CLUSTER")
    with pytest.raises(PlacementError, match="no Ray job server responds there"):
        check_server("http://127.0.0.1:9")


def test_session_directory_of_a_local_cluster_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    before = os.umask(0)
    try:
        with _session_directory() as directory:
            assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("MINE", "postgres://me:pass@host/db", True),
        ("MINE", "hf_" + "a1B2" * 9, True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", False),
        ("HF_ENDPOINT", "https://mirror:8080/x", False),
    ],
)
def test_variables_are_refused_by_content_too(name: str, value: str, refused: bool) -> None:
    assert bool(variable_problem(name, value)) is refused


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_token_file_that_others_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("canary")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    for name in ("RAY_AUTH_TOKEN", "RAYHF_INSECURE_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        with pytest.raises(SecurityError, match=f"has mode {mode:o}: chmod 600") as refused:
            check_token_file()
        assert "canary" not in str(refused.value)
    file.chmod(0o600)
    check_token_file()
    os.chown(file, 12345, -1)
    with pytest.raises(SecurityError, match="belongs to uid 12345"):
        check_token_file()
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        read_private(file, key="k")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    check_token_file()


# ---------------------------------------------------------------------------------------- templates


def commands(text: str) -> list[list[str]]:
    """Return the `rayhf` commands of a script, with every variable replaced by a word."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"rayhf (?:run|submit|stop) [^\n;&|']*", joined)
    return [shlex.split(re.sub(r"\$\{?[\w@]+\}?", "word=1", line)) for line in lines]


@pytest.mark.parametrize("file", sorted(TEMPLATES.iterdir()), ids=lambda file: file.name)
def test_templates(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        subprocess.run(["bash", "-n", file], check=True)
        assert os.access(file, os.X_OK)
    job = yaml.safe_load(text) if file.suffix == ".yaml" else None
    lines = commands(job["spec"]["entrypoint"] if job else text)
    group = typer.main.get_command(app)
    assert lines
    for _, verb, *arguments in lines:
        group.commands[verb].make_context(verb, arguments)  # raises click's UsageError
    assert "token" in text and "0.0.0.0" not in text and "--supervise" in text
    assert re.search(r"run\.dir=\"?(/shared/|\$SHARED/|\$run\b)", text)


def test_kuberay_job() -> None:
    job = yaml.safe_load((TEMPLATES / "kuberay_rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and job["spec"]["backoffLimit"] > 0
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert (
            mounts["shared"] == "/shared"
            and {volume["name"] for volume in pod["volumes"]} >= mounts.keys()
        )
    _, verb, config, *overrides = [
        word for word in shlex.split(job["spec"]["entrypoint"]) if not word.startswith("--")
    ]
    recipe = ROOT / "configs/recipes" / Path(config).name
    check_settings(load_config(recipe, overrides))
    assert verb == "run" and load_config(recipe, overrides).run.dir == Path("/shared/runs/one")
