"""Environments of OpenEnv, with the real package where it is installed."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from play_episodes import play
from waiting import wait_until

from rayhf.environments.openenv import OpenEnvConfig
from rayhf.episodes import StepResult
from rayhf.types import Invalid

HERE = Path(__file__).parent


needs_openenv = pytest.mark.skipif(
    find_spec("openenv") is None, reason="openenv is not installed: pip install openenv"
)


# ----------------------------------------------------------------------------------------- openenv


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, HERE / "echo_openenv.py", str(port)])

    def listens() -> bool:
        assert process.poll() is None, "the server exited"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def echo(url: str, **settings: object) -> OpenEnvConfig:
    own = {"action": "text", "observation": "shown", "reset": ["word"], **settings}
    return OpenEnvConfig(url=url, **own)  # type: ignore[arg-type]


@needs_openenv
def test_episodes_have_sessions_of_their_own_at_an_openenv_server(server: str) -> None:
    row: dict[str, object] = {"prompt": "Speak.", "word": "heard"}
    first, second, failing = play(echo(server), row, ["a", "bc", "def"], ["x"], ["fail"])
    for answers in (first, second, failing):
        begin = {"role": "user", "content": "Speak.\n\nheard 5"}
        assert answers[0] == StepResult(messages=(begin,), metrics={})
    assert [a.reward for a in first[1:]] == [1.0, 2.0, 3.0]
    assert [a.done for a in first[1:]] == [False, False, True]
    assert first[2].messages[0] == {"role": "user", "content": "heard: bc"}
    assert second[1].reward == 1.0 and not second[1].done
    assert isinstance(failing[1], Invalid) and "no such move" in failing[1].reason


@needs_openenv
def test_more_episodes_than_sessions_go_on_when_earlier_ones_have_ended(server: str) -> None:
    row: dict[str, object] = {"prompt": "Speak.", "word": "w"}
    for _ in range(3):  # the server allows 8 sessions at a time
        episodes = play(echo(server), row, *([["a"]] * 6))
        assert all(isinstance(answers[1], StepResult) for answers in episodes)


@needs_openenv
def test_openenv_without_rewards_or_fields_is_no_score(server: str) -> None:
    row: dict[str, object] = {"prompt": "Speak.", "word": "mute"}
    ((_, *mute),) = play(echo(server), row, ["a", "b", "c"])
    assert isinstance(mute[2], Invalid) and "no reward in the whole episode" in mute[2].reason
    ((start,),) = play(echo(server, observation="text"), row, [])
    assert isinstance(start, Invalid) and "KeyError" in start.reason
