"""Completions of thinking models, split into thinking and answer.

In: a completion as the engine generated it. Out: the same tokens and log-probs, with the answer as
its text and what came before as its thinking. The split is made on the generated tokens: nothing is
tokenized again. Together, `thinking` and `text` are the whole text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rayhf.config.schema import ThinkingConfig
from rayhf.types import Completion, ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 16
"""Tokens at the end of a prompt among which the template may have opened the thinking."""


class ThinkingParser:
    """Finds the end of the thinking in generated tokens."""

    def __init__(self, config: ThinkingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        ids = tokenizer(config.end, add_special_tokens=False)["input_ids"]
        self._end_id: int | None = ids[0] if len(ids) == 1 else None

    def opened_by(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt ends with the start marker, so that the model begins to think."""
        return self._decode(prompt_ids[-_TAIL:]).rstrip().endswith(self._config.start)

    def split(self, completion: Completion, *, opened: bool) -> Completion:
        """Return the completion with its answer as text.

        Where the thinking was begun (`opened`, or by the completion) and does not end, the answer
        is empty and the completion counts as truncated, whatever ended it.
        """
        token_ids = completion.token_ids.tolist()
        count = self._count(token_ids)
        if count is None:
            if not opened and self._config.start not in self._decode(token_ids):
                return completion
            return replace(
                completion,
                text="",
                thinking=completion.text,
                thinking_tokens=len(token_ids),
                finish_reason="length",
            )
        head = self._decode(token_ids[:count])
        cut = head.index(self._config.end) + len(self._config.end)
        rest = head[cut:] + str(self._tokenizer.decode(token_ids[count:], skip_special_tokens=True))
        text = rest.lstrip("\n")
        return replace(
            completion,
            text=text,
            thinking=head[:cut] + rest[: len(rest) - len(text)],
            thinking_tokens=count,
        )

    def _count(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of tokens through the first end marker; None without one."""
        if self._end_id is not None and self._end_id in token_ids:
            return token_ids.index(self._end_id) + 1
        if self._config.end not in self._decode(token_ids):
            return None
        # The model may spell the marker with several tokens.
        return bisect_left(
            range(len(token_ids) + 1),
            True,
            key=lambda count: self._config.end in self._decode(token_ids[:count]),
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def with_whole_texts(requests: Sequence[ScoreRequest]) -> list[ScoreRequest]:
    """Return the requests with thinking and answer as the completions' texts."""
    return [
        replace(
            request,
            completions=tuple(
                replace(c, text=(c.thinking or "") + c.text) for c in request.completions
            ),
        )
        for request in requests
    ]


def thinking_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Return lengths of thinking and answer in tokens, and the share of unfinished thinking.

    Empty where no completion has any thinking.
    """
    if all(completion.thinking is None for completion in completions):
        return {}
    return {
        "thinking_tokens": float(np.mean([c.thinking_tokens for c in completions])),
        "answer_tokens": float(
            np.mean([len(c.token_ids) - c.thinking_tokens for c in completions])
        ),
        "thinking_unfinished": float(np.mean([_is_unfinished(c) for c in completions])),
    }


def _is_unfinished(completion: Completion) -> bool:
    return completion.thinking is not None and completion.thinking_tokens == len(
        completion.token_ids
    )
