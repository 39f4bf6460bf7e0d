"""A campaign's control over gRPC: every call is one verb of rayhf.control.commands, on one run
directory.

In: calls on the server's threads. Out: what FileControl says. It may serve from within `rayhf
run`, or on its own for a campaign that is not running.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from rayhf.config.service import ServiceConfig
from rayhf.control import campaign_pb2 as pb
from rayhf.control import campaign_pb2_grpc
from rayhf.control.commands import FileControl
from rayhf.scorer.grpc.scorer_pb2 import Message
from rayhf.service.server import Server, refusals

SERVICE = "rayhf.v1.Campaign"
_MOST_PAIRS = 1000


def serve_campaign(run: Path, config: ServiceConfig, *, base: Path) -> Server:
    """A server that is listening and serving; the caller stops it. Raises ConfigError as Server."""
    register = partial(
        campaign_pb2_grpc.add_CampaignServicer_to_server, CampaignService(FileControl(run))
    )
    server = Server(config, {SERVICE: register}, base=base)
    server.start()
    return server


class CampaignService(campaign_pb2_grpc.CampaignServicer):  # type: ignore[misc]
    """One method per call of campaign.proto."""

    def __init__(self, control: FileControl) -> None:
        self._control = control

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        with refusals(context):
            found = self._control.status()
        return pb.StatusReply(
            run=str(found.run),
            state=found.state,
            reason=found.reason,
            advice=found.advice,
            holder=found.holder,
            epoch=found.epoch,
            algorithm=found.algorithm,
            takes_labels=found.takes_labels,
            iteration=found.iteration,
            iterations=found.iterations,
            phase=found.phase,
            progress_age_s=found.progress_age_s,
            eta_s=found.eta_s,
            versions=found.versions,
            commit=found.commit,
            health=found.health,
            faults=found.faults,
            fault_count=found.fault_count,
        )

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        with refusals(context):
            for event in self._control.watch(context.is_active):
                yield pb.Event(
                    time=event["time"],
                    epoch=event["epoch"],
                    kind=event["kind"],
                    message=event["message"],
                )

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.Done:
        with refusals(context):
            return pb.Done(message=self._control.ask("pause"))

    def Unpause(self, request: pb.UnpauseRequest, context: grpc.ServicerContext) -> pb.Done:
        with refusals(context):
            return pb.Done(message=self._control.unpause())

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.Done:
        with refusals(context):
            return pb.Done(message=self._control.ask("stop"))

    def AddPrompts(self, request: pb.AddPromptsRequest, context: grpc.ServicerContext) -> pb.Done:
        rows = []
        for prompt in request.prompts:
            row: dict[str, Any] = {
                "messages": [{"role": m.role, "content": m.content} for m in prompt.messages]
            }
            rows.append(row | ({"answer": prompt.answer} if prompt.HasField("answer") else {}))
        with refusals(context):
            return pb.Done(
                message=self._control.add_prompts(rows, source=_source(request.source, context))
            )

    def Pairs(self, request: pb.PairsRequest, context: grpc.ServicerContext) -> pb.PairsReply:
        with refusals(context):
            found = self._control.pairs(min(request.count, _MOST_PAIRS))
        return pb.PairsReply(
            pairs=[
                pb.Pair(
                    pair_id=pair.pair_id,
                    messages=[Message(role=m["role"], content=m["content"]) for m in pair.messages],
                    first=pair.first,
                    second=pair.second,
                    certainty=pair.certainty,
                )
                for pair in found
            ]
        )

    def Label(self, request: pb.LabelRequest, context: grpc.ServicerContext) -> pb.Done:
        labels = [
            {"pair_id": verdict.pair_id, "verdict": verdict.verdict} for verdict in request.verdicts
        ]
        with refusals(context):
            return pb.Done(
                message=self._control.label(labels, source=_source(request.source, context))
            )


def _source(said: str, context: grpc.ServicerContext) -> str:
    """Who hands something in: what they say of themselves, and where from."""
    return f"{said[:100] or 'unnamed'} at {context.peer()}"
