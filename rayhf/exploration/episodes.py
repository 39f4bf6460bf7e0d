"""Episodes: the policy and an environment take turns, and the whole is one completion.

In: a prompt that an environment serves. Out: a Completion per episode, with the tokens of all of
the policy's turns as the engine wrote them. An environment's reply becomes tokens that the next
turn reads (rayhf/data/replies.py); they are kept apart, so that nothing trains on them.

Everything follows from responses and seeds, which depend on the episode's place only: a resumed
iteration plays its episodes again, with the generations that the journal has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from rayhf.config.environments import EnvironmentConfig
from rayhf.data.chat import Chat
from rayhf.data.replies import ReplyRenderer
from rayhf.episodes import Episode, Inserted, StepRequest, StepResult, Turn, inserted_tokens
from rayhf.errors import ConfigError
from rayhf.types import (
    NO_LOGPROBS,
    NO_TOKENS,
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Message,
    Prompt,
    Sampling,
    TokenArray,
    float_array,
    split_versions,
    token_array,
)

Answer = StepResult | Invalid | Failed
Ended = Literal["done", "turns", "tokens", "reply_tokens", "failed"]


class Sender(Protocol):
    """What episodes need of the request scheduler."""

    chat: Chat
    replies: ReplyRenderer
    versions: Mapping[str, int]

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]: ...

    async def step(self, request: StepRequest) -> Answer: ...


@dataclass(slots=True)
class _State:
    """An episode under way."""

    index: int
    context: tuple[int, ...]
    """The tokens that it begins after."""
    seed: int
    """Of its first turn."""
    turns: list[Turn] = field(default_factory=list)
    written: list[Completion] = field(default_factory=list)
    """The policy's turns."""
    replies: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """Of each reply, the number of the policy's tokens before it, and its tokens."""
    metrics: dict[str, float] = field(default_factory=dict)
    problem: Invalid | Failed | None = None

    @property
    def generated(self) -> int:
        return sum(len(turn.token_ids) for turn in self.written)

    @property
    def replied(self) -> int:
        return sum(len(tokens) for _, tokens in self.replies)

    def token_ids(self) -> tuple[int, ...]:
        """Return everything that the next turn reads."""
        ids = list(self.context)
        replies = [tokens for _, tokens in self.replies]
        for turn, reply in zip(self.written, replies, strict=True):
            ids += turn.token_ids.tolist()
            ids += reply
        return tuple(ids)


