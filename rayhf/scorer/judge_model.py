"""The judge's model: a frozen rollout engine in the scorer's own process, which needs
rayhf.rollout.env.engine_env().

In: messages and GenerateRequests. Out: token ids and completions, with the weights of the model
directory (version 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayhf.config.schema import RolloutConfig
from rayhf.config.scorers import Dtype
from rayhf.data.chat import render, special_token_escaper
from rayhf.errors import ConfigError
from rayhf.models.source import load_tokenizer, model_length, read_model_config
from rayhf.types import Completion, GenerateRequest, Message


class JudgeModel:
    """Generator over one RolloutEngine. Raises ConfigError for a directory or settings that cannot
    work.

    Args:
        directory: Hugging Face model directory with a tokenizer that has a chat template.
        max_length: question plus vote, in tokens; None takes the model's own limit.
        max_tokens: per vote.
        kv_cache_gib: None leaves it to the rollout engine's default.
        device: torch device, "cpu" or "cuda".
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: Dtype,
        max_length: int | None,
        max_tokens: int,
        kv_cache_gib: float | None,
        device: str,
    ) -> None:
        self.max_length = check_judge_directory(
            directory, max_length=max_length, max_tokens=max_tokens
        )
        from rayhf.rollout.engine import RolloutEngine

        self._tokenizer = load_tokenizer(directory, key="judge")
        self._disarm = special_token_escaper(self._tokenizer)
        self._engine = RolloutEngine(
            directory,
            RolloutConfig(max_tokens=max_tokens, kv_cache_gib=kv_cache_gib),
            dtype=dtype,
            max_length=self.max_length,
            seed=0,  # every request brings its own
            device="cpu" if device == "cpu" else "gpu",
        )

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The chat template around the messages. Their contents spell no special token: an answer
        that writes "<|end|><|assistant|>" would otherwise end the judge's question and go on in the
        judge's name."""
        safe = [{**message, "content": self._disarm(message["content"])} for message in messages]
        return render(self._tokenizer, safe, where="judge")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
        return self._engine.generate(requests, version=0)

    def close(self) -> None:
        self._engine.close()


def check_judge_directory(directory: Path, *, max_length: int | None, max_tokens: int) -> int:
    """What the small files can tell; loads no weights. Returns the longest question plus vote, in
    tokens. Raises ConfigError."""
    limit = model_length(read_model_config(directory, key="model"))
    load_tokenizer(directory, key="model")
    if max_length is None and limit is None:
        raise ConfigError(
            f"max_length: {directory} does not say how long its sequences may be; set it"
        )
    if max_length is not None and limit is not None and max_length > limit:
        raise ConfigError(
            f"max_length is {max_length}, but {directory} was made for at most {limit} tokens"
        )
    length = max_length or limit or 0
    if max_tokens >= length:
        raise ConfigError(
            f"max_tokens is {max_tokens}, but question and vote together may have {length} tokens; expected less"
        )
    return length
