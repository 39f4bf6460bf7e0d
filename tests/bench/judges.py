"""A judge behind a real `vllm serve`: requests and tokens per second by requests in flight.

    python -m tests.bench.judges [--questions 256] [--record]

The tiny judge of tests/judge_server.py answers in four tokens, so that what is measured is the way
to the server and back, and the server's own overhead. Server and caller share the machine. Prints a
Markdown table and writes it into RESULTS.md with --record; takes about two minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rayhf.scorer.build import build_scorer
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Completion, Prompt, Scored, ScoreRequest, float_array, token_array
from tests.bench.results import put_section
from tests.judge_server import QUESTION, Served, make_judge, served

IN_FLIGHT = (1, 8, 32)
KEY = "bench"
LOAD = os.getloadavg()


def requests_of(number: int) -> list[ScoreRequest]:
    """Return that many different questions, eight completions to a prompt."""
    words = ("plain", "hm", "yes", "no")
    texts = [
        f"plain {' '.join(words[index // 4**place % 4] for place in range(6))} good"
        for index in range(number)
    ]
    requests = []
    for start in range(0, number, 8):
        prompt = Prompt(
            prompt_id=f"p{start}", messages=({"role": "user", "content": "why"},), token_ids=(1,)
        )
        completions = tuple(
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
            for index, text in enumerate(texts[start : start + 8])
        )
        requests.append(ScoreRequest(prompt=prompt, completions=completions))
    return requests


def measure(server: Served, requests: list[ScoreRequest], in_flight: int) -> str:
    """Return one row of the table."""
    endpoint = {
        "url": server.url,
        "model": "judge",
        "api_key_env": "BENCH_KEY",
        "concurrency": in_flight,
        "structured": "off",
    }
    config = JudgeConfig.model_validate(
        {"endpoint": endpoint, "max_tokens": 8, "template": QUESTION}
    )
    judge = build_scorer([config], ScorerSetup(base=Path()))
    try:
        judge.score(requests[:2])  # connections, and the server's first pass
        judge.take_counts()
        started = time.perf_counter()
        outcomes = judge.score(requests)
        seconds = time.perf_counter() - started
        counts = judge.take_counts()
    finally:
        judge.close()
    scored = sum(isinstance(outcome, Scored) for row in outcomes for outcome in row)
    sent = counts["judge/requests"]
    tokens = counts["judge/prompt_tokens"] + counts["judge/completion_tokens"]
    return (
        f"| {in_flight} | {sent / seconds:,.0f} | {tokens / seconds:,.0f} "
        f"| {1000 * seconds * in_flight / sent:,.1f} | {scored} of {sent:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    os.environ["BENCH_KEY"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        directory = make_judge(Path(folder) / "judge")
        with served(directory, name="judge", key=KEY) as server:
            requests = requests_of(arguments.questions)
            rows = [measure(server, requests, in_flight) for in_flight in IN_FLIGHT]
    table = "\n".join(
        [
            f"`python -m tests.bench.judges`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
            f"{os.cpu_count()} cores, load before it {LOAD[0]:.1f}. A tiny judge behind "
            "`vllm serve` on CPU; prompts of about 25 tokens, verdicts of 4; server and caller "
            "share the cores.",
            "",
            "| requests in flight | requests/s | tokens/s | ms per request | verdicts |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
    print(table)
    if arguments.record:
        put_section("## Judge over HTTP", table)


if __name__ == "__main__":
    main()
