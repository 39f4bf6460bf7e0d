"""The models of a judge: a frozen rollout engine in the scorer's own process, or an endpoint.

In: questions. Out: replies, from the weights of the model directory (version 0). A process with an
engine needs the environment of rayhf.rollout.env.engine_env().
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Protocol

from rayhf.data.chat import render, special_token_escaper
from rayhf.data.template import template_with
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
from rayhf.models.source import load_tokenizer, model_length, read_model_config
from rayhf.scorer.comparisons import Problem
from rayhf.scorer.endpoint import EndpointModel
from rayhf.scorer.endpoint_check import check_endpoint
from rayhf.scorer.judge import Judge
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.judge_votes import JudgeModel, Question, Reply
from rayhf.scorer.protocol import BaseScorer, ScorerSetup
from rayhf.types import (
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Message,
    Prompt,
    Sampling,
    quoted,
)

_TODAY = date(2026, 1, 1)
"""What a chat template that prints the date gets: a question must be the same every day."""


class LanguageModelJudge(Judge, BaseScorer[JudgeConfig]):
    """A language model that gives verdicts, in the scorer's process or behind an HTTP endpoint."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig, setup: ScorerSetup) -> None:
        super().__init__(config, _start(config, setup))

    @classmethod
    def check(cls, config: JudgeConfig, base: Path) -> None:
        """Check the small files of the model and the limits, or ask the endpoint.

        Raises ConfigError, or UnreachableError where the endpoint does not respond.
        """
        if config.endpoint is None:
            judge_length(config, base)
        else:
            check_endpoint(config.endpoint)

    @classmethod
    def check_prompts(cls, config: JudgeConfig, base: Path, prompts: Sequence[Prompt]) -> None:
        """Check, too, that every prompt has a rubric where mode rubric reads its column."""
        cls.check(config, base)
        if config.rubric is not None:
            for prompt in prompts:
                try:
                    config.rubric.of(prompt)
                except ValueError as error:
                    raise ConfigError(f"{quoted(prompt)}: {error}") from None


def _start(config: JudgeConfig, setup: ScorerSetup) -> JudgeModel:
    if config.endpoint is None:
        return LocalModel(config, JudgeEngine(config, setup))
    return EndpointModel(
        config.endpoint,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )


class Generator(Protocol):
    """A language model in this process."""

    @property
    def max_length(self) -> int:
        """Limit on question plus vote, in tokens."""
        ...

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of the chat template with the generation prompt.

        Raises ConfigError where it refuses the messages.
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
        """Return one completion per seed of each request, in order."""
        ...

    def close(self) -> None:
        """Release the memory of the weights."""
        ...


class LocalModel:
    """A generator as the model of a judge. Calls from several threads run one after the other."""

    def __init__(self, config: JudgeConfig, generator: Generator) -> None:
        self._generator = generator
        self._sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        self._lock = threading.Lock()

    def answer(self, questions: Sequence[Question]) -> list[tuple[Reply, ...] | Problem]:
        """Return one reply per seed of each question, or why the model cannot read it."""
        encoded = [self._request(question, number) for number, question in enumerate(questions)]
        requests = [request for request in encoded if isinstance(request, GenerateRequest)]
        with self._lock:
            generated = self._generator.generate(requests) if requests else []
        if len(generated) != len(requests):
            reason = f"the judge's model answered {len(generated)} of {len(requests)} questions"
            return [Failed(reason=reason)] * len(questions)
        replies = iter(generated)
        return [
            _replies(next(replies)) if isinstance(request, GenerateRequest) else request
            for request in encoded
        ]

    def take_counts(self) -> dict[str, float]:
        """Return nothing: tokens in this process cost no more than its time."""
        return {}

    def close(self) -> None:
        """Release the memory of the weights."""
        self._generator.close()

    def _request(self, question: Question, number: int) -> GenerateRequest | Problem:
        try:
            token_ids = self._generator.render([{"role": "user", "content": question.text}])
        except ConfigError as error:
            reason = " ".join(str(error).split())
            return Failed(reason=f"the question cannot be rendered: {reason}")
        needed = len(token_ids) + self._sampling.max_tokens
        limit = self._generator.max_length
        if needed > limit:
            return Invalid(
                reason=f"too long: {needed} tokens of question and vote, the judge takes {limit}"
            )
        return GenerateRequest(
            prompt_id="judge",
            number=number,
            token_ids=token_ids,
            sampling=self._sampling,
            seeds=question.seeds,
        )


def _replies(completions: Sequence[Completion]) -> tuple[Reply, ...]:
    return tuple(
        Reply(text=completion.text, is_complete=completion.finish_reason == "stop")
        for completion in completions
    )


class JudgeEngine:
    """Generator over one RolloutEngine. Raises ConfigError as judge_length does."""

    def __init__(self, config: JudgeConfig, setup: ScorerSetup) -> None:
        self.max_length = judge_length(config, setup.base)
        from rayhf.rollout.engine import RolloutEngine

        loads = config.loads
        assert loads is not None  # a judge without an endpoint
        directory = local_directory(loads.model, setup.base)
        self._tokenizer = load_tokenizer(directory, key="judge")
        self._tokenizer.chat_template = template_with(
            self._tokenizer.get_chat_template(), {}, today=_TODAY
        )
        self._escape = special_token_escaper(self._tokenizer)
        self._engine = RolloutEngine(
            directory,
            loads.engine,
            dtype=config.dtype,
            max_length=self.max_length,
            seed=0,  # every request has its own
            device="cpu" if setup.device == "cpu" else "gpu",
        )

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of the chat template around the messages.

        Special tokens in their contents are broken up: a completion that spells
        "<|end|><|assistant|>" would otherwise end the judge's question and continue as the judge.
        """
        safe = [{**message, "content": self._escape(message["content"])} for message in messages]
        return render(self._tokenizer, safe, where="judge")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
        """Return one completion per seed of each request, in order."""
        return self._engine.generate(requests, version=0)

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


def judge_length(config: JudgeConfig, base: Path) -> int:
    """Return the limit on question plus vote, in tokens; reads only the model's small files.

    Raises ConfigError for a directory or limits that cannot work.
    """
    assert config.model is not None  # a judge without an endpoint
    directory = local_directory(config.model, base)
    limit = model_length(read_model_config(directory, key="model"))
    load_tokenizer(directory, key="model")
    length = config.max_length or limit
    if length is None:
        raise ConfigError(
            f"max_length: {directory} does not say how long its sequences may be; set it"
        )
    if limit is not None and length > limit:
        raise ConfigError(
            f"max_length is {length}, but {directory} was made for at most {limit} tokens"
        )
    if config.max_tokens >= length:
        raise ConfigError(
            f"max_tokens is {config.max_tokens}, but question and vote together may have {length} "
            "tokens; expected less"
        )
    return length
