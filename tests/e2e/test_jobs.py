"""Jobs on a token-protected Ray cluster of two nodes on this machine, started by
launch/templates/ray_start.sh: submitted, followed, refused, stopped, submitted again, resumed.
Three secrets are about, and none of them is anywhere afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from world import make_world, write_config

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
RAYHF = Path(sys.executable).with_name("rayhf")
SCRIPT = ROOT / "launch/templates/ray_start.sh"
SECRETS = {
    "WANDB_API_KEY": "0123456789canary" * 2 + "wandb000",
    "HF_TOKEN": "hf_canaryCanaryCanaryCanary",
}
SMALL = (
    "--object-store-memory",
    "100000000",
    "--min-worker-port",
    "0",
    "--max-worker-port",
    "0",
    "--num-cpus",
    "1",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


class TwoNodes:
    """A head and a worker on this machine."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        """Short: the paths of Ray's sockets may have 107 characters."""
        self.port, self.url_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.url_port}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY")} | {
            "SHARED": str(shared),
            "RAY_PORT": str(self.port),
            "RAY_DASHBOARD_PORT": str(self.url_port),
            "PATH": f"{RAYHF.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.head = (
            "--temp-dir",
            str(self.temporary),
            "--ray-client-server-port",
            str(free_port()),
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> None:
        own = ["--dashboard-agent-listen-port", str(free_port()), *SMALL]
        self._processes.append(
            subprocess.Popen(
                [SCRIPT, *arguments, *own],
                env=self.environment | SECRETS,
                stdout=(self.shared / f"{arguments[0]}.out").open("wb"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )

    def nodes(self) -> int:
        try:
            return len(self.get("/nodes?view=summary")["data"]["summary"])
        except OSError:
            return 0

    def get(self, path: str) -> Any:
        token = (self.shared / ".rayhf/token").read_text()
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def close(self) -> None:
        family = [each for process in self._processes for each in _family(process.pid)]
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=20)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _family(pid: int) -> list[psutil.Process]:
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path_factory.mktemp("s"))
    try:
        nodes.start("head", *nodes.head, "--resources", json.dumps({"learns": 1}))
        wait_for("the head does not answer", lambda: nodes.nodes() == 1)
        nodes.start("worker", "127.0.0.1", "--resources", json.dumps({"writes": 1}))
        wait_for("the worker does not join", lambda: nodes.nodes() == 2)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    pools = {"resources": {"rollout": {"writes": 1}, "learner": {"learns": 1}}}
    write_config(
        world,
        "one",
        tracking={"wandb": "offline"},
        run={"iterations": 500, "checkpoint_every": 2},
        cluster=pools,
    )
    return world


class Session:
    """A user's shell in `world`, and everything that it showed."""

    def __init__(self, cluster: TwoNodes, world: Path) -> None:
        self.cluster, self.world, self.shown = cluster, world, ""
        self.environment = cluster.environment | {
            "RAY_AUTH_TOKEN_PATH": str(cluster.shared / ".rayhf/token")
        }

    def start(self, *command: Any, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.world,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], code: int, seconds: float = 240) -> str:
        shown, _ = process.communicate(timeout=seconds)
        self.shown += shown
        assert process.returncode == code, shown
        return shown

    def run(self, *command: Any, code: int = 0, **environment: str) -> str:
        return self.finish(self.start(*command, **environment), code)


