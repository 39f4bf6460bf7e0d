"""Control of a campaign elsewhere: the operator commands over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

from rayhf.config.service import EndpointSecurity
from rayhf.control import campaign_pb2 as pb
from rayhf.control import campaign_pb2_grpc
from rayhf.control.commands import Start, check_count, checked_prompts
from rayhf.control.questions import UncertainCompletion, UncertainPair
from rayhf.control.status import RunState, Status
from rayhf.data.conversations import parse_answer, parse_messages
from rayhf.run_dir.inbox import LABEL_KEYS, check_submission
from rayhf.run_dir.progress import Event
from rayhf.service import chat_pb2
from rayhf.service.client import Client

TIMEOUT_S = 30.0
_WATCH_S = 7 * 24 * 3600.0
Request = TypeVar("Request")


class GrpcControl:
    """Control over gRPC, with the errors of FileControl.

    Raises also UnreachableError and ServiceError.
    """

    def __init__(self, endpoint: str, security: EndpointSecurity, *, base: Path) -> None:
        self._client = Client(endpoint, security, base=base)
        self._stub = campaign_pb2_grpc.CampaignStub(self._client.channel)

    def status(self) -> Status:
        """Return the campaign's status."""
        reply: pb.StatusReply = self._client.call(
            self._stub.Status, pb.StatusRequest(), timeout_s=TIMEOUT_S
        )
        return Status(
            run=Path(reply.run),
            state=cast(RunState, reply.state),
            reason=reply.reason,
            advice=reply.advice,
            holder=reply.holder,
            epoch=reply.epoch,
            algorithm=reply.algorithm,
            takes_labels=reply.takes_labels,
            takes_thumbs=reply.takes_thumbs,
            iteration=reply.iteration,
            iterations=reply.iterations,
            phase=reply.phase,
            progress_age_s=reply.progress_age_s if reply.HasField("progress_age_s") else None,
            eta_s=reply.eta_s if reply.HasField("eta_s") else None,
            versions=dict(reply.versions),
            commit=reply.commit,
            health=dict(reply.health),
            faults=tuple(reply.faults),
            fault_count=reply.fault_count,
            models=dict(reply.models),
        )

    def watch(self, is_active: Callable[[], bool]) -> Iterator[Event]:
        """Yield the last events, then new ones as they come."""
        for event in self._client.stream(self._stub.Watch, pb.WatchRequest(), timeout_s=_WATCH_S):
            if not is_active():
                return
            yield Event(time=event.time, epoch=event.epoch, kind=event.kind, message=event.message)

    def request(self, request: Literal["pause", "stop"]) -> str:
        """Request that the campaign pauses or stops after its current iteration."""
        if request == "pause":
            return self._message(self._stub.Pause, pb.PauseRequest())
        return self._message(self._stub.Stop, pb.StopRequest())

    def unpause(self, *, start: Start = "unhealthy") -> str:
        """Resume a paused campaign."""
        request = pb.UnpauseRequest(from_healthy=start == "healthy")
        return self._message(self._stub.Unpause, request)

    def add_prompts(self, rows: Sequence[Mapping[str, object]], *, source: str) -> str:
        """Submit prompts for the next iteration."""
        prompts = []
        for number, row in enumerate(checked_prompts(rows), start=1):
            messages = parse_messages(row, f"prompts: row {number}")
            answer = parse_answer(row, f"prompts: row {number}")
            prompts.append(pb.NewPrompt(messages=_messages(messages), answer=answer))
        return self._message(
            self._stub.AddPrompts, pb.AddPromptsRequest(prompts=prompts, source=source)
        )

    def uncertain_pairs(self, count: int) -> Sequence[UncertainPair]:
        """Return the pairs of completions that the scorers are least certain about."""
        reply: pb.PairsReply = self._client.call(
            self._stub.Pairs, pb.PairsRequest(count=count), timeout_s=TIMEOUT_S
        )
        return [
            UncertainPair(
                pair_id=pair.pair_id,
                messages=tuple({"role": m.role, "content": m.content} for m in pair.messages),
                first=pair.first,
                second=pair.second,
                certainty=pair.certainty,
            )
            for pair in reply.pairs
        ]

    def uncertain_completions(self, count: int) -> Sequence[UncertainCompletion]:
        """Return the single completions that the scorers are least certain about."""
        reply: pb.CompletionsReply = self._client.call(
            self._stub.Completions, pb.CompletionsRequest(count=count), timeout_s=TIMEOUT_S
        )
        return [
            UncertainCompletion(
                completion_id=each.completion_id,
                messages=tuple({"role": m.role, "content": m.content} for m in each.messages),
                completion=each.completion,
                certainty=each.certainty,
            )
            for each in reply.completions
        ]

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        """Submit labels of pairs or of single completions for the next iteration."""
        check_count(labels, "labels")
        rows = []
        for number, label in enumerate(labels, start=1):
            row = check_submission(label, "labels", f"labels: row {number}")
            given = {key: str(row[key]) for key in LABEL_KEYS if key in row}
            rows.append(pb.CompletionLabel(**given))
        return self._message(self._stub.Label, pb.LabelRequest(labels=rows, source=source))

    def _message(self, method: Callable[..., pb.Done], request: Request) -> str:
        return self._client.call(method, request, timeout_s=TIMEOUT_S).message


def _messages(messages: Sequence[Mapping[str, str]]) -> list[chat_pb2.Message]:
    return [chat_pb2.Message(role=m["role"], content=m["content"]) for m in messages]