class EpisodePlayer:
    """Plays the episodes of one request for completions.

    Args:
        sender: makes the requests.
        prompt: their prompt.
        environment: serves it.
        sampling: of all turns; max_tokens is for all turns of an episode together.
        policy: plays.
        derive_seed: derives a seed from its arguments.
        number: of the first request; every turn of every episode has its own.
    """

    def __init__(
        self,
        sender: Sender,
        prompt: Prompt,
        environment: EnvironmentConfig,
        *,
        sampling: Sampling,
        policy: str,
        derive_seed: Callable[..., int],
        number: int,
    ) -> None:
        self._sender = sender
        self._prompt = prompt
        self._environment = environment
        self._sampling = sampling
        self._policy = policy
        self._derive_seed = derive_seed
        self._number = number

    async def play(self, n: int) -> tuple[Completion, ...]:
        """Return n episodes."""
        self._n = n
        states = [
            _State(index, self._prompt.token_ids, self._derive_seed("sample", self._number, index))
            for index in range(n)
        ]
        await asyncio.gather(*map(self._reset, states))
        first = await self._first_turns([s for s in states if s.problem is None])
        return tuple(await asyncio.gather(*(self._finish(s, first.get(s.index)) for s in states)))

    async def _reset(self, state: _State) -> None:
        seed = self._derive_seed("environment", self._number, state.index)
        result = await self._step(state, 0, row=self._prompt.row, seed=seed)
        if not isinstance(result, StepResult):
            state.problem = result
            return
        messages = _messages(result)
        if not messages:
            return
        try:
            state.context = self._sender.chat.render(messages)
        except ConfigError as error:
            state.problem = Invalid(reason=f"environment {self._name}: {error}")

    @property
    def _name(self) -> str:
        return self._environment.resolved_name

    async def _first_turns(self, states: Sequence[_State]) -> dict[int, Completion]:
        """Return the first turn of each episode, by index; one request where all begin alike."""
        begun = [state for state in states if self._room(state) > 0]
        if len(begun) == self._n and len({state.context for state in begun}) == 1:
            seeds = tuple(state.seed for state in begun)
            turns = await self._generate(begun[0], self._number, seeds)
            return dict(enumerate(turns))
        requests = [
            self._generate(state, self._number + state.index, (state.seed,)) for state in begun
        ]
        answers = await asyncio.gather(*requests)
        return {state.index: turn for state, (turn,) in zip(begun, answers, strict=True)}

    async def _finish(self, state: _State, turn: Completion | None) -> Completion:
        """Play an episode to its end."""
        ended: Ended | None = None
        if state.problem is not None:
            ended = "failed"
        elif turn is None:
            state.problem = Invalid(
                reason=f"environment {self._name}: its first messages leave no room for a turn"
            )
            ended = "failed"
        while ended is None:
            assert turn is not None
            ended = await self._answer(state, turn)
            if ended is None:
                number = self._number + len(state.written) * self._n + state.index
                seed = self._derive_seed("turn", self._number, state.index, len(state.written))
                (turn,) = await self._generate(state, number, (seed,))
        if ended not in ("done", "failed"):
            await self._step(state, len(state.written) + 1)
        return self._completion(state, ended)

    async def _answer(self, state: _State, turn: Completion) -> Ended | None:
        """Add a turn and the environment's answer; return why the episode is over, else None."""
        state.written.append(turn)
        written = Turn(role="assistant", content=turn.text, tokens=len(turn.token_ids))
        if turn.finish_reason == "length":
            state.turns.append(written)
            return "tokens"
        result = await self._step(
            state, len(state.written), message={"role": "assistant", "content": turn.text}
        )
        if not isinstance(result, StepResult):
            state.turns.append(written)
            state.problem = result
            return "failed"
        state.turns.append(replace(written, reward=result.reward))
        for name, value in result.metrics.items():
            state.metrics[name] = state.metrics.get(name, 0.0) + value
        messages = _messages(result)
        if result.done or len(state.written) == self._environment.max_turns:
            state.turns += _unread(messages)
            return "done" if result.done else "turns"
        return self._reply(state, turn, messages)

    def _reply(self, state: _State, turn: Completion, messages: Sequence[Message]) -> Ended | None:
        """Add the environment's messages, if a turn can follow them."""
        if not messages:
            state.problem = Invalid(
                reason=f"environment {self._name}: the episode goes on, and there is no message"
            )
            return "failed"
        try:
            tokens = self._sender.replies.render(messages, turn=turn.token_ids)
        except ConfigError as error:
            state.problem = Invalid(reason=f"environment {self._name}: {error}")
            return "failed"
        if state.replied + len(tokens) > self._environment.reply_tokens:
            state.turns += _unread(messages)
            return "reply_tokens"
        state.replies.append((state.generated, tokens))
        if self._room(state) < 1:
            state.replies.pop()
            state.turns += _unread(messages)
            return "tokens"
        state.turns += _unread(messages[:-1])
        last = messages[-1]
        # The tokens of several messages are rendered together; they count for the last one.
        state.turns.append(
            Turn(role=str(last["role"]), content=str(last["content"]), tokens=len(tokens))
        )
        return None

    def _room(self, state: _State) -> int:
        """Return how many tokens the next turn may have."""
        used = len(state.context) + state.generated + state.replied
        limits = [
            self._sampling.max_tokens - state.generated,
            self._sender.chat.max_length - used,
            self._environment.turn_tokens or self._sampling.max_tokens,
        ]
        return min(limits)

    async def _generate(
        self, state: _State, number: int, seeds: tuple[int, ...]
    ) -> tuple[Completion, ...]:
        return await self._sender.generate(
            GenerateRequest(
                prompt_id=self._prompt.prompt_id,
                number=number,
                token_ids=state.token_ids(),
                sampling=replace(self._sampling, max_tokens=self._room(state)),
                seeds=seeds,
                policy=self._policy,
            )
        )

    async def _step(
        self,
        state: _State,
        turn: int,
        *,
        row: Mapping[str, object] | None = None,
        seed: int = 0,
        message: Message | None = None,
    ) -> Answer:
        return await self._sender.step(
            StepRequest(
                prompt_id=self._prompt.prompt_id,
                number=self._number + turn * self._n + state.index,
                environment=self._name,
                episode=f"{self._prompt.prompt_id} {state.seed}",
                row=row,
                seed=seed,
                message=message,
            )
        )

    def _completion(self, state: _State, ended: Ended) -> Completion:
        turns = state.written
        own_context = state.context != self._prompt.token_ids
        episode = Episode(
            environment=self._name,
            turns=tuple(state.turns),
            ended=ended,
            inserted=_inserted(state),
            context_ids=token_array(state.context) if own_context else None,
            problem=state.problem,
            metrics=state.metrics,
        )
        versions = [
            np.full(len(turn.token_ids), turn.policy_version, np.int32)
            if turn.token_versions is None
            else turn.token_versions
            for turn in turns
        ]
        oldest = self._sender.versions[self._policy]
        token_versions: TokenArray | None = None
        if state.generated:
            oldest, token_versions = split_versions(np.concatenate(versions))
        return Completion(
            prompt_id=self._prompt.prompt_id,
            index=state.index,
            seed=state.seed,
            text=turns[-1].text if turns else "",
            token_ids=token_array(np.concatenate([NO_TOKENS, *(t.token_ids for t in turns)])),
            logprobs=float_array(np.concatenate([NO_LOGPROBS, *(t.logprobs for t in turns)])),
            finish_reason="length" if ended in ("tokens", "reply_tokens") else "stop",
            thinking=turns[-1].thinking if turns else None,
            thinking_tokens=sum(turn.thinking_tokens for turn in turns),
            policy_version=oldest,
            token_versions=token_versions,
            episode=episode,
        )


def _messages(result: StepResult) -> Sequence[Message]:
    """Return the messages of an answer that the role has checked."""
    assert isinstance(result.messages, tuple)
    return result.messages


def _unread(messages: Sequence[Message]) -> list[Turn]:
    """Return messages that have no tokens of their own."""
    return [Turn(role=str(m["role"]), content=str(m["content"]), tokens=0) for m in messages]


def _inserted(state: _State) -> Inserted | None:
    """Return the tokens of the replies, without one that nothing was generated after."""
    replies = [(before, ids) for before, ids in state.replies if before < state.generated]
    return inserted_tokens(
        [token for _, ids in replies for token in ids],
        [before for before, ids in replies for _ in ids],
    )
