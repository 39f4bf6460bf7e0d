"""Requests to a scorer, its responses, and rules to send them to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import (
    Compared,
    Completion,
    Message,
    Prompt,
    Scored,
    ScoreRequest,
    float_array,
    token_array,
)


def request(
    *texts: str,
    prompt_id: str = "p",
    question: str = "2+2?",
    messages: Sequence[Message] | None = None,
    answer: str = "4",
    finish_reason: Literal["stop", "length"] = "stop",
) -> ScoreRequest:
    """Completions of one prompt; `messages` replace the question."""
    prompt = Prompt(
        prompt_id=prompt_id,
        messages=tuple(messages or [{"role": "user", "content": question}]),
        token_ids=(1,),
        reference_answer=answer,
    )
    completions = [
        Completion(
            prompt_id=prompt_id,
            index=index,
            seed=index,
            text=text,
            token_ids=token_array((1,)),
            logprobs=float_array((0.0,)),
            finish_reason=finish_reason,
            policy_version=0,
        )
        for index, text in enumerate(texts)
    ]
    return ScoreRequest(prompt=prompt, completions=tuple(completions))


def win_of(comparison: object) -> npt.NDArray[np.float64]:
    assert isinstance(comparison, Compared), comparison
    return comparison.win


def scored(*values: float) -> tuple[Scored, ...]:
    return tuple(Scored(value=value) for value in values)


def make_rule(function: str, base: Path, **settings: Any) -> Rule:
    return Rule(RuleConfig(function=function, **settings), ScorerSetup(base=base))
