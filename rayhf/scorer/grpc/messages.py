"""Between the scorers' nouns (rayhf/types.py) and the messages of proto/scorer.proto, both ways.

What comes from the other side is looked at, not believed: a number that is not finite is no score,
a matrix has the size of what was asked, and a text is cut and made printable before it is passed on
as a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rayhf.errors import ConfigError
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.service.chat_pb2 import Message
from rayhf.service.client import printable
from rayhf.types import (
    Compared,
    Comparison,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
)

SERVICE = pb.DESCRIPTOR.services_by_name["Scorer"].full_name
_REASONS: dict[Literal["stop", "length"], pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
_FINISHED: dict[int, Literal["stop", "length"]] = {
    number: reason for reason, number in _REASONS.items()
}
_SOURCES: dict[Literal["pairwise", "pointwise"], pb.Source] = {
    "pairwise": pb.SOURCE_PAIRWISE,
    "pointwise": pb.SOURCE_POINTWISE,
}
_COMPARED: dict[int, Literal["pairwise", "pointwise"]] = {
    number: source for source, number in _SOURCES.items()
}


def encode_request(request: ScoreRequest) -> pb.ScoreRequest:
    """What a scorer reads of a request. Raises UnicodeEncodeError for text that UTF-8 does not have
    (lone surrogates)."""
    prompt = request.prompt
    return pb.ScoreRequest(
        prompt=pb.Prompt(
            prompt_id=prompt.prompt_id,
            messages=[
                Message(role=message["role"], content=message["content"])
                for message in prompt.messages
            ],
            answer=prompt.answer,
        ),
        completions=[
            pb.Completion(text=c.text, finish_reason=_REASONS[c.finish_reason])
            for c in request.completions
        ],
    )


def decode_requests(message: pb.ScoreRequests) -> list[ScoreRequest]:
    """Raises ConfigError for a prompt without messages and an unknown finish reason."""
    return [
        _decode_request(request, f"requests[{index}]")
        for index, request in enumerate(message.requests)
    ]


def _decode_request(message: pb.ScoreRequest, where: str) -> ScoreRequest:
    asked = message.prompt
    if not asked.messages:
        raise ConfigError(f"{where}: the prompt has no messages, expected at least one")
    prompt = Prompt(
        prompt_id=asked.prompt_id,
        messages=tuple({"role": m.role, "content": m.content} for m in asked.messages),
        token_ids=(),
        answer=asked.answer if asked.HasField("answer") else None,
    )
    completions = []
    for index, completion in enumerate(message.completions):
        reason = _FINISHED.get(completion.finish_reason)
        if reason is None:
            raise ConfigError(
                f"{where}.completions[{index}]: finish_reason {completion.finish_reason}, expected STOP or LENGTH"
            )
        completions.append(
            Completion(
                prompt_id=asked.prompt_id, index=index, seed=0, text=completion.text, token_ids=(), logprobs=(),
                finish_reason=reason, policy_version=0,
            )
        )  # fmt: skip
    return ScoreRequest(prompt=prompt, completions=tuple(completions))


def encode_outcomes(answers: Sequence[Sequence[Outcome]]) -> pb.ScoreReply:
    return pb.ScoreReply(
        answers=[pb.Outcomes(outcomes=map(_encode_outcome, row)) for row in answers]
    )


def _encode_outcome(outcome: Outcome) -> pb.Outcome:
    if isinstance(outcome, Scored):
        return pb.Outcome(scored=pb.Scored(value=outcome.value, parts=outcome.parts))
    if isinstance(outcome, Invalid):
        return pb.Outcome(invalid=_invalid(outcome))
    return pb.Outcome(failed=_failed(outcome))


def decode_outcomes(message: pb.Outcomes) -> tuple[Outcome, ...]:
    return tuple(map(_decode_outcome, message.outcomes))


def _decode_outcome(message: pb.Outcome) -> Outcome:
    match message.WhichOneof("kind"):
        case "scored":
            scored = Scored(value=message.scored.value, parts=dict(message.scored.parts))
            if all(map(math.isfinite, (scored.value, *scored.parts.values()))):
                return scored
            return Invalid(
                reason=f"the score is {scored.value}, with parts {printable(str(scored.parts))}"
            )
        case "invalid":
            return Invalid(reason=printable(message.invalid.reason))
        case "failed":
            return Failed(
                reason=printable(message.failed.reason), transient=message.failed.transient
            )
    return Failed(reason="the service sent an outcome of no kind")


def encode_comparisons(answers: Sequence[Comparison]) -> pb.CompareReply:
    return pb.CompareReply(answers=map(_encode_comparison, answers))


def _encode_comparison(comparison: Comparison) -> pb.Comparison:
    if isinstance(comparison, Compared):
        return pb.Comparison(
            compared=pb.Compared(
                win=comparison.win.ravel().tolist(), source=_SOURCES[comparison.source]
            )
        )
    if isinstance(comparison, Invalid):
        return pb.Comparison(invalid=_invalid(comparison))
    return pb.Comparison(failed=_failed(comparison))


def decode_comparison(message: pb.Comparison, answers: int) -> Comparison:
    """Of so many answers. Whether the matrix is one of probabilities is for
    rayhf.scorer.comparisons.check_comparisons to say."""
    match message.WhichOneof("kind"):
        case "compared":
            source = _COMPARED.get(message.compared.source)
            if source is None:
                return Failed(
                    reason=f"the service sent a matrix with source {message.compared.source}"
                )
            if len(message.compared.win) != answers * answers:
                found = len(message.compared.win)
                return Failed(
                    reason=f"the service sent a matrix of {found} numbers, expected {answers} x {answers}"
                )
            return Compared(
                win=np.array(message.compared.win, dtype=np.float64).reshape(answers, answers),
                source=source,
            )
        case "invalid":
            return Invalid(reason=printable(message.invalid.reason))
        case "failed":
            return Failed(
                reason=printable(message.failed.reason), transient=message.failed.transient
            )
    return Failed(reason="the service sent a comparison of no kind")


def _invalid(outcome: Invalid) -> pb.Invalid:
    return pb.Invalid(reason=printable(outcome.reason))


def _failed(outcome: Failed) -> pb.Failed:
    return pb.Failed(reason=printable(outcome.reason), transient=outcome.transient)
