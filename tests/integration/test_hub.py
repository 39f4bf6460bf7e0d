"""Hub names, resolved and downloaded by the real huggingface_hub client from tests/hub.py.

huggingface_hub reads its environment at import, so every client is a process.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.hub import TOKEN, Hub, hub_server

WEIGHTS = os.urandom(3 << 20)
MODEL = {
    "config.json": '{"model_type": "llama"}',
    "tokenizer.json": "{}",
    "README.md": "a card",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same weights",
    "consolidated.safetensors": b"the same weights",
    "onnx/model.safetensors": b"the same weights",
}
PIN = """
import json, sys
from pathlib import Path
from rich.console import Console
from launch.models import pin_models
from rayhf.config.schema import PolicyConfig
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
weights, commits, *names = sys.argv[1:]
for name in names:
    try:
        config, used = pin_models(
            PolicyConfig(model=name), Path.cwd(), Console(width=200),
            weights=weights == "weights", commits=json.loads(commits),
        )
        print(config.model, local_directory(config.model, Path.cwd()))
    except ConfigError as error:
        print("refused", error)
"""


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "hub") as server:
        yield server


class Client:
    """Processes with one cache."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.env = {**os.environ, **hub.env(home), "PYTHONPATH": str(Path.cwd())}
        for name in ("HF_TOKEN", "HF_HUB_CACHE"):
            self.env.pop(name, None)

    def start(self, *arguments: str, code: str = PIN, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        self.home.mkdir(exist_ok=True)
        return subprocess.Popen(
            command,
            env=self.env | env,
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def lines(
        self,
        *names: str,
        weights: bool = True,
        commits: Mapping[str, str] | None = None,
        **env: str,
    ) -> list[str]:
        """Pin and download names; return the output."""
        arguments = ("weights" if weights else "check", json.dumps(commits or {}), *names)
        process = self.start(*arguments, **env)
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        return out.splitlines()

    def pin(self, name: str, **options: Any) -> Path:
        """Pin and download a name; return its directory."""
        *self.shown, last = self.lines(name, **options)
        self.pinned, directory = last.split()
        return Path(directory)

    def refusals(self, *names: str, **env: str) -> list[str]:
        """Return the one line of each ConfigError."""
        lines = [line for line in self.lines(*names, **env) if line.startswith("refused model: ")]
        assert len(lines) == len(names)
        return lines


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path / "home")


def test_hub_name_is_pinned_downloaded_once_and_found_without_the_hub(hub, client):
    commit = hub.add("model", "org/tiny", MODEL)
    directory = client.pin("org/tiny")
    assert client.shown == [
        f"model: org/tiny is commit {commit[:12]} (3.0 MiB, 3.0 MiB to download)",
        "org/tiny: downloaded 3.0 MiB",
    ]
    assert client.pinned == f"org/tiny@{commit}"
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    # The branch moves; the recorded commit stays, and needs no request.
    moved = hub.add("model", "org/tiny", MODEL | {"config.json": '{"model_type": "qwen2"}'})
    hub.requests.clear()
    assert client.pin("org/tiny", commits={"org/tiny": commit}) == directory
    assert not hub.requests
    assert client.pin("org/tiny").name == moved
    # The hub is gone: the cache answers, online and offline, also for a branch.
    assert client.pin("org/tiny", HF_ENDPOINT="http://127.0.0.1:9").name == moved
    offline = client.lines(f"org/tiny@{commit}", "org/tiny", HF_HUB_OFFLINE="1")
    assert [line.split("/")[-1] for line in offline if "@" in line.split()[0]] == [commit, moved]


def test_revision_is_a_branch_and_check_downloads_no_weights(hub, client):
    hub.add("model", "org/tiny", MODEL)
    other = MODEL | {"config.json": '{"model_type": "x"}'}
    branch = hub.add("model", "org/tiny", other, revision="v1")
    directory = client.pin("org/tiny@v1", weights=False)
    assert directory.name == branch
    assert (directory / "config.json").is_file()
    assert not list(directory.glob("*.safetensors"))
    assert hub.sent["model.safetensors"] == 0
    assert "3.0 MiB, 0.0 MiB to download" in client.shown[0]
    # The weights are still to come.
    assert (client.pin("org/tiny@v1") / "model.safetensors").is_file()


def test_directory_of_that_name_is_taken(hub, client):
    hub.add("model", "org/tiny", MODEL)
    (client.home / "org" / "tiny").mkdir(parents=True)
    assert client.pin("org/tiny") == client.home / "org" / "tiny"
    assert not hub.requests


def test_refusals_are_one_line_each(hub, client):
    hub.add("model", "org/tiny", MODEL)
    hub.add("model", "org/pickled", {"config.json": "{}", "pytorch_model.bin": b"weights"})
    hub.add("model", "org/adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b""})
    hub.add("model", "org/gated", MODEL)
    hub.gate("org/gated", TOKEN)
    hub.add("model", "org/huge", MODEL | {"vocab.json": "{}"})
    hub.sizes["vocab.json"] = 10**18
    missing, revision, gated, pickled, adapter, huge = client.refusals(
        "org/nope", "org/tiny@v2", "org/gated", "org/pickled", "org/adapter", "org/huge"
    )
    assert "neither a directory org/nope nor a model org/nope on http" in missing
    assert "no revision v2; valid: main" in revision
    assert "gated, and no token is set; request access" in gated
    assert "has no *.safetensors weights" in pickled
    assert "is a PEFT adapter" in adapter
    assert re.search(r"org/huge needs 931,322,574\.\d GiB more", huge)
    assert "has no access; request" in client.refusals("org/gated", HF_TOKEN="hf_reader")[0]
    assert "refused the token" in client.refusals("org/tiny", HF_TOKEN="hf_unknown")[0]
    assert "HF_HUB_OFFLINE is set" in client.refusals("org/tiny", HF_HUB_OFFLINE="1")[0]
    unreachable = client.refusals("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")[0]
    assert "and http://127.0.0.1:9 cannot be reached" in unreachable
    assert "expected a model directory" in unreachable and "continues" not in unreachable
    assert client.pin("org/gated", HF_TOKEN=TOKEN).is_dir()


def test_killed_download_keeps_the_files_that_were_complete(hub, client):
    first = "model-00001-of-00002.safetensors"
    last = "model-00002-of-00002.safetensors"
    commit = hub.add("model", "org/tiny", MODEL | {first: WEIGHTS[1:], last: WEIGHTS[::-1]})
    release = hub.stall(last, after=1 << 20)
    process = client.start("weights", "{}", "org/tiny")
    done = client.home / "hub" / "models--org--tiny" / "snapshots" / commit / first
    while not (done.exists() and hub.sent[last]) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    release.set()
    assert "not complete in" in client.refusals(f"org/tiny@{commit}", HF_HUB_OFFLINE="1")[0]
    directory = client.pin("org/tiny")
    assert (directory / last).read_bytes() == WEIGHTS[::-1]
    assert hub.sent[first] == len(WEIGHTS[1:])


def test_connection_that_breaks_off_is_retried(hub, client):
    hub.add("model", "org/tiny", MODEL)
    hub.break_off("model.safetensors", after=1 << 20)
    assert (client.pin("org/tiny") / "model.safetensors").read_bytes() == WEIGHTS


def test_actor_downloads_the_pinned_commit_although_it_is_offline(hub, client):
    commit = hub.add("model", "org/tiny", MODEL)
    hub.add("model", "org/tiny", MODEL | {"config.json": '{"model_type": "moved"}'})
    code = """
import sys
from rayhf.config.models import ModelName
from rayhf.models.hub import local_directory, obtain
name = ModelName(sys.argv[1])
obtain((name,))
print(sorted(path.name for path in local_directory(name).iterdir()))
"""
    actor = client.start(f"org/tiny@{commit}", code=code, HF_HUB_OFFLINE="1")
    out, error = actor.communicate(timeout=60)
    assert out == "['config.json', 'model.safetensors', 'tokenizer.json']\n", error
    lost = client.start(
        f"org/tiny@{'0' * 40}", code=code, HF_HUB_OFFLINE="1", RAYHF_HUB_OFFLINE="1"
    )
    out, error = lost.communicate(timeout=60)
    assert "HF_HUB_OFFLINE is set" in error
    assert "(on node " in error


def test_server_serves_data_sets_to_the_datasets_library(hub, client):
    config = "{config_name: main, data_files: [{split: test, path: main/*.jsonl}]}"
    card = f"---\nconfigs: [{config}]\n---\n"
    rows = '{"question": "2 + 2?", "answer": "4"}\n'
    commit = hub.add("dataset", "org/data", {"README.md": card, "main/test.jsonl": rows})
    hub.add("dataset", "org/data", {"README.md": card, "main/test.jsonl": rows.replace("4", "5")})
    code = """
import sys
from datasets import load_dataset
for revision in sys.argv[1:]:
    print(load_dataset("org/data", "main", split="test", revision=revision)[0])
"""
    out, error = client.start(commit, "main", code=code).communicate(timeout=100)
    old, new = out.splitlines()
    assert old == "{'question': '2 + 2?', 'answer': '4'}", error
    assert new == "{'question': '2 + 2?', 'answer': '5'}"
