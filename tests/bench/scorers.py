"""Rules under load: seconds for 4,096 completions of 512 prompts, against the ideal.

    python -m tests.bench.scorers [--record]

The rule waits 50 ms, as a plain function in 16 processes, as a function of lists and as a coroutine
function; through the scorer's engine, in this process. Takes about a minute.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rayhf.scorer.build import build_scorer
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import Completion, Prompt, Scored, ScoreRequest, float_array, token_array
from tests.bench.results import put_section

COMPLETIONS = 4096
PER_PROMPT = 8
WAIT_S = 0.05
RULES = f"""
import asyncio, time

def wait(completion):
    time.sleep({WAIT_S})
    return 1.0

async def wait_async(completion):
    await asyncio.sleep({WAIT_S})
    return 1.0

def wait_trl(completions, **kwargs):
    time.sleep({WAIT_S} * len(completions))
    return [1.0] * len(completions)
"""


def requests(completions: int) -> list[ScoreRequest]:
    """Return requests of PER_PROMPT completions each."""
    made = []
    for number in range(completions // PER_PROMPT):
        prompt = Prompt(
            prompt_id=str(number),
            messages=({"role": "user", "content": f"question {number}"},),
            token_ids=(1,),
        )
        made.append(
            ScoreRequest(
                prompt=prompt,
                completions=tuple(
                    Completion(
                        prompt_id=str(number),
                        index=index,
                        seed=index,
                        text=f"answer {index}",
                        token_ids=token_array((1,)),
                        logprobs=float_array((0.0,)),
                        finish_reason="stop",
                        policy_version=0,
                    )
                    for index in range(PER_PROMPT)
                ),
            )
        )
    return made


def _measure(function: str, workers: int, concurrency: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "waiting.py").write_text(RULES)
        entry = RuleConfig(
            function=f"waiting:{function}", workers=workers, concurrency=concurrency, batch=8
        )
        scorer = build_scorer([entry], ScorerSetup(base=Path(folder)))
        try:
            scorer.score(requests(workers * PER_PROMPT))  # starts the processes
            load = requests(COMPLETIONS)
            started = time.monotonic()
            rows = scorer.score(load)
            seconds = time.monotonic() - started
        finally:
            scorer.close()
    assert all(isinstance(outcome, Scored) for row in rows for outcome in row)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    lines = [
        f"`python -m tests.bench.scorers`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"{os.cpu_count()} cores. {COMPLETIONS} completions, a rule that waits "
        f"{WAIT_S * 1000:g} ms.",
        "",
        "| function | workers | concurrency | seconds | ideal | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for function, workers, concurrency in (
        ("wait", 16, 1),
        ("wait_trl", 16, 1),
        ("wait_async", 1, 16),
        ("wait_async", 4, 64),
    ):
        ideal = COMPLETIONS * WAIT_S / (workers * concurrency)
        seconds = _measure(function, workers, concurrency)
        lines.append(
            f"| {function} | {workers} | {concurrency} | {seconds:.2f} | {ideal:.2f} "
            f"| {seconds / ideal:.2f} |"
        )
    print("\n".join(lines))
    if record:
        put_section("## Rules under load", "\n".join(lines))


if __name__ == "__main__":
    main()
