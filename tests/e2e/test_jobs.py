"""Jobs on a token-protected Ray cluster of two nodes, started by launch/templates/ray_start.sh.

A campaign is submitted, followed, refused, stopped, submitted again and resumed. No file or output
may contain one of the secrets afterwards.
"""

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
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from campaign_runs import RAYHF
from waiting import wait_until
from world import make_world, write_config

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/templates/ray_start.sh"
SECRETS = {
    "WANDB_API_KEY": "0123456789canary" * 2 + "wandb000",
    "HF_TOKEN": "hf_canaryCanaryCanaryCanary",
}
SMALL_NODE = (
    "--object-store-memory=100000000",
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--num-cpus=1",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class TwoNodes:
    """A head and a worker node on this machine."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        """A short path: those of Ray's sockets may have at most 107 characters."""
        self.port = free_port()
        self.url_port = free_port()
        self.url = f"http://127.0.0.1:{self.url_port}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY")} | {
            "SHARED": str(shared),
            "RAY_PORT": str(self.port),
            "RAY_DASHBOARD_PORT": str(self.url_port),
            "PATH": f"{RAYHF.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.head = (f"--temp-dir={self.temporary}", f"--ray-client-server-port={free_port()}")
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, log: str, **environment: str) -> None:
        """Start a node with `command` and the options of a small one."""
        own = [f"--dashboard-agent-listen-port={free_port()}", *SMALL_NODE]
        with (self.shared / log).open("wb") as output:
            process = subprocess.Popen(
                [*command, *own],
                env=self.environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

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
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def responds(self) -> bool:
        try:
            return urllib.request.urlopen(self.url + "/api/version", timeout=5).status == 200
        except OSError:
            return False

    def close(self) -> None:
        processes = [each for process in self._processes for each in _process_tree(process.pid)]
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(processes, timeout=20)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _process_tree(pid: int) -> list[psutil.Process]:
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


PARTS = """
import rayhf


class SquaredConfig(rayhf.PairLossConfig):
    type: str = "my_parts:Squared"


class Squared(rayhf.PairLoss[SquaredConfig]):
    Config = SquaredConfig

    def per_pair(self, pairs):
        return (self.config.beta * pairs.gap_P - 1.0) ** 2


class LengthConfig(rayhf.PointwiseEntryConfig):
    type: str = "my_parts:Length"


class Length(rayhf.PointwiseScorer[LengthConfig]):
    Config = LengthConfig

    def score(self, requests):
        return [
            tuple(rayhf.Scored(value=float(len(c.token_ids))) for c in request.completions)
            for request in requests
        ]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path_factory.mktemp("s"))
    try:
        learns = ["--resources", json.dumps({"learns": 1})]
        nodes.start(SCRIPT, "head", *nodes.head, *learns, log="head.out", **SECRETS)
        wait_until(lambda: nodes.nodes() == 1, 120, "the head does not respond")
        writes = ["--resources", json.dumps({"writes": 1})]
        nodes.start(SCRIPT, "worker", "127.0.0.1", *writes, log="worker.out", **SECRETS)
        wait_until(lambda: nodes.nodes() == 2, 120, "the worker does not join")
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    (world / "my_parts.py").write_text(PARTS)
    pools = {"resources": {"rollout": {"writes": 1}, "learner": {"learns": 1}}}
    write_config(
        world,
        "one",
        # Classes of the directory that is sent: the actors on both nodes import them.
        algorithm={"type": "online_dpo", "samples": 4, "loss": "my_parts:Squared"},
        scorer={
            "train": [
                {"type": "rule", "function": "my_rules:even"},
                {"type": "my_parts:Length", "weight": 0.01},
            ]
        },
        trackers=[{"type": "wandb", "mode": "offline"}],
        run={"iterations": 500, "checkpoint_every": 2},
        cluster=pools,
    )
    return world


class Session:
    """A user's shell in `world`; collects all output."""

    def __init__(self, cluster: TwoNodes, world: Path) -> None:
        self.world = world
        self.output = ""
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
        output, _ = process.communicate(timeout=seconds)
        self.output += output
        assert process.returncode == code, output
        return output

    def read_until(self, process: subprocess.Popen[str], text: str) -> None:
        """Read output up to a line that contains `text`."""
        assert process.stdout is not None
        for line in process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"the process ended without {text!r}")

    def run(self, *command: Any, code: int = 0, **environment: str) -> str:
        return self.finish(self.start(*command, **environment), code)


