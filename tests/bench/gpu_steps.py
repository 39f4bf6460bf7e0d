"""The steps of tests.bench.gpu: each runs in a process of its own and returns a text of figures.

Not run on a GPU yet; written against torch 2.13, deepspeed 0.19 and vllm 0.32.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayhf.planning.memory import GIB, learner_memory
from rayhf.planning.shape import read_shape
from tests.bench.gpu_pace import ROOT, SIZES, Job, report, start_learner
from tests.bench.random_llama import make_rows, micro_batches, write_model

JOB = Job(kind="", size="1b", model="", device="cuda", steps=4)


@contextmanager
def learner(**changes: Any) -> Iterator[tuple[Any, Job]]:
    """Yield a learner of the 1B model, and its job."""
    with tempfile.TemporaryDirectory(prefix="rayhf-gpu-") as scratch:
        job = replace(JOB, model=scratch)
        write_model(SIZES[job.size], Path(scratch), seed=0, device=job.device)
        engine = start_learner(job, **changes)
        yield engine, job
        engine.close()


def step(engine: Any, job: Job, temperature: float = 1.0) -> float:
    """Take an optimizer step and return its seconds."""
    import torch

    from rayhf.losses.base import Totals
    from rayhf.losses.sft import SFTLoss
    from rayhf.types import Example

    size = SIZES[job.size]
    rows = make_rows(size, job.seed)
    micros = [[Example(rows=(row,)) for row in micro] for micro in micro_batches(rows, size.budget)]
    tokens = float(sum(len(row.response_ids) for row in rows))
    totals = Totals(tokens=tokens, rows=len(rows), examples=len(rows))
    started = time.perf_counter()
    engine.step(micros, totals, SFTLoss(), temperature)
    torch.cuda.synchronize()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------- the steps


def gpu_tests() -> str:
    """Run the tests marked `gpu`: learner, engine, sleep mode, CUDA IPC."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:])
    return done.stdout.strip().splitlines()[-1]


def nccl() -> str:
    """Construct an NCCL group of one member, broadcast, and abort it."""
    import torch

    from rayhf.weights.broadcast import Sender
    from rayhf.weights.buckets import bucket_layout

    device = torch.device("cuda:0")
    sender = Sender("127.0.0.1", members=1, timeout_s=20.0, device=device)
    sender.join()
    weight = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    specs = bucket_layout([("weight", tuple(weight.shape))], torch.bfloat16)
    for _ in range(2):
        sender.send(1, specs, [weight])
    buckets = sender.finish()
    sender.close()
    return f"{len(buckets)} buckets sent to a group of one, and the group was left"


def pace() -> str:
    """Measure tokens/s, MFU and peak memory at 1B, against the estimates of `rayhf check`."""
    return report(JOB, checkpointing=(True,), devices=False)


def packed() -> str:
    """Time steps over padded rows, and over packed ones."""
    lines = []
    for packing in ("off", "rows"):
        with learner(packing=packing) as (engine, job):
            step(engine, job)  # compiles the mask
            lines.append(f"packing {packing}: {step(engine, job):.2f} s per step")
    return "\n".join(lines)


def head() -> str:
    """Measure the head over 128,256 words under ZeRO-3, at temperature 1 and another one."""
    import torch

    lines = []
    with learner(zero_stage=3) as (engine, job):
        shape = read_shape(Path(job.model), key="model")
        estimate = learner_memory(shape, engine.config, device="gpu")
        for temperature in (1.0, 0.7):
            step(engine, job, temperature)
            torch.cuda.reset_peak_memory_stats()
            seconds = step(engine, job, temperature)
            peak = torch.cuda.max_memory_allocated()
            lines.append(
                f"temperature {temperature:g}: peak {peak / GIB:.2f} GiB, estimated "
                f"{(estimate.total - estimate.framework) / GIB:.2f} with logits "
                f"{estimate.logits / GIB:.2f}; {seconds:.2f} s per step"
            )
    return "\n".join(lines)


def attention() -> str:
    """Name the attention kernels that the learner's forward pass runs."""
    from torch.profiler import ProfilerActivity, profile

    with learner() as (engine, job):
        rows = make_rows(SIZES[job.size], 0)[:8]
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            engine.outputs(rows, 1.0)
    words = ("flash", "fmha", "attention", "sdpa")
    names = {event.key for event in profiled.key_averages()}
    kernels = sorted(name for name in names if any(word in name.lower() for word in words))
    assert kernels, "no attention kernel was recognized"
    flash = any("flash" in name.lower() for name in kernels)
    return f"flash: {flash}; kernels: {', '.join(name[:80] for name in kernels)}"


