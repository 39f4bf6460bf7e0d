"""Learner time of padded, packed and shared rows, side by side.

    python -m tests.bench.packing [--record] [--repetitions N] [--threads N] [--case NAME ...]

A random llama of 33 M parameters in float32 takes optimizer steps on the CPU: three learners in one
process, in turns. Times are CPU seconds of a whole step, which other work on the machine changes
little.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayhf.config.schema import LearnerConfig, Packing
from rayhf.learner.packing import plan_micro_batches
from rayhf.losses.base import Totals
from rayhf.losses.sft import SFTLoss
from rayhf.models.packing import distinct_tokens
from rayhf.types import Example, Row, token_array
from tests.bench.random_llama import Size, write_model
from tests.bench.results import put_section

if TYPE_CHECKING:
    from rayhf.learner.engine import LearnerEngine

SIZE = Size(
    hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=4, vocabulary=8192, tied=False
)
BUDGET = 2560
"""Tokens of a micro-batch: 8 padded rows of 320."""
PACKINGS: dict[Packing, str] = {"off": "padded", "rows": "packed", "tree": "shared prefixes"}


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(SIZE.vocabulary) for _ in range(count))


def _row(prompt_id: str, prompt: Sequence[int], response: Sequence[int]) -> Row:
    return Row(
        prompt_id=prompt_id,
        sample=0,
        prompt_ids=token_array(prompt),
        response_ids=token_array(response),
    )


def samples(rng: random.Random) -> list[Example]:
    """Return 2 prompts of 256 tokens with 8 samples of 64."""
    prompts = [_ids(rng, 256) for _ in range(2)]
    return [
        Example(rows=(_row(f"p{p}", prompt, _ids(rng, 64)),))
        for p, prompt in enumerate(prompts)
        for _ in range(8)
    ]


def pairs(rng: random.Random) -> list[Example]:
    """Return 12 pairs: a prompt of 128 tokens and two responses of 16 to 112."""
    examples = []
    for p in range(12):
        prompt = _ids(rng, 128)
        rows = [_row(f"p{p}", prompt, _ids(rng, rng.randint(16, 112))) for _ in range(2)]
        examples.append(Example(rows=tuple(rows)))
    return examples


def tree(rng: random.Random) -> list[Example]:
    """Return the step pairs of 2 search trees: 64 tokens, 3 levels of 2 steps with 24 tokens."""
    examples = []
    for p in range(2):
        contexts = [_ids(rng, 64)]
        for _ in range(3):
            steps = [(_ids(rng, 24), _ids(rng, 24)) for _ in contexts]
            for context, both in zip(contexts, steps, strict=True):
                rows = [_row(f"p{p}", context, step) for step in both]
                examples.append(Example(rows=tuple(rows)))
            contexts = [
                context + step
                for context, both in zip(contexts, steps, strict=True)
                for step in both
            ]
    return examples


def conversations(rng: random.Random) -> list[Example]:
    """Return 24 conversations that share nothing: 16 to 512 tokens, most of them short."""
    lengths = [min(512, 16 + int(rng.expovariate(1 / 120))) for _ in range(24)]
    return [
        Example(rows=(_row(f"p{p}", _ids(rng, n // 4), _ids(rng, n - n // 4)),))
        for p, n in enumerate(lengths)
    ]


CASES: dict[str, Callable[[random.Random], list[Example]]] = {
    "8 samples x 64 tokens, prompt 256": samples,
    "pairs, prompt 128": pairs,
    "step pairs of search trees": tree,
    "conversations (sft)": conversations,
}


def start(model: Path, packing: Packing, threads: int) -> LearnerEngine:
    from rayhf.learner.engine import LearnerEngine

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = ("127.0.0.1", int(probe.getsockname()[1]))
    config = LearnerConfig(
        dtype="float32", zero_stage=0, token_budget=BUDGET, packing=packing, threads=threads
    )
    return LearnerEngine(model, config, lr=1e-5, total_steps=1000, master=master)


def step(engine: LearnerEngine, examples: Sequence[Example]) -> tuple[float, dict[str, float]]:
    """Take one optimizer step; return its CPU seconds and metrics."""
    (micros,) = plan_micro_batches(
        [example.rows for example in examples], packing=engine.packing, ranks=1, budget=BUDGET
    )
    rows = [row for example in examples for row in example.rows]
    totals = Totals(
        tokens=float(sum(len(row.response_ids) for row in rows)),
        rows=float(len(rows)),
        examples=float(len(examples)),
    )
    batches = [[examples[i] for i in micro] for micro in micros]
    began = time.process_time()
    metrics = engine.step(batches, totals, SFTLoss(), 1.0)
    return time.process_time() - began, metrics


def measure(
    engines: dict[Packing, LearnerEngine], name: str, repetitions: int
) -> tuple[str, dict[Packing, list[float]]]:
    """Return a line of the table and the seconds of every repetition."""
    examples = CASES[name](random.Random(0))
    seconds: dict[Packing, list[float]] = {packing: [] for packing in engines}
    fed: dict[Packing, float] = {}
    loss: dict[Packing, float] = {}
    for repetition in range(repetitions + 1):
        for packing, engine in engines.items():
            spent, metrics = step(engine, examples)
            fed[packing] = metrics["learner/tokens_fed"]
            loss[packing] = metrics["learner/loss"]
            if repetition:  # the first one warms up
                seconds[packing].append(spent)
    np.testing.assert_allclose(list(loss.values()), loss["off"], rtol=1e-4)
    distinct = distinct_tokens([row for example in examples for row in example.rows])
    median = {packing: statistics.median(times) for packing, times in seconds.items()}
    cells = [
        f"{median[p]:.2f} ({min(seconds[p]):.2f}-{max(seconds[p]):.2f}), {fed[p]:,.0f}"
        for p in engines
    ]
    ratio = f"{median['tree'] / median['off']:.2f}"
    return f"| {name} | {' | '.join(cells)} | {ratio} | {fed['tree'] / distinct:.2f} |", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write into tests/bench/RESULTS.md")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=list(CASES), action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_model(SIZE, Path(directory), seed=0, device="cpu")
        engines = {p: start(Path(directory), p, options.threads) for p in PACKINGS}
        lines = []
        for name in options.case or CASES:
            line, _ = measure(engines, name, options.repetitions)
            print(line, flush=True)
            lines.append(line)
    titles = [f"{title}: s, tokens fed" for title in PACKINGS.values()]
    header = f"| step | {' | '.join(titles)} | shared / padded | fed / distinct |"
    text = (
        "`python -m tests.bench.packing`: CPU seconds of one optimizer step, median and range of "
        f"{options.repetitions}, of a random llama with 33 M parameters (float32, ZeRO 0, "
        f"{options.threads} thread, micro-batches of {BUDGET:,} tokens); the three learners take "
        "turns in one process. No GPU was measured.\n\n"
        f"{header}\n|{'---|' * (len(PACKINGS) + 3)}\n" + "\n".join(lines)
    )
    if options.record:
        put_section("## Packed rows", text)


if __name__ == "__main__":
    main()