class Control:
    """TLS files and a token for a campaign's control service."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        ca = trustme.CA()
        self.token = "canary" * 6
        certificate = ca.issue_cert("localhost")
        ca.cert_pem.write_to_path(folder / "ca.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        (folder / "token").write_text(self.token)
        for name in ("key.pem", "token"):
            (folder / name).chmod(0o600)
        token = {"token_file": str(folder / "token")}
        ca_file = {"ca": str(folder / "ca.pem")}
        (folder / "security.yaml").write_text(json.dumps({**ca_file, **token}))
        (folder / "no-token.yaml").write_text(json.dumps(ca_file))
        port = free_port()
        tls = {"certificate": str(folder / "certificate.pem"), "key": str(folder / "key.pem")}
        self.service = "service=" + json.dumps({"port": port, "tls": tls, **token})
        address = ("--address", f"localhost:{port}")
        self.options = (*address, "--security", folder / "security.yaml")
        self.options_without_token = (*address, "--security", folder / "no-token.yaml")


def operate(user: Session, control: Control, world: Path, metrics: Path) -> None:
    """Over gRPC: status, pause, label a pair, add a prompt, unpause."""
    assert "RUNNING" in user.run(RAYHF, "status", *control.options)
    assert "unauthenticated" in user.run(RAYHF, "pause", *control.options_without_token, code=13)
    assert "pauses once iteration" in user.run(RAYHF, "pause", *control.options)
    wait_until(lambda: "PAUSED" in user.run(RAYHF, "status", *control.options), 120)
    pair = json.loads(user.run(RAYHF, "pairs", "--count", "1", *control.options))
    (world / "verdicts.jsonl").write_text(
        json.dumps({"pair_id": pair["pair_id"], "verdict": "second"}) + "\n"
    )
    (world / "prompts.jsonl").write_text('{"prompt": "a new one"}\n')
    assert "1 labels submitted" in user.run(
        RAYHF, "label", "--file", "verdicts.jsonl", *control.options
    )
    assert "1 prompts submitted" in user.run(
        RAYHF, "add-prompts", "prompts.jsonl", *control.options
    )
    assert "resumes" in user.run(RAYHF, "unpause", *control.options)
    wait_until(lambda: '"pairs/human": 1.0' in metrics.read_text(), 120)


def test_campaign_as_a_job(cluster: TwoNodes, world: Path) -> None:
    user = Session(cluster, world)
    run = cluster.shared / "runs/one"
    submit = [RAYHF, "submit", "one.yaml", f"run.dir={run}", "--address", cluster.url]
    mode = [
        stat.S_IMODE((cluster.shared / name).stat().st_mode) for name in (".rayhf", ".rayhf/token")
    ]
    assert mode == [0o700, 0o600]

    # Refused: no token, another token, a token that other users may read.
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
    wait_until(
        lambda: (
            followed.poll() is not None
            or (metrics.exists() and metrics.read_text().count("\n") > 3)
        ),
        300,
    )
    assert followed.poll() is None, followed.communicate()
    actors = cluster.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    alive = [a for a in actors if a["state"] == "ALIVE" and a["class_name"].endswith("Actor")]
    assert len({actor["node_id"] for actor in alive}) == 2, actors
    assert "/runs/one is job rayhf-one-" in user.run(*submit, code=4)
    operate(user, control, world, metrics)
    assert "stops once iteration" in user.run(RAYHF, "stop", *control.options)
    shown = user.finish(followed, 75)
    assert "working directory: " in shown and "ray job submit --address" in shown
    assert "iteration   1/500" in shown
    assert "rayhf: " in shown and "stopped after iteration" in shown
    assert "STOPPED" in user.run(RAYHF, "status", run)

    committed = json.loads((run / "campaign.json").read_text())["iteration"]
    more = (f"run.iterations={committed + 2}", "--entrypoint-cpus", "0.1")
    again = user.run(SCRIPT, "submit", "one.yaml", "one", *more)
    assert f"continue: after iteration {committed}" in again
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
    follower = user.start(*submit, *two, "--follow")
    user.read_until(follower, "processes ready, waiting for")
    follower.send_signal(signal.SIGINT)
    shown = user.finish(follower, 130)
    assert "the job continues. `rayhf stop " in shown
    user.run("bash", "-c", re.search(r"`(RAY_AUTH_MODE=token ray job stop [^`]*)`", shown)[1])
    jobs = cluster.get("/api/jobs/")
    statuses = sorted(job["status"] for job in jobs)
    assert statuses == ["FAILED", "FAILED", "STOPPED", "SUCCEEDED", "SUCCEEDED"]

    assert len(list(cluster.temporary.glob("session_2*/logs/**/*.log"))) > 10
    secrets = {
        **SECRETS,
        "token": (cluster.shared / ".rayhf/token").read_text(),
        "control": control.token,
    }
    for name, secret in secrets.items():
        assert secret not in user.output, name
        assert secret not in json.dumps(jobs), name
        grep = ["grep", "-rlaF", secret, cluster.shared, cluster.temporary, world]
        files = subprocess.run(grep, capture_output=True, text=True).stdout.splitlines()
        own = (".rayhf/token", ".rayhf/control/token")
        assert [file for file in files if not file.endswith(own)] == [], name
    logs = [file.read_text() for file in (run / "logs").glob("attempt-*/wandb.log")]
    assert list((run / "wandb").glob("offline-run-*")), logs


def test_cluster_without_token_authentication(tmp_path: Path, world: Path) -> None:
    nodes = TwoNodes(tmp_path)
    options = (f"--port={nodes.port}", *nodes.head, f"--dashboard-port={nodes.url_port}")
    ray = RAYHF.with_name("ray")
    command = (ray, "start", "--head", "--block", *options)
    nodes.start(*command, log="head.out", RAY_AUTH_MODE="disabled")
    try:
        log = tmp_path / "head.out"
        wait_until(lambda: "--block" in log.read_text(), 120, "the head does not start")
        wait_until(nodes.responds, 120, "the head does not respond")
        user = Session(nodes, world)
        run = f"run.dir={tmp_path}/run"
        submit = (RAYHF, "submit", "one.yaml", run, "--address", nodes.url)
        assert "has no token authentication" in user.run(*submit, code=6)
        join = (RAYHF, "run", "one.yaml", run, f"cluster.address=127.0.0.1:{nodes.port}")
        assert "has no token authentication" in user.run(*join, code=6, RAY_AUTH_TOKEN="some" * 8)
        assert not (tmp_path / "run/metrics.jsonl").exists()
    finally:
        nodes.close()
