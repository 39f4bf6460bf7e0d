"""The environment `openenv`: a server of OpenEnv (Meta), over its WebSocket protocol.

In: the policy's message, as a field of the action. Out: a field of the observation, as a user's
message, with the server's reward. Each episode has a session of its own at the server. An
environment whose actions or observations are more than a text is a subclass with methods of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rayhf.config.environments import EnvironmentConfig
from rayhf.episodes import StepResult
from rayhf.types import Message


class OpenEnvConfig(EnvironmentConfig):
    """Which server, and what the policy writes to and reads from it."""

    type: str = "openenv"
    network: Literal[True] = True
    """The environment is a service."""
    url: str
    """The server's address, for example http://localhost:8000. It must allow as many sessions at a
    time (max_concurrent_envs) as there are episodes."""
    action: str = "message"
    """Field of an action that the policy's message goes into."""
    observation: str = "message"
    """Field of an observation that the policy reads."""
    reset: tuple[str, ...] = ()
    """Columns of a prompt's row that are arguments of the environment's reset, besides the seed."""


class OpenEnv:
    """An environment at a server of OpenEnv."""

    Config = OpenEnvConfig

    def __init__(self, config: OpenEnvConfig) -> None:
        from openenv.core.generic_client import GenericEnvClient

        self._config = config
        self._client = GenericEnvClient(config.url, message_timeout_s=config.timeout_s)
        self._rewarded = False

    @classmethod
    def prepare(cls, config: OpenEnvConfig) -> None:
        """Import the package. Raises ImportError."""
        import openenv.core.generic_client  # noqa: F401

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> Sequence[Message] | None:
        """Start a session; return the prompt, followed by what the environment shows first."""
        await self._client.connect()
        arguments = {name: row[name] for name in self._config.reset}
        result = await self._client.reset(seed=seed % (1 << 31), **arguments)
        shown = self.read(result.observation)
        if not shown:
            return None
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        *before, last = prompt
        if last["role"] != "user":
            return [*prompt, {"role": "user", "content": shown}]
        return [*before, {**last, "content": f"{last['content']}\n\n{shown}"}]

    async def step(self, message: Message) -> StepResult:
        """Send the policy's message as an action."""
        result = await self._client.step(self.write(str(message["content"])))
        self._rewarded |= result.reward is not None
        if result.done and not self._rewarded:
            raise ValueError("the server gave no reward in the whole episode")
        return StepResult(
            messages=self.read(result.observation),
            reward=float(result.reward or 0.0),
            done=result.done,
        )

    async def close(self) -> None:
        """End the session."""
        await self._client.close()

    def write(self, text: str) -> dict[str, Any]:
        """Return the action of a message."""
        return {self._config.action: text}

    def read(self, observation: Mapping[str, Any]) -> str:
        """Return what the policy reads of an observation. Raises KeyError for a missing field."""
        value = observation[self._config.observation]
        return value if isinstance(value, str) else str(value)
