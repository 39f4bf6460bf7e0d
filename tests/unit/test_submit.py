"""What `rayhf submit` asks of a cluster, and what it refuses to; the templates. A real cluster is
in tests/e2e/test_jobs.py."""

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
from rayhf.config.load import dump_config, load_config
from rayhf.errors import (
    ActorLostError,
    ConfigError,
    InterruptedRunError,
    PlacementError,
    SecurityError,
)
from rayhf.planning.preflight import check_settings

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "launch/templates"
RUN = "run.dir=/shared/runs/Ein Lauf"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config, some files to take along, and some to leave behind."""
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
"""An override that a shell must not read."""


def planned(*overrides: str, config: str = "configs/c.yaml", **more: Any) -> submit.Job:
    settings = {"env": (), "cpus": None, "supervised": False, **more}
    return submit.plan(Path(config), overrides, **settings)


def test_submitted_job(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MINE", "a 'quoted' $value")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    job = planned(RUN, TRACKERS, env=["MINE"], supervised=True, cpus=1)
    assert job.command == (
        "rayhf", "run", "configs/c.yaml", RUN, TRACKERS, "cluster.address=auto", "--supervise",
    )  # fmt: skip
    assert job.environment == {"NCCL_DEBUG": "INFO", "MINE": "a 'quoted' $value"}
    assert re.fullmatch(r"rayhf-ein-lauf-[0-9a-f]{8}", job.name)
    assert (
        planned("run.dir=/shared/x/../runs/Ein Lauf").name
        == job.name
        != planned("run.dir=/shared/other/Ein Lauf").name
    )


def test_printed_command_equals_the_job(here: Path) -> None:
    job = planned(RUN, TRACKERS, cpus=0.5)
    line = job.line("http://head:8265", f"{job.name}-3")
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
def test_refused_before_any_request(
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
    file = submit._package(here, here.parent / "a.zip", job, Path("configs/c.yaml"), console)
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == [
            ".gitignore",
            "configs/c.yaml",
            "data/train.jsonl",
            "my_rules.py",
        ]
    assert "working directory: 4 files, 0.0 MiB" in console.export_text()
    monkeypatch.setattr(submit, "LIMIT_BYTES", 1 << 20)
    (here / "model.safetensors").write_bytes(bytes(3 << 20))
    with pytest.raises(
        ConfigError,
        match=r"has 3 MiB, a job gets at most 1 MiB; the largest: model.safetensors 3 MiB",
    ):
        submit._package(here, here.parent / "b.zip", job, Path("configs/c.yaml"), console)
    (here / ".rayignore").write_text("model.safetensors\nconfigs\n")
    with pytest.raises(ConfigError, match=r"is left out by .gitignore or .rayignore"):
        submit._package(here, here.parent / "c.zip", job, Path("configs/c.yaml"), console)


@pytest.mark.parametrize(
    "address",
    ["auto", "head:8265", "ray://head:10001", "http://", "http://a b", "https://head/path", ""],
)
def test_malformed_address(address: str) -> None:
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


# ------------------------------------------------------------------------------- tokenless clusters


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """A real HTTP server that answers with what is put into the list."""
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


def test_cluster_without_token(
    server: tuple[str, list[tuple[int, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    monkeypatch.delenv("RAYHF_INSECURE_CLUSTER", raising=False)
    answers.append((200, b'{"authentication_mode": "token"}'))
    check_server(url)
    for bad in ((200, b'{"authentication_mode": "disabled"}'), (404, b""), (200, b"{}")):
        answers.append(bad)
        with pytest.raises(SecurityError, match="asks nobody for a token"):
            check_server(url)
    for odd in (b"no json", b"[]", b"\xff"):
        answers.append((200, odd))
        with pytest.raises(PlacementError, match="no Ray job server answers there"):
            check_server(url)
    monkeypatch.setenv("RAYHF_INSECURE_CLUSTER", "1")
    check_server(url)
    monkeypatch.delenv("RAYHF_INSECURE_CLUSTER")
    with pytest.raises(PlacementError, match="no Ray job server answers there"):
        check_server("http://127.0.0.1:9")


def test_token_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    check_token_file()


# ---------------------------------------------------------------------------------------- templates


def commands(text: str) -> list[list[str]]:
    """The `rayhf` commands of a script or a manifest, with every variable replaced by a word."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"rayhf (?:run|submit|stop) [^\n;&|']*", joined)
    return [shlex.split(re.sub(r"\$\{?[\w@]+\}?", "word=1", line)) for line in lines]


@pytest.mark.parametrize("file", sorted(TEMPLATES.iterdir()), ids=lambda file: file.name)
def test_templates(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        subprocess.run(["bash", "-n", file], check=True)
        assert os.access(file, os.X_OK)
    found, group = commands(text), typer.main.get_command(app)
    assert found
    for _, verb, *arguments in found:
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
