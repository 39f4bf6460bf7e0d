"""Memory estimates of `rayhf check` against measured peaks.

    python -m tests.bench.memory [--record]

Every role works in a fresh process on a random Llama: a learner takes two optimizer steps of
micro-batches as large as the token budget allows, a reference scores one, an engine generates. The
peak resident memory less a constant is compared with the estimate less `framework`. The constant is
the peak of the same process with a model of a few hundred parameters and eight tokens. Takes about
10 minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from rayhf.config.schema import LearnerConfig, ReferenceConfig, RolloutConfig
from rayhf.losses.base import LossOutput, MicroBatch, Totals
from rayhf.planning.memory import (
    GIB,
    Memory,
    engine_memory,
    learner_memory,
    reference_memory,
)
from rayhf.planning.shape import Shape, read_shape
from rayhf.types import Example, GenerateRequest, Row, Sampling, token_array
from tests.bench.results import put_section

LENGTH = 256
SEQUENCES = 64
"""Prompts that an engine prefills in about one step."""
GENERATED = 16
"""Tokens it generates after each."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A random Llama in float32 and the tokens of a micro-batch."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    budget: int


SIZES = {
    # vLLM has no smaller heads on CPU.
    "none": Size(hidden=32, intermediate=32, layers=1, vocabulary=16, budget=LENGTH),
    "1 M": Size(hidden=128, intermediate=384, layers=4, vocabulary=2048, budget=16384),
    "30 M": Size(hidden=512, intermediate=1408, layers=6, vocabulary=8192, budget=4096),
    "120 M": Size(hidden=768, intermediate=2048, layers=12, vocabulary=24000, budget=1024),
}
LEARNERS: dict[str, dict[str, Any]] = {
    "learner, stage 0": {"zero_stage": 0},
    "learner, stage 2": {"zero_stage": 2},
    "learner, stage 3": {"zero_stage": 3},
    "learner, stage 0, checkpointing": {"zero_stage": 0, "activation_checkpointing": True},
    "learner, stage 2, bfloat16": {"zero_stage": 2, "dtype": "bfloat16"},
}
PROCESSES = (*LEARNERS, "reference", "rollout")
SLOW = "learner, stage 2, bfloat16"
"""Only its smallest model is measured: 30 M parameters take more than 15 minutes on CPU."""


def make_model(name: str, directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // 64),
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)


def learner_config(process: str, size: Size, **more: Any) -> LearnerConfig:
    return LearnerConfig(
        **{"dtype": "float32", "token_budget": size.budget, **LEARNERS[process], **more}
    )


def rollout_config(shape: Shape) -> RolloutConfig:
    """Return a config whose KV cache is filled by `SEQUENCES`."""
    cache = SEQUENCES * LENGTH * shape.cache_per_token("float32")
    return RolloutConfig(
        max_tokens=GENERATED, max_num_seqs=SEQUENCES, kv_cache_gib=max(cache / GIB, 1 / 64)
    )


def estimate(process: str, name: str, model: Path) -> Memory:
    shape = read_shape(model, key="model")
    size = SIZES[name]
    if process == "reference":
        config = ReferenceConfig(token_budget=size.budget)
        return reference_memory(shape, config, dtype="float32", device="cpu")
    if process == "rollout":
        return engine_memory(shape, rollout_config(shape), dtype="float32", device="cpu")
    return learner_memory(shape, learner_config(process, size), device="cpu")


def measure(process: str, name: str, model: Path) -> float:
    """Return the peak resident memory of a fresh process, in bytes."""
    command = [sys.executable, "-m", "tests.bench.memory", "--child", process, name, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{process}, {name}: exit {done.returncode}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------- in the child


def child(process: str, name: str, model: Path) -> None:
    import ray  # noqa: F401 (as in every actor's process)

    size = SIZES[name]
    work = {"reference": _reference, "rollout": _rollout}.get(process, _learner)
    work(process, size, model)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps(peak))


@dataclass(frozen=True)
class _Likelihood:
    """-log p of the response tokens."""

    entropy: Literal["off", "metric", "loss"] = "off"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        return LossOutput(loss=-output_T.sum() / micro.totals.tokens, metrics={})


