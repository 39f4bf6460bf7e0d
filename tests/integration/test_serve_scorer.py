"""`rayhf serve-scorer` as a process: prints its address, serves campaigns, stops on a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from rayhf.scorer.build import build_scorer, check_entries
from rayhf.scorer.grpc.client import GrpcScorerConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Completion, Prompt, Scored, ScoreRequest, float_array, token_array

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs/tiny/serve_scorer_arithmetic.yaml"


def launch(*words, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "serve-scorer", *map(str, words)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ask(text, answer="7"):
    prompt = Prompt(
        prompt_id="p",
        messages=({"role": "user", "content": "3 + 4 ="},),
        token_ids=(1,),
        reference_answer=answer,
    )
    completion = Completion(
        prompt_id="p",
        index=0,
        seed=0,
        text=text,
        token_ids=token_array((1,)),
        logprobs=float_array((0.0,)),
        finish_reason="stop",
        policy_version=0,
    )
    return ScoreRequest(prompt=prompt, completions=(completion,))


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; one that ended is a zombie until process 1 has reaped it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_served_preset_scores_until_a_signal(tmp_path, number):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    server = launch(PRESET, "service.port=0", f"service.token_file={token}")
    try:
        line = server.stdout.readline()
        address = re.fullmatch(r"serving correct at (127\.0\.0\.1:\d+)\n", line)
        assert address, line + server.stderr.read()
        entry = GrpcScorerConfig(
            endpoints=(address[1],), security={"token_file": token}, name="sum"
        )
        check_entries([entry], ROOT)
        engine = build_scorer([entry], ScorerSetup(base=ROOT))
        [[right], [wrong]] = engine.score([ask("3+4=7\nAnswer: 7"), ask("3+4=8\nAnswer: 8")])
        assert (
            right == Scored(value=1.0, parts={"sum": 1.0, "sum/correct": 1.0})
            and wrong.value == 0.0
        )
        engine.close()
        rules = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(number)
        assert server.wait(timeout=20) == 0
        assert rules and not any(map(is_alive, rules))
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("scorer", "service", "message"),
    [
        (
            {"train": [{"type": "rule", "function": "rayhf.scorer.rules:exact", "name": "x"}]},
            {},
            "did you mean exact_match?",
        ),
        (
            {"train": [{"type": "rule", "function": "a:b", "normalize": True}]},
            {},
            "a server keeps no campaign's statistics",
        ),
        (
            {"train": [{"type": "rule", "function": "a:b"}]},
            {"host": "0.0.0.0"},
            "set tls, or host: 127.0.0.1",
        ),
    ],
)
def test_unservable_config_is_refused_in_one_line(tmp_path, scorer, service, message):
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"scorer": scorer, "service": service}))
    server = launch("serve.yaml", cwd=tmp_path)
    out, error = server.communicate(timeout=60)
    assert server.returncode == 2 and out == "" and message in error and error.count("\n") == 1
