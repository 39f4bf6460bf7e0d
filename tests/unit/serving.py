"""Scorer services in this process: real servers on loopback, over engines of a few lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import score_requests

from rayhf.config.service import ServiceConfig
from rayhf.scorer.grpc.client import GrpcScorerConfig
from rayhf.scorer.grpc.server import scorer_server
from rayhf.scorer.protocol import ScorerEngine, ScorerSetup
from rayhf.service.server import Server
from rayhf.types import Compared, Comparison, Outcome, Scored, ScoreRequest

HERE = Path()
SETUP = ScorerSetup(base=HERE)


def request(
    *texts: str,
    number: int = 0,
    answer: str = "3",
    finish_reason: Literal["stop", "length"] = "stop",
) -> ScoreRequest:
    """Completions of prompt `number`, a conversation of two messages."""
    return score_requests.request(
        *texts,
        prompt_id=f"p{number}",
        messages=(
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": f"{number} + 3?"},
        ),
        answer=answer,
        finish_reason=finish_reason,
    )


class Lengths:
    """A score is the text's length; a call takes `wait_s`."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        self.calls = 0
        self.called = threading.Event()

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        self.calls += 1
        self.called.set()
        time.sleep(self.wait_s)
        return [tuple(Scored(value=float(len(c.text))) for c in r.completions) for r in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        self.calls += 1
        return [
            Compared(win=np.full((len(r.completions),) * 2, 0.5), source="pairwise")
            for r in requests
        ]

    def close(self) -> None: ...


def serve(
    engine: ScorerEngine,
    *,
    names: Sequence[str] = ("lengths",),
    pairwise: bool = False,
    base: Path = HERE,
    broken: Callable[[Exception], None] = lambda error: None,
    **settings: Any,
) -> Server:
    """A running server; the caller stops it."""
    config = ServiceConfig(**{"grace_s": 5.0, **settings})
    server = scorer_server(engine, config, names=names, pairwise=pairwise, base=base, broken=broken)
    server.start()
    return server


def port_of(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


def grpc_entry(*servers: Server, **changes: Any) -> GrpcScorerConfig:
    """The config of a scorer that calls these servers."""
    return GrpcScorerConfig(
        endpoints=tuple(server.address for server in servers), **{"timeout_s": 5.0, **changes}
    )


def scores(engine: ScorerEngine, requests: Sequence[ScoreRequest]) -> list[float]:
    outcomes = [outcome for row in engine.score(requests) for outcome in row]
    assert all(isinstance(outcome, Scored) for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes if isinstance(outcome, Scored)]
