"""Plays episodes of an environment in its process, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rayhf.config.environments import EnvironmentConfig
from rayhf.environments.process import Answer, EnvironmentHost
from rayhf.episodes import StepRequest

HERE = Path(__file__).parent


def play(
    config: EnvironmentConfig, row: dict[str, object], *episodes: Sequence[str]
) -> list[list[Answer]]:
    """Play episodes at the same time; return the answers of each, to its start first."""

    def request(episode: int, **settings: object) -> StepRequest:
        return StepRequest(
            prompt_id="p",
            number=0,
            environment=config.resolved_name,
            episode=str(episode),
            **settings,  # type: ignore[arg-type]
        )

    async def one(host: EnvironmentHost, episode: int, texts: Sequence[str]) -> list[Answer]:
        answers = await host.step([request(episode, row=row, seed=5)])
        for text in texts:
            message = {"role": "assistant", "content": text}
            answers += await host.step([request(episode, message=message)])
        await host.step([request(episode)])
        return answers

    async def go() -> list[list[Answer]]:
        host = EnvironmentHost([config], base=HERE)
        try:
            return list(await asyncio.gather(*(one(host, *each) for each in enumerate(episodes))))
        finally:
            host.close()

    return asyncio.run(asyncio.wait_for(go(), 300))
