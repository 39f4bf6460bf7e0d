"""A campaign elsewhere, under the same verbs as one whose run directory is at hand
(rayhf.control.commands.Control)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rayhf.config.service import EndpointSecurity
from rayhf.control import campaign_pb2 as pb
from rayhf.control import campaign_pb2_grpc
from rayhf.control.labels import UncertainPair
from rayhf.control.status import State, Status
from rayhf.data.prompts import parse_messages
from rayhf.scorer.grpc.scorer_pb2 import Message
from rayhf.service.client import Client

TIMEOUT_S = 30.0
_WATCH_S = 7 * 24 * 3600.0


class GrpcControl:
    """Control over gRPC. Raises UnreachableError, ServiceError, and as ConfigError what the other
    end refused."""

    def __init__(self, endpoint: str, security: EndpointSecurity, *, base: Path) -> None:
        self._client = Client(endpoint, security, base=base)
        self._stub = campaign_pb2_grpc.CampaignStub(self._client.channel)

    def status(self) -> Status:
        reply = self._call(self._stub.Status, pb.StatusRequest())
        return Status(
            run=Path(reply.run),
            state=cast(State, reply.state),
            reason=reply.reason,
            advice=reply.advice,
            holder=reply.holder,
            epoch=reply.epoch,
            algorithm=reply.algorithm,
            takes_labels=reply.takes_labels,
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
        )

    def watch(self, going: Callable[[], bool]) -> Iterator[Mapping[str, Any]]:
        for event in self._client.stream(self._stub.Watch, pb.WatchRequest(), timeout_s=_WATCH_S):
            if not going():
                return
            yield {
                "time": event.time,
                "epoch": event.epoch,
                "kind": event.kind,
                "message": event.message,
            }

    def ask(self, wanted: Literal["pause", "stop"]) -> str:
        if wanted == "pause":
            return self._done(self._stub.Pause, pb.PauseRequest())
        return self._done(self._stub.Stop, pb.StopRequest())

    def unpause(self) -> str:
        return self._done(self._stub.Unpause, pb.UnpauseRequest())

    def add_prompts(self, rows: Sequence[Mapping[str, Any]], *, source: str) -> str:
        prompts = []
        for number, row in enumerate(rows, start=1):
            messages = parse_messages(row, f"prompts: row {number}")
            answer = None if row.get("answer") is None else str(row["answer"])
            prompts.append(pb.NewPrompt(messages=_messages(messages), answer=answer))
        return self._done(
            self._stub.AddPrompts, pb.AddPromptsRequest(prompts=prompts, source=source)
        )

    def pairs(self, count: int) -> list[UncertainPair]:
        reply = self._call(self._stub.Pairs, pb.PairsRequest(count=count))
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

    def label(self, labels: Sequence[Mapping[str, str]], *, source: str) -> str:
        verdicts = [pb.Verdict(pair_id=row["pair_id"], verdict=row["verdict"]) for row in labels]
        return self._done(self._stub.Label, pb.LabelRequest(verdicts=verdicts, source=source))

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        return self._client.call(method, request, timeout_s=TIMEOUT_S)

    def _done(self, method: Callable[..., Any], request: Any) -> str:
        return str(self._call(method, request).message)


def _messages(messages: Sequence[Mapping[str, str]]) -> list[Message]:
    return [Message(role=m["role"], content=m["content"]) for m in messages]
