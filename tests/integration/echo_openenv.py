"""A server of OpenEnv: `python echo_openenv.py PORT`."""

import sys

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    text: str


class Heard(Observation):
    shown: str


class Echo(Environment):
    """Three turns; a turn is worth its length."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._word = ""
        self._turns = 0

    def reset(self, seed=None, episode_id=None, word="", **kwargs):
        self._word = word
        self._turns = 0
        return Heard(shown=f"{word} {seed}")

    def step(self, action, timeout_s=None, **kwargs):
        self._turns += 1
        if action.text == "fail":
            raise ValueError("no such move")
        reward = None if self._word == "mute" else float(len(action.text))
        return Heard(shown=f"{self._word}: {action.text}", reward=reward, done=self._turns == 3)

    @property
    def state(self):
        return State(step_count=self._turns)


if __name__ == "__main__":
    app = create_fastapi_app(Echo, Say, Heard, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
