"""Environments and a chat template for tests that need no processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fakes import FakeChat

from rayhf.episodes import StepRequest, StepResult
from rayhf.roles import Environments
from rayhf.types import Failed, Invalid, Message

Answer = StepResult | Invalid | Failed
END = 1


class TurnChat(FakeChat):
    """A turn is the first letter of its role, its text and "~", which is token 1."""

    end_token = "~"
    end_token_id = END

    def __init__(self, max_length: int = 200) -> None:
        self.max_length = max_length

    def escaped(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages)

    def template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
        where: str = "",
    ) -> str:
        text = "".join(f"{m['role'][0]}{m['content']}~" for m in messages)
        return text + ("a" if generation_prompt else "")

    def tokens_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [END if c == "~" else 2 + ord(c) % 40 for c in text], []


class FakeEnvironments:
    """Answers turn k of an episode with `answer(k, message)`; `first` answers its start."""

    def __init__(
        self,
        answer: Callable[[int, str], Answer],
        first: Callable[[StepRequest], Answer] = lambda request: StepResult(messages=()),
    ) -> None:
        self._answer = answer
        self._first = first
        self._turns: dict[str, int] = {}
        self.closed: list[str] = []
        self.seeds: list[int] = []

    async def step(self, requests: Sequence[StepRequest]) -> list[Answer]:
        return [self._step(request) for request in requests]

    def _step(self, request: StepRequest) -> Answer:
        if request.row is not None:
            self._turns[request.episode] = 0
            self.seeds.append(request.seed)
            return self._first(request)
        if request.message is None:
            self.closed.append(request.episode)
            return StepResult()
        self._turns[request.episode] += 1
        return self._answer(self._turns[request.episode], request.message["content"])


def rounds(number: int) -> FakeEnvironments:
    """Return an environment of `number` rounds: each gives its number as the reward."""
    return FakeEnvironments(
        lambda turn, text: StepResult(
            messages=({"role": "user", "content": f"after {text}"},),
            reward=float(turn),
            done=turn == number,
            metrics={"rounds": 1.0},
        )
    )


CONFORMS: Environments = rounds(1)
