"""The learner on one GPU: speed, memory, and numerical agreement, on a random Llama.

    python -m tests.bench.gpu_pace --size 1b --record

One rank, bfloat16, ZeRO 2; with activation checkpointing, and without where `rayhf check` estimates
that it fits. Without a GPU the same path runs on CPU with the tiny size. rayhf does not pack rows
into one sequence, it batches rows of similar length and pads them: those micro-batches are compared
with one row at a time.

FLOPs of a step, two for a multiply-add. Rows have S tokens and T in all, R of
them responses; the body's linear layers have M weights, the output head H x V, and there are L
layers with A = heads x head size:

    forward   F = 2 M T + 2 H V R + 2 L A sum(S^2)   causal attention: each token attends to half of
              its row on average
    model     3 F                                    backward is twice forward: 6 M + 6 L A S for
              each token, and the head
    hardware  3 F + F of the body, without each layer's last matrix, where torch stops recomputing:
              about 8 M + 8 L A S; without activation checkpointing 3 F. Here T and S count padding

The head runs only where a response token is predicted; embedding, norms and the optimizer are not
counted. MFU is model FLOPs per second over the GPU's peak (bfloat16, dense, as NVIDIA states it),
HFU the same with hardware FLOPs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.config.schema import LearnerConfig
from rayhf.planning.memory import GIB, learner_memory
from rayhf.planning.shape import Shape, read_shape
from rayhf.types import Example, Row
from tests.bench.random_llama import Size, make_rows, micro_batches, write_model
from tests.bench.results import put_section

ROOT = Path(__file__).parents[2]
COMPARED = 24
"""Rows whose log-probs are compared."""
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""FLOP/s by a part of the device's name; the first match counts. Other devices have no MFU."""
NOT_RUN = """**Not measured on a GPU yet**: no machine with one was available. What follows is the
same script on CPU with one thread. It shows that the path runs, and nothing about speed; memory on
CPU is measured by `tests.bench.memory`."""


