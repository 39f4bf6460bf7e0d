"""Conversion between rayhf's types (rayhf/types.py) and the messages of scorer.proto.

Values from the other side are validated: a number that is not finite is no score, a matrix has the
size of its request, and a text is cut and made printable before it is passed on as a reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rayhf.errors import ConfigError
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.service.chat_pb2 import Message
from rayhf.service.client import printable
from rayhf.types import (
    NO_LOGPROBS,
    NO_TOKENS,
    Compared,
    Comparison,
    Completion,
    Failed,
    Invalid,
    JudgeReply,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
    Skipped,
)

SERVICE = pb.DESCRIPTOR.services_by_name["Scorer"].full_name
_ENCODED_REASON: dict[Literal["stop", "length"], pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
_DECODED_REASON: dict[int, Literal["stop", "length"]] = {
    number: reason for reason, number in _ENCODED_REASON.items()
}
_ENCODED_SOURCE: dict[Literal["pairwise", "pointwise"], pb.Source] = {
    "pairwise": pb.SOURCE_PAIRWISE,
    "pointwise": pb.SOURCE_POINTWISE,
}
_DECODED_SOURCE: dict[int, Literal["pairwise", "pointwise"]] = {
    number: source for source, number in _ENCODED_SOURCE.items()
}


def encode_request(request: ScoreRequest) -> pb.ScoreRequest:
    """Encode what a scorer reads of a request.

    Raises UnicodeEncodeError for text that UTF-8 does not have (lone surrogates).
    """
    prompt = request.prompt
    messages = [
        Message(role=message["role"], content=message["content"]) for message in prompt.messages
    ]
    completions = [
        pb.Completion(
            text=completion.text,
            finish_reason=_ENCODED_REASON[completion.finish_reason],
            thinking=completion.thinking,
        )
        for completion in request.completions
    ]
    return pb.ScoreRequest(
        prompt=pb.Prompt(
            prompt_id=prompt.prompt_id,
            messages=messages,
            answer=prompt.reference_answer,
            row=json.dumps(dict(prompt.row), ensure_ascii=False) if prompt.row else "",
            source=prompt.source,
        ),
        completions=completions,
    )


def decode_requests(message: pb.ScoreRequests) -> list[ScoreRequest]:
    """Decode all requests of a call.

    Raises ConfigError for a prompt without messages, for a row that is no JSON object, and for an
    unknown finish reason.
    """
    return [
        _decode_request(request, f"requests[{index}]")
        for index, request in enumerate(message.requests)
    ]


def _decode_request(message: pb.ScoreRequest, where: str) -> ScoreRequest:
    sent = message.prompt
    if not sent.messages:
        raise ConfigError(f"{where}: the prompt has no messages, expected at least one")
    prompt = Prompt(
        prompt_id=sent.prompt_id,
        messages=tuple({"role": m.role, "content": m.content} for m in sent.messages),
        token_ids=(),
        reference_answer=sent.answer if sent.HasField("answer") else None,
        row=_decode_row(sent.row, where),
        source=sent.source,
    )
    completions = []
    for index, completion in enumerate(message.completions):
        reason = _DECODED_REASON.get(completion.finish_reason)
        if reason is None:
            raise ConfigError(
                f"{where}.completions[{index}]: finish_reason {completion.finish_reason}, "
                "expected STOP or LENGTH"
            )
        completions.append(
            Completion(
                prompt_id=sent.prompt_id,
                index=index,
                seed=0,
                text=completion.text,
                token_ids=NO_TOKENS,
                logprobs=NO_LOGPROBS,
                finish_reason=reason,
                thinking=completion.thinking if completion.HasField("thinking") else None,
                policy_version=0,
            )
        )
    return ScoreRequest(prompt=prompt, completions=tuple(completions))


def _decode_row(text: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: the prompt's row is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: the prompt's row is a {type(row).__name__}, not an object")
    return row


def encode_outcomes(outcomes: Sequence[Sequence[Outcome]]) -> pb.ScoreReply:
    """Encode the outcomes of all requests."""
    return pb.ScoreReply(
        results=[pb.Outcomes(outcomes=map(_encode_outcome, row)) for row in outcomes]
    )


def _encode_outcome(outcome: Outcome) -> pb.Outcome:
    if isinstance(outcome, Scored):
        replies = map(_encode_reply, outcome.replies)
        return pb.Outcome(
            scored=pb.Scored(value=outcome.value, parts=outcome.parts, replies=replies)
        )
    if isinstance(outcome, Skipped):
        return pb.Outcome(skipped=pb.Skipped(reason=printable(outcome.reason)))
    if isinstance(outcome, Invalid):
        return pb.Outcome(invalid=_encode_invalid(outcome))
    return pb.Outcome(failed=_encode_failed(outcome))


def decode_outcomes(message: pb.Outcomes) -> tuple[Outcome, ...]:
    """Decode the outcomes of one request."""
    return tuple(map(_decode_outcome, message.outcomes))


def _decode_outcome(message: pb.Outcome) -> Outcome:
    match message.WhichOneof("kind"):
        case "scored":
            scored = Scored(
                value=message.scored.value,
                parts=dict(message.scored.parts),
                replies=tuple(map(_decode_reply, message.scored.replies)),
            )
            if all(map(math.isfinite, (scored.value, *scored.parts.values()))):
                return scored
            return Invalid(
                reason=f"the score is {scored.value}, with parts {printable(str(scored.parts))}"
            )
        case "invalid":
            return _decode_invalid(message.invalid)
        case "failed":
            return _decode_failed(message.failed)
        case "skipped":
            return Skipped(reason=printable(message.skipped.reason))
    return Failed(reason="the service sent an outcome of no kind")


def encode_comparisons(comparisons: Sequence[Comparison]) -> pb.CompareReply:
    """Encode the comparisons of all requests."""
    return pb.CompareReply(results=map(_encode_comparison, comparisons))


def _encode_comparison(comparison: Comparison) -> pb.Comparison:
    if isinstance(comparison, Compared):
        win = comparison.win.ravel().tolist()
        source = _ENCODED_SOURCE[comparison.source]
        replies = [pb.JudgeReplies(replies=map(_encode_reply, each)) for each in comparison.replies]
        return pb.Comparison(compared=pb.Compared(win=win, source=source, replies=replies))
    if isinstance(comparison, Invalid):
        return pb.Comparison(invalid=_encode_invalid(comparison))
    return pb.Comparison(failed=_encode_failed(comparison))


def decode_comparison(message: pb.Comparison, completions: int) -> Comparison:
    """Decode the comparison of a request with so many completions.

    rayhf.scorer.comparisons.check_comparisons checks whether the matrix holds probabilities.
    """
    match message.WhichOneof("kind"):
        case "compared":
            return _decode_compared(message.compared, completions)
        case "invalid":
            return _decode_invalid(message.invalid)
        case "failed":
            return _decode_failed(message.failed)
    return Failed(reason="the service sent a comparison of no kind")


def _decode_compared(message: pb.Compared, completions: int) -> Comparison:
    source = _DECODED_SOURCE.get(message.source)
    if source is None:
        return Failed(reason=f"the service sent a matrix with source {message.source}")
    if len(message.win) != completions * completions:
        return Failed(
            reason=f"the service sent a matrix of {len(message.win)} numbers, "
            f"expected {completions} x {completions}"
        )
    win_KK = np.array(message.win, dtype=np.float64).reshape(completions, completions)
    replies = tuple(tuple(map(_decode_reply, each.replies)) for each in message.replies)
    return Compared(win=win_KK, source=source, replies=replies)


def _encode_reply(reply: JudgeReply) -> pb.JudgeReply:
    return pb.JudgeReply(
        text=reply.text, part=reply.part, against=reply.against, left_out=reply.left_out
    )


def _decode_reply(message: pb.JudgeReply) -> JudgeReply:
    """Decode a reply; rayhf.scorer.replies bounds it."""
    return JudgeReply(
        text=message.text,
        part=message.part,
        against=message.against if message.HasField("against") else None,
        left_out=message.left_out,
    )


def _encode_invalid(outcome: Invalid) -> pb.Invalid:
    return pb.Invalid(reason=printable(outcome.reason))


def _encode_failed(outcome: Failed) -> pb.Failed:
    return pb.Failed(reason=printable(outcome.reason), transient=outcome.transient)


def _decode_invalid(message: pb.Invalid) -> Invalid:
    return Invalid(reason=printable(message.reason))


def _decode_failed(message: pb.Failed) -> Failed:
    return Failed(reason=printable(message.reason), transient=message.transient)
