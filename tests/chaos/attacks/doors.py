"""Attacks through what is handed in: the service, inbox, labels, prompts, templates, secrets."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from launch.cluster_auth import check_token_file
from launch.local import _session_directory
from launch.secret_files import secrets_in, variable_problem
from rayhf.config.service import NO_SECURITY, ServiceConfig
from rayhf.config.yaml_text import parse_yaml
from rayhf.control.commands import FileControl
from rayhf.control.grpc_client import GrpcControl
from rayhf.control.grpc_server import serve_campaign
from rayhf.data.chat import Chat
from rayhf.data.jinja_sandbox import TemplateFailedError, evaluate
from rayhf.data.prompts import parse_prompt
from rayhf.errors import ConfigError, SecurityError, UnreachableError
from rayhf.run_dir.inbox import Inbox, RowFile
from rayhf.run_dir.store import RunDir
from tests.chaos.attacks.attack import Attack, Result

sys.path.insert(0, str(Path(__file__).parents[2] / "unit"))
from campaigns import make_config, metrics_of, run_campaign
from chat_tokenizer import make_tokenizer

_FLOOD_S = 5.0
_STREAMS = 64


@contextmanager
def _served(folder: Path) -> Any:
    """Yield the run directory of a campaign that waits, and a client of its control service."""
    store = RunDir(make_config(folder))
    store.set_state("running")
    server = serve_campaign(store.path, ServiceConfig(grace_s=0.1), base=folder)
    try:
        yield store.path, GrpcControl(server.address, NO_SECURITY, base=folder), server.address
    finally:
        server.stop()
        store.close()


def repeated_labels(folder: Path, seed: int) -> Result:
    config = make_config(folder, run={"iterations": 2})
    run_campaign(config)
    control = FileControl(config.run.dir)
    pair = control.uncertain_pairs(1)[0].pair_id
    for verdict in ("first", "first", "second", "second"):
        control.label([{"pair_id": pair, "verdict": verdict}], source="ann")
    said = control.label([{"pair_id": pair, "verdict": "first"}], source="bob")
    for _ in range(3):
        control.add_prompts([{"prompt": "again"}], source="ann")
    labels = len(RowFile(config.run.dir, "labels").read()[0])
    prompts = len(RowFile(config.run.dir, "prompts").read()[0])
    held = (labels == 3) + (prompts == 1) + ("contradict" in said)
    return 3, held, f"5 label calls wrote {labels} rows, 3 prompt calls {prompts}"


def label_of_a_damaged_checkpoint(folder: Path, seed: int) -> Result:
    config = make_config(folder, run={"iterations": 4, "checkpoint_every": 1})
    run_campaign(config)
    pair = FileControl(config.run.dir).uncertain_pairs(1)[0].pair_id
    FileControl(config.run.dir).label([{"pair_id": pair, "verdict": "first"}], source="ann")
    newest = config.run.dir / "checkpoints/iteration-000004"
    next(file for file in newest.rglob("*") if file.is_file()).write_bytes(b"x")
    run_campaign(make_config(folder, run={"iterations": 5, "checkpoint_every": 1}))
    trained = sum(line.get("pairs/human", 0) for line in metrics_of(config))
    return 1, int(trained == 1), f"resumed; the label was trained on {trained:g} times"


_ROWS = (
    '{"id": "a", "source": "s", "prompt": "p", "answer": Infinity}',
    '{"id": "b", "source": "s", "prompt": "p", "answer": NaN}',
    '{"id": "c", "source": "s", "prompt": "p", "answer": 1e999}',
    '{"id": "d", "source": "s", "prompt": "\\ud800"}',
    '{"id": [1], "source": "s", "prompt": "p"}',
    '{"id": "e", "prompt": "p"}',
    '{"id": "f", "source": "s"}',
    "[" * 100_000,
    '{"id": "tor',
)


def rows_by_hand(folder: Path, seed: int) -> Result:
    (folder / "inbox").mkdir()
    good = json.dumps({"id": "good", "source": "s", "prompt": "p"})
    (folder / "inbox/prompts.jsonl").write_text("\n".join([*_ROWS, good]) + "\n")
    warnings: list[str] = []
    rows = Inbox(folder).take("prompts", 1, warn=warnings.append)
    held = sum(f"row {number}:" in "".join(warnings) for number in range(1, len(_ROWS) + 1))
    held = held if [row["id"] for row in rows] == ["good"] else 0
    return len(_ROWS), held, f"{len(warnings)} rows skipped by name"


def flood(folder: Path, seed: int) -> Result:
    with _served(folder) as (run, client, _):
        started = time.monotonic()
        calls = 0
        refused = 0
        while time.monotonic() - started < _FLOOD_S:
            calls += 1
            try:
                client.add_prompts([{"prompt": f"{calls}" + "x" * 900_000}], source="flood")
            except UnreachableError as error:
                refused += "resource_exhausted" in str(error)
        size = (run / "inbox/prompts.jsonl").stat().st_size / 2**20
        held = int(refused > 0 and size < 20)
    return 1, held, f"{size:.1f} MiB accepted in {_FLOOD_S:g} s, {refused} of {calls} calls refused"


def long_prompt(folder: Path, seed: int) -> Result:
    chat = Chat(make_tokenizer(), max_length=4096)
    row = {"place": "inbox/prompts.jsonl row 1", "source": "s", "prompt": "word " * 200_000}
    started = time.monotonic()
    try:
        parse_prompt(row, chat, max_prompt_tokens=2048)
        held = 0
    except ConfigError:
        held = 1
    return 1, held, f"1 MB refused after {time.monotonic() - started:.4f} s"


def streams(folder: Path, seed: int) -> Result:
    with _served(folder) as (_, client, address):
        channel = grpc.insecure_channel(address)
        watch: Any = channel.unary_stream("/rayhf.v1.Campaign/Watch")
        opened = [watch(b"") for _ in range(_STREAMS)]
        time.sleep(1.0)
        ended = sum(not stream.is_active() for stream in opened)
        started = time.monotonic()
        client._client.check_health("rayhf.v1.Campaign", timeout_s=5)
        stopped = "stops once" in client.request("stop")
        seconds = time.monotonic() - started
        channel.close()
    return (
        1,
        int(stopped),
        (f"{_STREAMS} streams, {ended} refused; health and stop served in {seconds:.3f} s"),
    )


_TEMPLATES = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "3 GB": "{% for i in range(99999) %}{{ 'x' | center(30000) }}{% endfor %}",
    "10 GB": "{{ 'x' | center(10000000000) }}",
    "doubling": "{% set n = namespace(t='xx') %}{% for i in range(99) %}"
    "{% set n.t = n.t ~ n.t %}{% endfor %}",
    "brackets": "{{ " + "(" * 50_000 + " }}",
    "1 + 'a'": "{{ 1 + 'a' }}",
}


def templates(folder: Path, seed: int) -> Result:
    held = 0
    slowest = 0.0
    for source in _TEMPLATES.values():
        started = time.monotonic()
        try:
            (result,) = evaluate("chat", source, [{}])
        except TemplateFailedError as error:
            result = error
        held += isinstance(result, TemplateFailedError)
        slowest = max(slowest, time.monotonic() - started)
    return (
        len(_TEMPLATES),
        held,
        f"{', '.join(_TEMPLATES)}; the slowest ended after {slowest:.1f} s",
    )


def yaml_bombs(folder: Path, seed: int) -> Result:
    many = ",".join(["*a{0}"] * 9)
    aliases = "".join(f"a{i}: &a{i} [{many.format(i - 1)}]\n" for i in range(1, 9))
    merges = "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    texts = [f"a0: &a0 [1,2,3,4,5,6,7,8,9]\n{aliases}", f"a0: &a0 {{k: 1}}\n{merges}"]
    texts += ["[" * 100_000, "a" * 1_000_000]
    started = time.monotonic()
    held = sum(_refuses(ValueError, partial(parse_yaml, text)) for text in texts)
    return len(texts), held, f"refused in {time.monotonic() - started:.2f} s"


def _refuses(error: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except error as problem:
        return "\n" not in str(problem)
    return False


_FILES = {
    "token": "x", "id_rsa": "x", ".git-credentials": "x", ".huggingface/token": "x",
    ".kube/config": "x", "credentials.json": "x", "secrets.yaml": "x", ".netrc": "x", ".env": "x",
    "a.pem": "x", "notes.txt": "-----BEGIN RSA PRIVATE KEY-----", "b.py": "hf_" + "a1B2" * 9,
    "c.py": "sk-" + "a1B2" * 9, "d.py": "ghp_" + "a1B2" * 9, "e.py": "AKIA" + "Q1" * 8,
}  # fmt: skip
_VARIABLES = ("DB_PASS", "GITHUB_PAT", "JWT", "DATABASE_URL", "HF_TOKEN", "WANDB_API_KEY")


def secrets(folder: Path, seed: int) -> Result:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in _FILES.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(packed) as archive:
        left_out = len(secrets_in(archive))
    variables = sum(bool(variable_problem(name, "x")) for name in _VARIABLES)
    return (
        len(_FILES) + len(_VARIABLES),
        left_out + variables,
        (
            f"{left_out} of {len(_FILES)} files left out, {variables} of {len(_VARIABLES)} "
            "variables refused"
        ),
    )


def private_files(folder: Path, seed: int) -> Result:
    file = folder / "auth_token"
    file.write_text("x" * 32)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    tried = 1
    try:
        file.chmod(0o644)
        held = int(_refuses(SecurityError, check_token_file))
        if os.geteuid() == 0:
            tried += 1
            file.chmod(0o600)
            os.chown(file, 12345, -1)
            held += _refuses(SecurityError, check_token_file)
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]
    with _session_directory() as directory:
        mode = directory.stat().st_mode & 0o777
    return tried + 1, held + (mode == 0o700), f"Ray's session directory has mode {mode:04o}"


ATTACKS: list[Attack] = [
    Attack("labels and prompts: repeated and contradictory", "all kept, doubled", repeated_labels),
    Attack(
        "a label, then its checkpoint is damaged",
        "exit 2 at every start",
        label_of_a_damaged_checkpoint,
    ),
    Attack("inbox rows written by hand", "each crashes every start", rows_by_hand),
    Attack("inbox: flood", "286 MiB in 9 s", flood),
    Attack("prompt of 1 MB", "1.6 to 3.3 s of tokenizing", long_prompt),
    Attack("service: 64 open streams", "stop and health refused", streams),
    Attack("templates: loops, size, nesting", "no end, 3 GB", templates),
    Attack("YAML: aliases, merges, nesting, length", "18 s, 528 MiB", yaml_bombs),
    Attack("submit: files and variables with secrets", "7 files, 4 variables sent", secrets),
    Attack("token files and session directory", "0644 of another uid passes", private_files),
]
