"""The campaign's control service: each gRPC call is one operator command on one run directory.

In: calls on the server's threads. Out: the replies of FileControl. It may serve inside `rayhf run`,
or in a process of its own for a campaign that is not running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import grpc

from rayhf.config.service import ServiceConfig
from rayhf.control import campaign_pb2 as pb
from rayhf.control import campaign_pb2_grpc
from rayhf.control.commands import FileControl, Start
from rayhf.errors import QuotaError
from rayhf.run_dir.inbox import LABEL_KEYS
from rayhf.service import chat_pb2
from rayhf.service.client import printable
from rayhf.service.server import Server, error_statuses
from rayhf.types import Message

SERVICE = "rayhf.v1.Campaign"
_MAX_PAIRS = 1000
BURST_BYTES = 16 << 20
_ROW_BYTES = 200
"""What the inbox adds to a row."""


def serve_campaign(run: Path, config: ServiceConfig, *, base: Path) -> Server:
    """Start a server for the campaign in `run`; the caller stops it. Raises ConfigError as Server.

    Relative paths in `config` start at `base`.
    """
    register = partial(
        campaign_pb2_grpc.add_CampaignServicer_to_server, CampaignService(FileControl(run))
    )
    server = Server(config, {SERVICE: register}, base=base, urgent=(f"/{SERVICE}/Stop",))
    server.start()
    return server


class CampaignService(campaign_pb2_grpc.CampaignServicer):  # type: ignore[misc]
    """The calls of campaign.proto, one method each."""

    def __init__(self, control: FileControl) -> None:
        self._control = control
        self._budget = ByteBudget()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        with error_statuses(context):
            status = self._control.status()
        return pb.StatusReply(
            run=str(status.run),
            state=status.state,
            reason=status.reason,
            advice=status.advice,
            holder=status.holder,
            epoch=status.epoch,
            algorithm=status.algorithm,
            takes_labels=status.takes_labels,
            takes_thumbs=status.takes_thumbs,
            iteration=status.iteration,
            iterations=status.iterations,
            phase=status.phase,
            progress_age_s=status.progress_age_s,
            eta_s=status.eta_s,
            versions=status.versions,
            commit=status.commit,
            health=status.health,
            faults=status.faults,
            fault_count=status.fault_count,
            models=status.models,
        )

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        with error_statuses(context):
            for event in self._control.watch(context.is_active):
                yield pb.Event(
                    time=event.time, epoch=event.epoch, kind=event.kind, message=event.message
                )

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.Done:
        with error_statuses(context):
            return pb.Done(message=self._control.request("pause"))

    def Unpause(self, request: pb.UnpauseRequest, context: grpc.ServicerContext) -> pb.Done:
        start: Start = "healthy" if request.from_healthy else "unhealthy"
        with error_statuses(context):
            return pb.Done(message=self._control.unpause(start=start))

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.Done:
        with error_statuses(context):
            return pb.Done(message=self._control.request("stop"))

    def AddPrompts(self, request: pb.AddPromptsRequest, context: grpc.ServicerContext) -> pb.Done:
        rows: list[dict[str, object]] = []
        with error_statuses(context):
            self._budget.spend(request.ByteSize() + _ROW_BYTES * len(request.prompts))
        for prompt in request.prompts:
            row: dict[str, object] = {
                "messages": [{"role": m.role, "content": m.content} for m in prompt.messages]
            }
            if prompt.HasField("answer"):
                row["answer"] = prompt.answer
            rows.append(row)
        source = _source(request.source, context)
        with error_statuses(context):
            return pb.Done(message=self._control.add_prompts(rows, source=source))

    def Pairs(self, request: pb.PairsRequest, context: grpc.ServicerContext) -> pb.PairsReply:
        with error_statuses(context):
            pairs = self._control.uncertain_pairs(min(request.count, _MAX_PAIRS))
        return pb.PairsReply(
            pairs=[
                pb.Pair(
                    pair_id=pair.pair_id,
                    messages=_messages(pair.messages),
                    first=pair.first,
                    second=pair.second,
                    certainty=pair.certainty,
                )
                for pair in pairs
            ]
        )

    def Completions(
        self, request: pb.CompletionsRequest, context: grpc.ServicerContext
    ) -> pb.CompletionsReply:
        with error_statuses(context):
            completions = self._control.uncertain_completions(min(request.count, _MAX_PAIRS))
        return pb.CompletionsReply(
            completions=[
                pb.SingleCompletion(
                    completion_id=each.completion_id,
                    messages=_messages(each.messages),
                    completion=each.completion,
                    certainty=each.certainty,
                )
                for each in completions
            ]
        )

    def Label(self, request: pb.LabelRequest, context: grpc.ServicerContext) -> pb.Done:
        with error_statuses(context):
            self._budget.spend(request.ByteSize() + _ROW_BYTES * len(request.labels))
        rows = [
            {name: getattr(label, name) for name in LABEL_KEYS if getattr(label, name)}
            for label in request.labels
        ]
        source = _source(request.source, context)
        with error_statuses(context):
            return pb.Done(message=self._control.label(rows, source=source))


def _messages(messages: Sequence[Message]) -> list[chat_pb2.Message]:
    return [chat_pb2.Message(role=m["role"], content=m["content"]) for m in messages]


class ByteBudget:
    """Limit on what all clients together hand in: a burst, and as much again per minute."""

    def __init__(self, burst: int = BURST_BYTES) -> None:
        self._burst = burst
        self._left = float(burst)
        self._time = time.monotonic()
        self._lock = threading.Lock()

    def spend(self, size: int) -> None:
        """Count a submission. Raises QuotaError where it has to wait."""
        cost = min(size, self._burst)
        with self._lock:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._time) * self._burst / 60)
            self._time = now
            if cost > self._left:
                wait_s = (cost - self._left) * 60 / self._burst
                raise QuotaError(
                    f"{size:,} bytes now are too many: the campaign accepts "
                    f"{self._burst >> 20} MiB per minute; try again in {wait_s:.0f} s"
                )
            self._left -= cost


def _source(name: str, context: grpc.ServicerContext) -> str:
    """Return who submits: the name the client gives, and the host it connects from.

    An annotator is known by it, so it has no port, which changes with each connection.
    """
    host = str(context.peer()).rpartition(":")[0]
    return f"{printable(name)[:100] or 'unnamed'} at {host}"
