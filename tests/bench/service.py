"""Cost of a scorer as a service: `rayhf serve-scorer` against the same scorer in the caller's
process.

    python -m tests.bench.service [--seconds 4] [--record]

A rule scores completions of 300 characters, 8 to a prompt. One call is one batch. Prints a Markdown
table and writes it into RESULTS.md with --record; takes about a minute on two cores, which servers,
rules and callers share.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import trustme

from rayhf.config.service import NO_SECURITY, EndpointSecurity
from rayhf.scorer.build import build_scorer
from rayhf.scorer.grpc.client import GrpcScorerConfig
from rayhf.scorer.protocol import ScorerEngine, ScorerSetup
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import Completion, Prompt, Scored, ScoreRequest, float_array, token_array
from tests.bench.results import put_section

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "configs/tiny/serve_scorer_arithmetic.yaml"
RULE = RuleConfig(function="rayhf.tiny.arithmetic:correct")
BATCHES = (1, 16, 256)
SAMPLES = 8
LOAD = os.getloadavg()


def batch(completions: int, rng: random.Random) -> list[ScoreRequest]:
    """Make requests with so many completions in all."""
    requests = []
    for start in range(0, completions, SAMPLES):
        prompt = Prompt(
            prompt_id=f"p{start}",
            messages=({"role": "user", "content": "1 + 2 - 3 ="},),
            token_ids=(1,),
            reference_answer="0",
        )
        texts = [
            "".join(rng.choices("0123456789+-=\n", k=290)) + "\nAnswer: 0"
            for _ in range(min(SAMPLES, completions - start))
        ]
        batch_completions = tuple(
            Completion(
                prompt_id=prompt.prompt_id,
                index=index,
                seed=index,
                text=text,
                token_ids=token_array((1,)),
                logprobs=float_array((0.0,)),
                finish_reason="stop",
                policy_version=0,
            )
            for index, text in enumerate(texts)
        )
        requests.append(ScoreRequest(prompt=prompt, completions=batch_completions))
    return requests


def measure(
    engine: ScorerEngine, completions: int, *, callers: int, seconds: float
) -> tuple[float, float, float]:
    """Return calls per second over all callers, and p50 and p99 of a call in ms."""
    call_s: list[float] = []
    rng = random.Random(0)
    batches = [batch(completions, rng) for _ in range(4)]
    for warm in batches:
        engine.score(warm)
    end = time.perf_counter() + seconds

    def call() -> None:
        number = 0
        while (began := time.perf_counter()) < end:
            outcomes = engine.score(batches[number % len(batches)])
            call_s.append(time.perf_counter() - began)
            number += 1
            assert all(isinstance(outcome, Scored) for row in outcomes for outcome in row)

    began = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    cuts = statistics.quantiles(call_s, n=100)
    return len(call_s) / elapsed, 1e3 * cuts[49], 1e3 * cuts[98]


@contextmanager
def served(overrides: Sequence[str]) -> Iterator[str]:
    """Run `rayhf serve-scorer` as a process; yield its address."""
    serve = [sys.executable, "-m", "launch.cli", "serve-scorer", str(PRESET), "service.port=0"]
    process = subprocess.Popen(
        [*serve, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


def identities(folder: Path) -> tuple[list[str], EndpointSecurity]:
    """Make certificates and a token; return the server's overrides and the client's section."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        issued = ca.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.key").chmod(0o600)
    (folder / "token").write_text("0123456789abcdef0123456789abcdef")
    (folder / "token").chmod(0o600)
    server = f"certificate: {folder}/server.pem, key: {folder}/server.key"
    tls = f"{{{server}, client_ca: {folder}/ca.pem}}"
    security = EndpointSecurity(
        ca=folder / "ca.pem",
        certificate=folder / "client.pem",
        key=folder / "client.key",
        token_file=folder / "token",
    )
    return [f"service.tls={tls}", f"service.token_file={folder}/token"], security


def rows(seconds: float) -> Iterator[str]:
    """Yield the table, line by line as it is measured."""

    def build(entry: RuleConfig | GrpcScorerConfig) -> ScorerEngine:
        return build_scorer([entry], ScorerSetup(base=ROOT))

    def remote(
        address: str, security: EndpointSecurity = NO_SECURITY
    ) -> Callable[[], ScorerEngine]:
        return lambda: build(
            GrpcScorerConfig(
                endpoints=(address,), security=security, batch=max(BATCHES), in_flight=8
            )
        )

    yield "| completions per call | scorer | calls/s | completions/s | p50 ms | p99 ms |"
    yield "|--:|---|--:|--:|--:|--:|"
    with tempfile.TemporaryDirectory() as scratch:
        overrides, security = identities(Path(scratch))
        with served(()) as plain, served(overrides) as secured:
            cases: list[tuple[str, int, Callable[[], ScorerEngine]]] = [
                ("in the caller's process", 1, lambda: build(RULE)),
                ("service, one caller", 1, remote(plain)),
                ("service, mutual TLS and token, one caller", 1, remote(secured, security)),
                ("service, eight callers at once", 8, remote(plain)),
            ]
            for completions in BATCHES:
                for name, callers, make in cases:
                    engine = make()
                    rate, p50, p99 = measure(engine, completions, callers=callers, seconds=seconds)
                    engine.close()
                    rates = f"{rate:,.0f} | {rate * completions:,.0f}"
                    yield f"| {completions} | {name} | {rates} | {p50:.2f} | {p99:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per cell")
    parser.add_argument(
        "--record", action="store_true", help="write the table into tests/bench/RESULTS.md"
    )
    options = parser.parse_args()
    began = datetime.now(UTC)
    table = []
    for row in rows(options.seconds):
        print(row, flush=True)
        table.append(row)
    machine = f"{os.cpu_count()} cores, load before it {LOAD[0]:.1f}"
    setting = (
        f"`python -m tests.bench.service`, {began:%Y-%m-%d %H:%M} UTC, {machine}. "
        f"A rule scores completions of 300 characters, {SAMPLES} to a prompt; servers, rules and "
        "callers share the cores."
    )
    print(f"\n{setting}")
    if options.record:
        put_section("## Scorer service", "\n".join([setting, "", *table]))


if __name__ == "__main__":
    main()