def _rows(size: Size) -> list[Row]:
    """Return one micro-batch; all but the first token of a row is response."""
    ids = tuple(i % size.vocabulary for i in range(LENGTH))
    rows = range(size.budget // LENGTH)
    return [
        Row(
            prompt_id=str(i),
            sample=0,
            prompt_ids=token_array(ids[:1]),
            response_ids=token_array(ids[1:]),
        )
        for i in rows
    ]


def _learner(process: str, size: Size, model: Path) -> None:
    from rayhf.learner.engine import LearnerEngine

    with socket.socket() as probe:
        probe.bind(("", 0))
        master = ("127.0.0.1", probe.getsockname()[1])
    engine = LearnerEngine(
        model, learner_config(process, size, threads=2), lr=1e-5, total_steps=2, master=master
    )
    rows = _rows(size)
    examples = [Example(rows=(row,)) for row in rows]
    totals = Totals(
        tokens=float(sum(len(row.response_ids) for row in rows)), rows=len(rows), examples=len(rows)
    )
    # Adam's moments exist after the first step, gradients after the first micro-batch.
    for micros in (1, 2):
        engine.step([examples] * micros, totals, _Likelihood(), 1.0)
    engine.close()


def _reference(process: str, size: Size, model: Path) -> None:
    from rayhf.reference.engine import ReferenceEngine

    engine = ReferenceEngine(
        model, ReferenceConfig(token_budget=size.budget, threads=2), dtype="float32"
    )
    engine.logprobs(_rows(size), 1.0)


def _rollout(process: str, size: Size, model: Path) -> None:
    import os

    from rayhf.rollout.env import engine_env

    os.environ.update(engine_env("cpu", 2))
    from rayhf.rollout.engine import RolloutEngine

    config = rollout_config(read_shape(model, key="model"))
    engine = RolloutEngine(model, config, dtype="float32", max_length=LENGTH, seed=0, device="cpu")
    sampling = Sampling(max_tokens=GENERATED)
    requests = [
        GenerateRequest(
            prompt_id=str(i),
            number=0,
            token_ids=tuple((i + j) % size.vocabulary for j in range(LENGTH - GENERATED)),
            sampling=sampling,
            seeds=(i,),
        )
        for i in range(SEQUENCES if size.layers > 1 else 1)
    ]
    engine.generate(requests, version=0)
    engine.close()


# ------------------------------------------------------------------------------------------- tables


def table(rows: list[tuple[str, str, float, float, Memory]]) -> str:
    """Return the table in Markdown.

    A row has process, model, measured peak and constant in bytes, and the estimate.
    """
    heads = ["process", "model", "measured, MiB", "the constant", "the rest", "its estimate"]
    heads += ["estimate / measured", "whole process"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for process, name, peak, constant, memory in rows:
        net = peak - constant
        expected = memory.total - memory.framework
        mib = [f"{value / 2**20:,.0f}" for value in (peak, constant, net, expected)]
        cells = [process, name, *mib, f"{expected / net:.2f}", f"{memory.total / peak:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def introduction(rows: list[tuple[str, str, float, float, Memory]]) -> str:
    rests = [
        (memory.total - memory.framework) / (peak - constant)
        for _, _, peak, constant, memory in rows
    ]
    wholes = [memory.total / peak for _, _, peak, _, memory in rows]
    return (
        f"`python -m tests.bench.memory`, {time.strftime('%Y-%m-%d', time.gmtime())}, "
        f"{platform.machine()}. A random Llama in a process of its own; the constant is the peak "
        f"of the same process with a model of next to no size. Estimates are {min(rests):.2f} to "
        f"{max(rests):.2f} of what was measured beyond it, and {min(wholes):.2f} to "
        f"{max(wholes):.2f} of the whole process."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("PROCESS", "SIZE", "MODEL"))
    parser.add_argument("--only", nargs="*", default=list(PROCESSES), help="processes")
    parser.add_argument(
        "--record", action="store_true", help="write the table into tests/bench/RESULTS.md"
    )
    arguments = parser.parse_args()
    if arguments.child:
        process, name, model = arguments.child
        child(process, name, Path(model))
        return
    console = Console()
    rows: list[tuple[str, str, float, float, Memory]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            make_model(name, Path(folder) / name)
        for process in arguments.only:
            constant = measure(process, "none", Path(folder) / "none")
            for name in list(SIZES)[1 : 2 if process == SLOW else None]:
                model = Path(folder) / name
                peak = measure(process, name, model)
                rows.append((process, name, peak, constant, estimate(process, name, model)))
                console.print(table(rows[-1:]).splitlines()[-1], markup=False, soft_wrap=True)
    text = f"{introduction(rows)}\n\n{table(rows)}"
    console.print(text, markup=False, soft_wrap=True)
    if arguments.record:
        put_section("## Memory estimates", text)


if __name__ == "__main__":
    main()
