"""Episodes: the policy and an environment take turns, and the whole is one completion.

In: a prompt that an environment serves. Out: a Completion per turn of the policy with its part of
the episode, and of all of them one Completion, with the tokens as the engine wrote them. An
environment's reply becomes tokens that the next turn reads (rayhf/data/replies.py); they are kept
apart, so that nothing trains on them.

Everything follows from responses and seeds, which depend on the episode's place only: a resumed
iteration plays its episodes again, with the generations that the journal has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Protocol

from rayhf.config.environments import EnvironmentConfig
from rayhf.data.chat import Chat
from rayhf.data.replies import ReplyRenderer
from rayhf.episodes import Ended, Episode, StepRequest, StepResult, Turn, join_turns
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
    token_array,
)

Answer = StepResult | Invalid | Failed
_TRUNCATED = ("tokens", "reply_tokens")
"""Ends at a limit on tokens."""


class Sender(Protocol):
    """What episodes need of the request scheduler."""

    chat: Chat
    replies: ReplyRenderer
    versions: Mapping[str, int]

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]: ...

    async def step(self, request: StepRequest) -> Answer: ...


@dataclass(slots=True)
class State:
    """An episode under way."""

    index: int
    context: tuple[int, ...]
    """What the next turn reads."""
    seed: int
    """Of its first turn."""
    turns: list[Completion] = field(default_factory=list)
    """The policy's turns, each with its part of the episode."""
    generated: int = 0
    """Tokens of the turns."""
    replied: int = 0
    """Tokens of the replies."""
    is_open: bool = False
    """Whether the environment has the episode under way."""
    ended: Ended | None = None


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
        seeds = [self._derive_seed("environment", self._number, index) for index in range(n)]
        return tuple(map(self._whole, await self.play_states(seeds)))

    async def play_states(self, seeds: Sequence[int]) -> list[State]:
        """Play an episode for each of the environment's seeds, to its end."""
        self._n = len(seeds)
        states = [
            State(index, self._prompt.token_ids, self._derive_seed("sample", self._number, index))
            for index in range(self._n)
        ]
        await asyncio.gather(*map(self._begin, states, seeds))
        first = await self._first_turns([s for s in states if s.ended is None])
        await asyncio.gather(*(self._finish(s, first.get(s.index)) for s in states))
        return states

    async def _begin(self, state: State, seed: int) -> None:
        """Start the environment."""
        result = await self._step(state, 0, row=self._prompt.row, seed=seed)
        if not isinstance(result, StepResult):
            self._fail(state, result)
            return
        state.is_open = True
        messages = _messages(result)
        if not messages:
            return
        try:
            state.context = self._sender.chat.render(messages)
        except ConfigError as error:
            self._fail(state, self._invalid(str(error)))

    @property
    def _name(self) -> str:
        return self._environment.resolved_name

    def _invalid(self, reason: str) -> Invalid:
        return Invalid(reason=f"environment {self._name}: {reason}")

    async def _first_turns(self, states: Sequence[State]) -> dict[int, Completion]:
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

    async def _finish(self, state: State, turn: Completion | None) -> None:
        """Play an episode to its end."""
        if state.ended is None and turn is None:
            self._fail(state, self._invalid("its first messages leave no room for a turn"))
        while state.ended is None:
            assert turn is not None
            await self._answer(state, turn)
            if state.ended is None:
                number = self._number + len(state.turns) * self._n + state.index
                seed = self._derive_seed("turn", self._number, state.index, len(state.turns))
                (turn,) = await self._generate(state, number, (seed,))
        if state.is_open:
            await self._step(state, len(state.turns) + 1)

    async def _answer(self, state: State, turn: Completion) -> None:
        """Add a turn and the environment's answer, which may end the episode."""
        said = Turn(role="assistant", content=turn.text, tokens=len(turn.token_ids))
        if turn.finish_reason == "length":
            self._add(state, turn, [said], "tokens")
            return
        message = {"role": "assistant", "content": turn.text}
        result = await self._step(state, len(state.turns) + 1, message=message)
        state.is_open = isinstance(result, StepResult) and not result.done
        if not isinstance(result, StepResult):
            self._add(state, turn, [said], "failed", problem=result)
            return
        said = replace(said, reward=result.reward)
        messages = _messages(result)
        reply: tuple[int, ...] = ()
        end: Ended | Invalid | None = None
        if result.done:
            end = "done"
        elif len(state.turns) + 1 == self._environment.max_turns:
            end = "turns"
        else:
            reply, end = self._reply(state, turn, messages)
        self._add(
            state,
            turn,
            [said, *_replies(messages, 0 if end else len(reply))],
            "failed" if isinstance(end, Invalid) else end,
            problem=end if isinstance(end, Invalid) else None,
            metrics=result.metrics,
        )
        if end is None:
            state.context = (*state.context, *turn.token_ids.tolist(), *reply)
            state.replied += len(reply)

    def _reply(
        self, state: State, turn: Completion, messages: Sequence[Message]
    ) -> tuple[tuple[int, ...], Ended | Invalid | None]:
        """Return the tokens of a reply, and why no turn can follow it; None where one can."""
        if not messages:
            return (), self._invalid("the episode goes on, and there is no message")
        try:
            tokens = self._sender.replies.render(messages, turn=turn.token_ids)
        except ConfigError as error:
            return (), self._invalid(str(error))
        if state.replied + len(tokens) > self._environment.reply_tokens:
            return (), "reply_tokens"
        if self._room(state, generated=len(turn.token_ids), replied=len(tokens)) < 1:
            return (), "tokens"
        return tokens, None

    def _add(
        self,
        state: State,
        turn: Completion,
        messages: Sequence[Turn],
        ended: Ended | None,
        *,
        problem: Invalid | Failed | None = None,
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Add a turn with its part of the episode."""
        episode = Episode(
            environment=self._name,
            turns=tuple(messages),
            ended=ended,
            context_ids=token_array(state.context),
            problem=problem,
            metrics=metrics,
        )
        reason: Literal["stop", "length"] = "length" if ended in _TRUNCATED else "stop"
        state.turns.append(replace(turn, finish_reason=reason, episode=episode))
        state.generated += len(turn.token_ids)
        state.ended = ended

    def _fail(self, state: State, problem: Invalid | Failed) -> None:
        """End an episode before another turn; a turn without tokens has the reason."""
        nothing = Completion(
            prompt_id=self._prompt.prompt_id,
            index=state.index,
            seed=state.seed,
            text="",
            token_ids=NO_TOKENS,
            logprobs=NO_LOGPROBS,
            finish_reason="stop",
            policy_version=self._sender.versions[self._policy],
        )
        self._add(state, nothing, [], "failed", problem=problem)

    def _room(self, state: State, *, generated: int = 0, replied: int = 0) -> int:
        """Return how many tokens the next turn may have, after so many more."""
        limits = [
            self._sampling.max_tokens - state.generated - generated,
            self._sender.chat.max_length - len(state.context) - generated - replied,
            self._environment.turn_tokens or self._sampling.max_tokens,
        ]
        return min(limits)

    async def _generate(
        self, state: State, number: int, seeds: tuple[int, ...]
    ) -> tuple[Completion, ...]:
        return await self._sender.generate(
            GenerateRequest(
                prompt_id=self._prompt.prompt_id,
                number=number,
                token_ids=state.context,
                sampling=replace(self._sampling, max_tokens=self._room(state)),
                seeds=seeds,
                policy=self._policy,
            )
        )

    async def _step(
        self,
        state: State,
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

    def _whole(self, state: State) -> Completion:
        """Return an episode as one completion."""
        whole = join_turns(state.turns)
        episode = whole.episode
        assert episode is not None and episode.context_ids is not None
        if tuple(episode.context_ids.tolist()) == self._prompt.token_ids:
            episode = replace(episode, context_ids=None)
        return replace(whole, index=state.index, episode=episode)


def _messages(result: StepResult) -> Sequence[Message]:
    """Return the messages of an answer that the role has checked."""
    assert isinstance(result.messages, tuple)
    return result.messages


def _replies(messages: Sequence[Message], tokens: int) -> list[Turn]:
    """Return messages whose tokens, rendered together, count for the last one."""
    last = len(messages) - 1
    return [
        Turn(role=str(m["role"]), content=str(m["content"]), tokens=tokens if at == last else 0)
        for at, m in enumerate(messages)
    ]
