"""Scorer services in this process: real servers on loopback over engines of a few lines."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from rayhf.config.scorers import GrpcScorerConfig
from rayhf.config.service import ServiceConfig
from rayhf.scorer.grpc.server import scorer_server
from rayhf.types import Compared, Completion, Prompt, Scored, ScoreRequest

HERE = Path()


def request(*texts, number=0, answer="3", finish_reason="stop"):
    """Return a request with one completion per text."""
    prompt = Prompt(
        prompt_id=f"p{number}",
        messages=(
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": f"{number} + 3?"},
        ),
        token_ids=(1,),
        answer=answer,
    )
    completions = tuple(
        Completion(
            prompt_id=prompt.prompt_id,
            index=index,
            seed=index,
            text=text,
            token_ids=(1,),
            logprobs=(0.0,),
            finish_reason=finish_reason,
            policy_version=0,
        )
        for index, text in enumerate(texts)
    )
    return ScoreRequest(prompt=prompt, completions=completions)


class Lengths:
    """A scorer whose score is the text's length; each call takes `wait_s`."""

    def __init__(self, wait_s=0.0):
        self.wait_s = wait_s
        self.calls = 0
        self.called = threading.Event()

    def score(self, requests):
        self.calls += 1
        self.called.set()
        time.sleep(self.wait_s)
        return [tuple(Scored(value=float(len(c.text))) for c in r.completions) for r in requests]

    def compare(self, requests):
        self.calls += 1
        return [
            Compared(win=np.full((len(r.completions),) * 2, 0.5), source="pairwise")
            for r in requests
        ]

    def close(self): ...


def serve(
    engine, *, names=("lengths",), pairwise=False, base=HERE, broken=lambda error: None, **settings
):
    """Start a server; the caller stops it."""
    config = ServiceConfig(**{"grace_s": 5.0, **settings})
    server = scorer_server(engine, config, names=names, pairwise=pairwise, base=base, broken=broken)
    server.start()
    return server


def port_of(server):
    return int(server.address.rpartition(":")[2])


def remote(*servers, **changes):
    """Return the config entry of a scorer behind these servers."""
    return GrpcScorerConfig(
        endpoints=tuple(server.address for server in servers), **{"timeout_s": 5.0, **changes}
    )


def scores(engine, requests):
    return [outcome.value for row in engine.score(requests) for outcome in row]