class Control:
    """A place for the campaign's control over gRPC: TLS and a token, in files that only their owner
    may read."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        ca, self.token = trustme.CA(), "canary" * 6
        certificate = ca.issue_cert("localhost")
        ca.cert_pem.write_to_path(folder / "ca.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        (folder / "token").write_text(self.token)
        for name in ("key.pem", "token"):
            (folder / name).chmod(0o600)
        for name, shown in (("security", {"token_file": str(folder / "token")}), ("stranger", {})):
            (folder / f"{name}.yaml").write_text(
                json.dumps({"ca": str(folder / "ca.pem"), **shown})
            )
        port = free_port()
        tls = {"certificate": str(folder / "certificate.pem"), "key": str(folder / "key.pem")}
        self.service = "service=" + json.dumps(
            {"port": port, "tls": tls, "token_file": str(folder / "token")}
        )
        self.asked = ("--address", f"localhost:{port}", "--security", folder / "security.yaml")
        self.asked_by_a_stranger = (
            "--address",
            f"localhost:{port}",
            "--security",
            folder / "stranger.yaml",
        )


def people_have_their_say(user: Session, control: Control, world: Path, metrics: Path) -> None:
    """Over gRPC: look, pause, judge a pair, hand in a prompt, let go on."""
    assert "RUNNING" in user.run(RAYHF, "status", *control.asked)
    assert "unauthenticated" in user.run(RAYHF, "pause", *control.asked_by_a_stranger, code=13)
    assert "pauses once iteration" in user.run(RAYHF, "pause", *control.asked)
    wait_for("the pause", lambda: "PAUSED" in user.run(RAYHF, "status", *control.asked))
    pair = json.loads(user.run(RAYHF, "pairs", "--count", "1", *control.asked))
    (world / "verdicts.jsonl").write_text(
        json.dumps({"pair_id": pair["pair_id"], "verdict": "second"}) + "\n"
    )
    (world / "prompts.jsonl").write_text('{"prompt": "a new one"}\n')
    assert "1 labels submitted" in user.run(
        RAYHF, "label", "--file", "verdicts.jsonl", *control.asked
    )
    assert "1 prompts submitted" in user.run(RAYHF, "add-prompts", "prompts.jsonl", *control.asked)
    assert "resumes" in user.run(RAYHF, "unpause", *control.asked)
    wait_for("a round with the verdict", lambda: '"pairs/human": 1.0' in metrics.read_text())


def test_a_campaign_as_a_job(cluster: TwoNodes, world: Path) -> None:
    user, run = Session(cluster, world), cluster.shared / "runs/one"
    submit = [RAYHF, "submit", "one.yaml", f"run.dir={run}", "--address", cluster.url]
    mode = [
        stat.S_IMODE((cluster.shared / name).stat().st_mode) for name in (".rayhf", ".rayhf/token")
    ]
    assert mode == [0o700, 0o600]

    # Nobody gets in without the token, with another one, or with one that lies about.
    assert "couldn't find an authentication token; set RAY_AUTH_TOKEN" in user.run(
        *submit, code=6, RAY_AUTH_TOKEN_PATH="", HOME=str(world)
    )
    assert "Invalid authentication token; set RAY_AUTH_TOKEN" in user.run(
        *submit, code=6, RAY_AUTH_TOKEN="wrong" * 8
    )
    (world / "token").write_text((cluster.shared / ".rayhf/token").read_text())
    (world / "token").chmod(0o644)
    assert "chmod 600" in user.run(*submit, code=6, RAY_AUTH_TOKEN_PATH=str(world / "token"))
    (world / "token").unlink()

    control = Control(cluster.shared / ".rayhf/control")
    followed = user.start(*submit, control.service, "--follow")
    metrics = run / "metrics.jsonl"
    wait_for(
        "three rounds",
        lambda: (
            followed.poll() is not None
            or (metrics.exists() and metrics.read_text().count("\n") > 3)
        ),
        300,
    )
    actors = cluster.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    assert (
        len(
            {
                a["node_id"]
                for a in actors
                if a["state"] == "ALIVE" and a["class_name"].endswith("Actor")
            }
        )
        == 2
    ), actors
    assert "/runs/one is job rayhf-one-" in user.run(*submit, code=4)
    people_have_their_say(user, control, world, metrics)
    assert "stops once iteration" in user.run(RAYHF, "stop", *control.asked)
    shown = user.finish(followed, 75)
    assert (
        "working directory: " in shown
        and "ray job submit --address" in shown
        and "round   1/500" in shown
    )
    assert "rayhf: " in shown and "stopped after round" in shown

    committed = json.loads((run / "campaign.json").read_text())["iteration"]
    again = user.run(
        SCRIPT,
        "submit",
        "one.yaml",
        "one",
        f"run.iterations={committed + 2}",
        "--entrypoint-cpus",
        "0.1",
    )
    assert f"continue: after round {committed}" in again
    user.run(RAYHF, "verify", run, "--deep")
    assert "DONE" in user.run(RAYHF, "status", run)

    line = next(line for line in again.splitlines() if " ray job submit " in line)
    assert "succeeded" in user.run(
        "bash", "-c", line.replace("-2 --working-dir", "-9 --working-dir")
    )

    two = [f"run.dir={cluster.shared}/runs/two"]
    assert "did you mean even?" in user.run(
        *submit, *two, "scorer.train.0.function=my_rules:evven", "--follow", code=2
    )
    left = user.start(*submit, *two, "--follow")
    wait_for(
        "a job that runs", lambda: "RUNNING" in {job["status"] for job in cluster.get("/api/jobs/")}
    )
    time.sleep(2.0)  # its log is being read
    left.send_signal(signal.SIGINT)
    shown = user.finish(left, 130)
    assert "the job goes on. `rayhf stop " in shown
    user.run("bash", "-c", re.search(r"`(RAY_AUTH_MODE=token ray job stop [^`]*)`", shown)[1])
    jobs = cluster.get("/api/jobs/")
    assert sorted(job["status"] for job in jobs) == [
        "FAILED",
        "FAILED",
        "STOPPED",
        "SUCCEEDED",
        "SUCCEEDED",
    ]

    assert len(list(cluster.temporary.glob("session_2*/logs/**/*.log"))) > 10
    secrets = {
        **SECRETS,
        "token": (cluster.shared / ".rayhf/token").read_text(),
        "control": control.token,
    }
    places = {"shown": user.shown, "jobs": json.dumps(jobs)}
    for name, secret in secrets.items():
        assert [place for place, text in places.items() if secret in text] == [], name
        grep = ["grep", "-rlaF", secret, cluster.shared, cluster.temporary, world]
        found = subprocess.run(grep, capture_output=True, text=True).stdout.splitlines()
        assert [
            file for file in found if not file.endswith((".rayhf/token", ".rayhf/control/token"))
        ] == [], name
    mirrored = [file.read_text() for file in (run / "logs").glob("attempt-*/wandb.log")]
    assert list((run / "wandb").glob("offline-run-*")), mirrored


def test_a_cluster_that_asks_nobody(tmp_path: Path, world: Path) -> None:
    nodes = TwoNodes(tmp_path)
    head = subprocess.Popen(
        [
            RAYHF.with_name("ray"), "start", "--head", "--block", "--port", str(nodes.port), *nodes.head, *SMALL,
            "--dashboard-port", str(nodes.url_port), "--dashboard-agent-listen-port", str(free_port()),
        ],
        env=nodes.environment | {"RAY_AUTH_MODE": "disabled"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    nodes._processes.append(head)
    try:
        user = Session(nodes, world)
        run, address = f"run.dir={tmp_path}/run", f"127.0.0.1:{nodes.port}"

        def answers() -> bool:
            try:
                return urllib.request.urlopen(nodes.url + "/api/version", timeout=5).status == 200
            except OSError:
                return False

        wait_for("the head does not answer", answers)
        started = time.monotonic()
        assert "asks nobody for a token" in user.run(
            RAYHF, "submit", "one.yaml", run, "--address", nodes.url, code=6
        )
        assert time.monotonic() - started < 30
        joined = user.run(
            RAYHF,
            "run",
            "one.yaml",
            run,
            f"cluster.address={address}",
            code=6,
            RAY_AUTH_TOKEN="some" * 8,
        )
        assert "asks nobody for a token" in joined
        assert not (tmp_path / "run/metrics.jsonl").exists()
    finally:
        nodes.close()