SIZES = {
    "tiny": Size(
        hidden=64,
        intermediate=192,
        layers=3,
        heads=4,
        kv_heads=2,
        vocabulary=512,
        tied=True,
        longest=64,
        budget=256,
    ),
    # The shapes of Llama 3.2 1B and 3B, and of Llama 3.1 8B.
    "1b": Size(
        hidden=2048,
        intermediate=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        tied=True,
    ),
    "3b": Size(
        hidden=3072,
        intermediate=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        vocabulary=128256,
        tied=True,
    ),
    "8b": Size(
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        tied=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of one process; each job has its own, so that memory peaks are its alone."""

    kind: str
    size: str
    model: str
    device: str
    checkpointing: bool = True
    attention: str = "sdpa"
    offload: bool = False
    seed: int = 0
    warmup: int = 2
    steps: int = 8

    @property
    def title(self) -> str:
        kept = "activation checkpointing" if self.checkpointing else "all activations kept"
        return f"{self.size}, {kept}"

    @property
    def config(self) -> LearnerConfig:
        return LearnerConfig(
            dtype="bfloat16",
            zero_stage=2,
            token_budget=SIZES[self.size].budget,
            packing="off",
            activation_checkpointing=self.checkpointing,
            attention=self.attention,  # type: ignore[arg-type]
            offload=self.offload,
            threads=1 if self.device == "cpu" else None,
        )


# ----------------------------------------------------------------------------------------- the work


def flops(
    shape: Shape, micros: Sequence[Sequence[Row]], *, padded: bool, recomputed: bool
) -> float:
    """Return the FLOPs of one step, as in the module's docstring.

    A row's last token is never fed.
    """
    lengths = [[max(map(len, micro)) if padded else len(row) for row in micro] for micro in micros]
    fed = [length - 1 for micro in lengths for length in micro]
    responses = sum(len(row.response_ids) for micro in micros for row in micro)
    matrices = sum(inputs * outputs for _, inputs, outputs in shape.linears)
    attention = 2 * shape.layers * shape.heads * shape.head_dim * sum(length**2 for length in fed)
    body = 2 * matrices * sum(fed) + attention
    again = body - 2 * shape.layers * shape.intermediate * shape.hidden * sum(fed)
    return 3.0 * (body + 2 * shape.hidden * shape.vocabulary * responses) + (
        again if recomputed else 0
    )


def tokens_of(micros: Sequence[Sequence[Row]]) -> int:
    return sum(len(row) - 1 for micro in micros for row in micro)


# ------------------------------------------------------------------------------------- in the child


def prepare(job: Job) -> dict[str, Any]:
    """Write the random model; return the device's name and memory."""
    import torch

    write_model(SIZES[job.size], Path(job.model), seed=job.seed, device=job.device)
    if job.device == "cpu":
        return {"name": _cpu(), "memory": None}
    return {
        "name": torch.cuda.get_device_name(),
        "memory": torch.cuda.get_device_properties(0).total_memory,
    }


def start_learner(job: Job, **changes: Any) -> Any:
    from rayhf.learner.engine import LearnerEngine

    with socket.socket() as probe:
        probe.bind(("", 0))
        master = ("127.0.0.1", probe.getsockname()[1])
    config = job.config.model_copy(update=changes)
    return LearnerEngine(
        Path(job.model),
        config,
        lr=1e-4,
        total_steps=1000,
        master=master,
        device=job.device,
        seed=job.seed,
    )


def train(job: Job) -> dict[str, Any]:
    """Return seconds and losses of the timed steps, memory peaks in bytes, and the differences of
    log-probs between batched and single rows."""
    import torch

    from rayhf.losses.base import Totals
    from rayhf.losses.sft import SFTLoss

    size = SIZES[job.size]
    rows = make_rows(size, job.seed)
    micros = [[Example(rows=(row,)) for row in micro] for micro in micro_batches(rows, size.budget)]
    totals = Totals(
        tokens=float(sum(len(row.response_ids) for row in rows)), rows=len(rows), examples=len(rows)
    )
    engine = start_learner(job)
    seconds = []
    losses = []
    for _ in range(job.warmup + job.steps):
        started = time.perf_counter()
        losses.append(engine.step(micros, totals, SFTLoss(), 1.0)["sft/nll"])
        if job.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peaks = _peaks(job.device)
    compared = rows[:COMPARED]
    batched = engine.outputs(compared, 1.0)
    single = [engine.outputs([row], 1.0)[0] for row in compared]
    engine.close()
    return {
        "seconds": seconds[job.warmup :],
        "losses": losses,
        "peaks": peaks,
        "batched": _difference(batched, single),
    }


def _peaks(device: str) -> dict[str, float]:
    """Return memory peaks in bytes, by what they are of."""
    import torch

    if device == "cpu":
        lines = Path("/proc/self/status").read_text().splitlines()
        return {
            "process": next(
                int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM")
            )
        }
    # The allocator still holds what it reserved at its peak.
    free, total = torch.cuda.mem_get_info()
    return {
        "tensors": torch.cuda.max_memory_allocated(),
        "allocator": torch.cuda.max_memory_reserved(),
        "process": total - free,
    }


def logprobs(job: Job) -> dict[str, list[list[float]]]:
    """Return a learner's log-probs in both dtypes, before any step."""
    rows = make_rows(SIZES[job.size], job.seed)[:COMPARED]
    logprobs_of = {}
    for dtype in ("float32", "bfloat16"):
        engine = start_learner(job, dtype=dtype)
        logprobs_of[dtype] = [row.tolist() for row in engine.outputs(rows, 1.0)]
    engine.close()
    return logprobs_of


def _difference(some: Sequence[Any], others: Sequence[Any]) -> tuple[float, float]:
    """Return the mean and the largest absolute difference, in nats."""
    distance = np.abs(np.concatenate(some) - np.concatenate(others))
    return float(distance.mean()), float(distance.max())


# ------------------------------------------------------------------------------------------- report


def call(job: Job) -> Any:
    """Run a job in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.gpu_pace", "--child", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=3600)
    if done.returncode:
        raise SystemExit(
            f"{job.kind}, {job.title}, {job.device}: exit {done.returncode}: {done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def report(job: Job, checkpointing: Sequence[bool] = (True, False), *, devices: bool = True) -> str:
    """Return the report in Markdown: the setting, then tables.

    `job` has size, device, seed and steps; `devices`: compare log-probs across devices.
    """
    with tempfile.TemporaryDirectory(prefix="rayhf-gpu-") as scratch:
        job = replace(job, model=str(Path(scratch) / job.size))
        first = replace(job, kind="prepare")
        # This process never opens the GPU.
        device = prepare(first) if job.device == "cpu" else call(first)
        shape = read_shape(Path(job.model), key="model")
        lines: dict[str, list[str]] = {
            name: [] for name in ("speed", "memory", "agreement", "left out")
        }
        for choice in checkpointing:
            _case(replace(job, kind="train", checkpointing=choice), shape, device, lines)
        if devices:
            tiny = replace(job, kind="logprobs", size="tiny", model=str(Path(scratch) / "compared"))
            write_model(SIZES["tiny"], Path(tiny.model), seed=job.seed, device="cpu")
            lines["agreement"] += _devices(tiny)
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers")
    )
    rows = make_rows(SIZES[job.size], job.seed)
    setting = (
        f"`python -m tests.bench.gpu_pace --size {job.size}`, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"{device['name']}, {packages}. Seed {job.seed}: {shape.parameters:,} parameters; a step "
        f"has {len(rows)} rows of {min(map(len, rows))} to {max(map(len, rows))} tokens in "
        f"micro-batches of at most {SIZES[job.size].budget} padded ones; bfloat16, ZeRO 2, "
        f"{job.attention}{', optimizer states in host memory' if job.offload else ''}; "
        f"{job.warmup} steps to warm up, {job.steps} timed."
    )
    tables = [
        "| case | s per step, median (range) | tokens/s | model TFLOP/s | MFU | hardware TFLOP/s "
        "| HFU | loss, first and last |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *lines["speed"],
        "",
        "| case | peak of | measured, GiB | estimate, GiB | estimate / measured |",
        "|---|---|--:|--:|--:|",
        *lines["memory"],
        "",
        "| log-probs | mean distance, nats | largest |",
        "|---|--:|--:|",
        *lines["agreement"],
    ]
    left = [f"\nNot run: {text}" for text in lines["left out"]]
    return "\n".join([*([NOT_RUN, ""] if job.device == "cpu" else []), setting, "", *tables, *left])


def _case(job: Job, shape: Shape, device: dict[str, Any], lines: dict[str, list[str]]) -> None:
    """Measure one way to train; add a line to each table."""
    estimate = learner_memory(
        shape, job.config, device="cpu" if job.device == "cpu" else "gpu", entropy=True
    )
    if device["memory"] is not None and estimate.total > device["memory"]:
        lines["left out"].append(
            f"{job.title}: it needs about {estimate.total / GIB:.0f} GiB, "
            f"the GPU has {device['memory'] / GIB:.0f}."
        )
        return
    result = call(job)
    micros = micro_batches(make_rows(SIZES[job.size], job.seed), job.config.token_budget)
    seconds = statistics.median(result["seconds"])
    peak = next((peak for name, peak in PEAKS.items() if name in device["name"]), None)
    rates = [
        flops(shape, micros, padded=hard, recomputed=hard and job.checkpointing) / seconds
        for hard in (False, True)
    ]
    model, hardware = (
        f"{rate / 1e12:,.3g} | {f'{rate / peak:.0%}' if peak else ''}" for rate in rates
    )
    spread = f"{min(result['seconds']):.3f}-{max(result['seconds']):.3f}"
    losses = result["losses"]
    lines["speed"].append(
        f"| {job.title} | {seconds:.3f} ({spread}) | {tokens_of(micros) / seconds:,.0f} "
        f"| {model} | {hardware} | {losses[0]:.3f}, {losses[-1]:.3f} |"
    )
    own = estimate.total - estimate.framework
    for name, title, expected in (
        ("tensors", "tensors (max_memory_allocated), against the estimate without framework", own),
        ("allocator", "torch's allocator (max_memory_reserved), against the same", own),
        (
            "process",
            "the whole process" if job.device != "cpu" else "the whole process (VmHWM)",
            estimate.total,
        ),
    ):
        if name in result["peaks"]:
            measured = result["peaks"][name]
            numbers = f"{measured / GIB:.2f} | {expected / GIB:.2f} | {expected / measured:.2f}"
            lines["memory"].append(f"| {job.title} | {title} | {numbers} |")
    mean, largest = result["batched"]
    lines["agreement"].append(
        f"| {job.title}: rows one at a time, against micro-batches | {mean:.2g} | {largest:.2g} |"
    )


def _devices(job: Job) -> list[str]:
    """Compare the tiny model in both dtypes on every device with float32 on CPU."""
    devices = ["cpu"] if job.device == "cpu" else ["cpu", job.device]
    logprobs_of = {device: call(replace(job, device=device)) for device in devices}
    exact = logprobs_of["cpu"]["float32"]
    lines = []
    for device, dtype in list(product(devices, ("float32", "bfloat16")))[1:]:
        mean, largest = _difference(logprobs_of[device][dtype], exact)
        title = f"tiny: {dtype} on {device}, against float32 on cpu"
        lines.append(f"| {title} | {mean:.2g} | {largest:.2g} |")
    return lines


def _cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"CPU, {names[0] if names else platform.machine()}"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="default: 1b on a GPU, tiny without one")
    parser.add_argument("--steps", type=int, default=8, help="number of timed steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="optimizer states in host memory: 8b on one large GPU, with 135 GiB there",
    )
    parser.add_argument(
        "--record", action="store_true", help="write the tables into tests/bench/RESULTS.md"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = Job(**json.loads(options.child))
        print(json.dumps({"prepare": prepare, "train": train, "logprobs": logprobs}[job.kind](job)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = options.size or ("tiny" if device == "cpu" else "1b")
    chosen = {name: getattr(options, name) for name in ("steps", "seed", "attention", "offload")}
    text = report(Job(kind="", size=size, model="", device=device, **chosen))
    print(text)
    if options.record:
        put_section("## GPU", text)


if __name__ == "__main__":
    main()
