"""The model of a judge: a frozen rollout engine in the scorer's own process.

In: messages and GenerateRequests. Out: token ids and completions, with the weights of the model
directory (version 0). The process needs the environment of rayhf.rollout.env.engine_env().
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayhf.data.chat import render, special_token_escaper
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
from rayhf.models.source import load_tokenizer, model_length, read_model_config
from rayhf.scorer.judge import Judge, JudgeConfig
from rayhf.scorer.protocol import BaseScorer, ScorerSetup
from rayhf.types import Completion, GenerateRequest, Message


class LocalJudge(Judge, BaseScorer[JudgeConfig]):
    """A language model that gives verdicts, on vLLM in the scorer's process."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig, setup: ScorerSetup) -> None:
        super().__init__(config, JudgeModel(config, setup))

    @classmethod
    def check(cls, config: JudgeConfig, base: Path) -> None:
        """Check the small files of the model and the limits. Raises ConfigError."""
        judge_length(config, base)


class JudgeModel:
    """Generator over one RolloutEngine. Raises ConfigError as judge_length does."""

    def __init__(self, config: JudgeConfig, setup: ScorerSetup) -> None:
        self.max_length = judge_length(config, setup.base)
        from rayhf.rollout.engine import RolloutEngine

        directory = local_directory(config.model, setup.base)
        self._tokenizer = load_tokenizer(directory, key="judge")
        self._escape = special_token_escaper(self._tokenizer)
        self._engine = RolloutEngine(
            directory,
            config.loads.engine,
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
