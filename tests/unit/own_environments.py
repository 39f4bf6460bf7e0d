"""Environments and tools of a user's, for tests that run them in their process."""

import asyncio
import os
import time

import rayhf


class EchoConfig(rayhf.EnvironmentConfig):
    """What it does besides."""

    type: str = "own_environments:Echo"
    bad_reset: bool = False


class Echo:
    """Answers by the first word of a message: what a test wants to see."""

    Config = EchoConfig
    closed = 0

    def __init__(self, config):
        self.config = config
        self.turns = 0

    async def reset(self, row, *, seed):
        if self.config.bad_reset:
            raise KeyError("no such column")
        return [{"role": "user", "content": f"{row['name']} {seed}"}]

    async def step(self, message):
        self.turns += 1
        word, _, rest = message["content"].partition(" ")
        if word == "raise":
            raise ValueError(rest)
        if word == "sleep":
            await asyncio.sleep(60)
        if word == "block":
            time.sleep(60)
        if word == "exit":
            os._exit(3)
        if word == "nonsense":
            return {"message": rest}
        if word == "count":
            return rayhf.StepResult(messages=f"{Echo.closed} closed")
        if word == "infinite":
            return rayhf.StepResult(reward=float("inf"))
        return rayhf.StepResult(
            messages=f"{self.turns}: {rest}", reward=0.5, done=word == "done", metrics={"turns": 1}
        )

    async def close(self):
        Echo.closed += 1
        raise RuntimeError("what close raises ends nothing else")


class Unloadable(Echo):
    """Cannot be prepared."""

    class Config(rayhf.EnvironmentConfig):
        """Nothing."""

        type: str = "own_environments:Unloadable"

    @classmethod
    def prepare(cls, config):
        raise FileNotFoundError("no dictionary")


def add(first: int, second: int) -> int:
    """
    Add two numbers.

    Args:
        first: The first number.
        second: The second number.
    """
    return first + second


async def slow(seconds: float) -> str:
    """
    Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "waited"


def loop() -> None:
    """Never end."""
    while True:
        pass


def crash() -> None:
    """End the process."""
    os._exit(1)


def undocumented(x):
    return x


class Elsewhere(Echo):
    """Needs a package that only another interpreter has."""

    class Config(EchoConfig):
        """Nothing."""

        type: str = "own_environments:Elsewhere"

    async def step(self, message):
        import only_there

        return rayhf.StepResult(messages=only_there.WORD, done=True)


class Described(Echo):
    """Has a tool that its prompts are rendered with."""

    class Config(EchoConfig):
        """Nothing."""

        type: str = "own_environments:Described"

    @classmethod
    def tools(cls, config):
        return [{"type": "function", "function": {"name": "add", "parameters": {}}}]