def offload() -> str:
    """Time steps whose optimizer is in host memory, with 1 and 16 CPU threads."""
    import torch

    lines = []
    with learner(offload=True) as (engine, job):
        for threads in (1, 16):
            torch.set_num_threads(threads)
            step(engine, job)
            lines.append(f"{threads} threads: {step(engine, job):.2f} s per step")
    return "\n".join(lines)


def sleep() -> str:
    """Measure how fast a learner leaves its GPU and returns, and the host memory that it pins."""
    import torch

    lines = []
    with learner(zero_stage=3) as (engine, job):
        step(engine, job)
        for turn in ("first", "second"):
            held = torch.cuda.memory_allocated()
            started = time.perf_counter()
            engine.sleep()
            asleep = time.perf_counter()
            left = torch.cuda.memory_allocated()
            stats = torch.cuda.host_memory_stats()
            begun = time.perf_counter()
            engine.wake()
            awake = time.perf_counter()
            gigabytes = (held - left) / 1e9
            lines.append(
                f"{turn} time: {held / GIB:.2f} GiB, {left / GIB:.2f} stayed; leaves at "
                f"{gigabytes / (asleep - started):.1f} GB/s, returns at "
                f"{gigabytes / (awake - begun):.1f} GB/s; pinned "
                f"{stats['allocated_bytes.current'] / GIB:.2f} GiB"
            )
    return "\n".join(lines)


def release() -> str:
    """Publish to another process on the GPU: does `release` give everything back?"""
    import torch

    from rayhf.learner.weight_sender import IpcSender
    from rayhf.weights.buckets import bucket_nbytes, format_checksum

    spawn = multiprocessing.get_context("spawn")
    with learner() as (engine, job), ProcessPoolExecutor(1, mp_context=spawn) as engines:
        engines.submit(opened, []).result()  # its CUDA context takes memory too
        step(engine, job)
        engine.sleep()
        before = torch.cuda.mem_get_info()[0]
        engine.wake()
        sender = IpcSender()
        started = time.perf_counter()
        buckets, _ = sender.publish(engine, "bfloat16", engine.config.bucket_mib << 20)
        seconds = time.perf_counter() - started
        engine.sleep()
        held = before - torch.cuda.mem_get_info()[0]
        sums = engines.submit(opened, [bucket.payload for bucket in buckets]).result()
        assert [format_checksum(total) for total in sums] == [b.checksum for b in buckets]
        sender.release()
        torch.cuda.empty_cache()
        kept = before - torch.cuda.mem_get_info()[0]
        size = sum(bucket_nbytes(bucket.tensors) for bucket in buckets)
    return (
        f"{size / GIB:.2f} GiB published in {seconds:.2f} s; they hold {held / GIB:.2f} GiB while "
        f"the learner sleeps, and {kept / GIB:.2f} after release"
    )


def opened(handles: list[Any]) -> list[int]:
    """Return the checksums of another process's buckets."""
    import torch

    from rayhf.weights.buckets import device_checksum
    from rayhf.weights.cuda_ipc import open_export

    torch.zeros(1, device="cuda")
    return [int(device_checksum(open_export(h, torch.device("cuda:0")))) for h in handles]


def campaign() -> str:
    """Run ten iterations of a campaign whose engine and learner share the GPU."""
    with tempfile.TemporaryDirectory(prefix="rayhf-gpu-") as scratch:
        rayhf = str(Path(sys.executable).with_name("rayhf"))
        preset = ROOT / "configs/tiny/online_dpo_arithmetic.yaml"
        for command in (
            [rayhf, "tiny", ".tiny", "--task", "arithmetic"],
            [rayhf, "run", str(preset), "run.dir=run", "run.iterations=10", *SHARED],
        ):
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr}")
        return f"10 iterations; {done.stdout.strip().splitlines()[-1]}"


SHARED = (
    "cluster.device=gpu",
    "cluster.placement=colocate",
    "policy.dtype=bfloat16",
    "learner.dtype=bfloat16",
    "rollout.memory_fraction=0.4",
)
"""Overrides of a preset for one GPU that engine and learner share."""
