"""A hostile rule in its real process: its limits, what it sees, and what it leaves behind."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from score_requests import make_rule, request
from waiting import HOLD, is_held, wait_until

from rayhf.scorer import rule_process
from rayhf.scorer.rule import Rule
from rayhf.types import Failed, Outcome, Scored

RULES = (
    HOLD
    + """
import resource, socket, sys, time
from pathlib import Path

def memory(completion, **context):
    return len(bytearray(8 << 30))

def disk(completion, **context):
    with open("big", "wb") as file:
        while file.tell() < 10 << 30:
            file.write(bytes(1 << 20))
            file.flush()
    return 1.0

def processes(completion, **context):
    hold()
    for number in range(12):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
            if number % 3 == 0 and os.fork():
                os._exit(0)
            time.sleep(600)
            os._exit(0)
    time.sleep(600)

def environment(completion, **context):
    return sum("canary" in value for value in os.environ.values())

def neighbors(completion, **context):
    read = 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            read += completion.encode() in environ.read_bytes()
        except OSError:
            pass
    return read

def dial(completion, **context):
    socket.create_connection(("127.0.0.1", int(completion)), timeout=5).close()
    return 1.0

def cpu(completion, **context):
    return resource.getrlimit(resource.RLIMIT_CPU)[0] - time.process_time()

def counted(completion, **context):
    return resource.getrlimit(resource.RLIMIT_NPROC)[0]

def noisy(completion, **context):
    for _ in range(4):
        os.write(1, b"x" * (1 << 20))
        os.write(2, b"y" * (1 << 20))
    return 1.0

def endless(completion, **context):
    while True:
        os.write(int(sys.argv[2]), b"x" * 65536)  # the pipe for answers
"""
)

Ask = Callable[..., Outcome]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Return the outcome of one text under a function of RULES."""
    (tmp_path / "limits.py").write_text(RULES)
    started: list[Rule] = []

    def ask(function: str, text: str = "", **settings: object) -> Outcome:
        started.append(make_rule(f"limits:{function}", tmp_path, **{"timeout_s": 5.0, **settings}))
        [(outcome,)] = started[-1].score([request(text)])
        return outcome

    yield ask
    for rule in started:
        rule.close()


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("apart")
    (base / "limits.py").write_text(RULES)
    rule = make_rule("limits:counted", base)
    allowed = rule.pool.apart
    rule.close()
    if not allowed:
        pytest.skip("this kernel or container allows no user namespaces")


def test_memory(ask: Ask) -> None:
    outcome = ask("memory")
    assert isinstance(outcome, Failed) and outcome.reason.startswith("MemoryError (limits.py:")


def test_disk(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_process, "FILE_BYTES", 32 << 20)
    outcome = ask("disk")
    assert isinstance(outcome, Failed) and "File too large" in outcome.reason
    assert (tmp_path / "big").stat().st_size <= 32 << 20


def test_output_is_capped_and_dropped(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a log would grow to the limit on files, and every later call would fail."""
    monkeypatch.setattr(rule_process, "FILE_BYTES", 1 << 20)
    assert ask("noisy") == Scored(value=1.0)
    printed = capfd.readouterr().err
    assert 0 < len(printed) < 1 << 19
    assert printed.rstrip().endswith("[what this rule prints further is dropped]")


def test_all_processes_are_killed_even_outside_the_session(ask: Ask, tmp_path: Path) -> None:
    assert ask("processes", timeout_s=2.0) == Failed(reason="no response within 2 s")
    wait_until(lambda: not is_held(tmp_path / "held"))


def test_no_secret_of_the_environment_is_seen(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "canary")
    assert ask("environment") == Scored(value=0.0)
    monkeypatch.setenv("LANG", "canary")  # one that it does get
    assert ask("environment") == Scored(value=1.0)


@pytest.mark.usefixtures("apart")
def test_other_processes_cannot_be_read(ask: Ask) -> None:
    canary = f"canary-{os.getpid()}"
    other = subprocess.Popen(["sleep", "60"], env=os.environ | {"CANARY": canary})
    try:
        assert ask("neighbors", canary) == Scored(value=0.0)
    finally:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("apart")
def test_only_a_rule_with_network_has_one(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        outcome = ask("dial", port)
        assert isinstance(outcome, Failed) and "Network is unreachable" in outcome.reason
        assert "`network: true` in the scorer's entry" in outcome.reason
        assert ask("dial", port, network=True) == Scored(value=1.0)


@pytest.mark.usefixtures("apart")
def test_processes_are_counted(ask: Ask) -> None:
    assert ask("counted") == Scored(value=512.0)


def test_cpu_time_is_limited_by_the_time_of_a_call(ask: Ask) -> None:
    outcome = ask("cpu", timeout_s=3.0)
    assert isinstance(outcome, Scored) and 0 < outcome.value <= 2 * 3.0 * (os.cpu_count() or 1) + 2


def test_endless_response_is_truncated(ask: Ask) -> None:
    outcome = ask("endless", timeout_s=30.0)
    assert isinstance(outcome, Failed) and "something other than a response" in outcome.reason
