"""Speed of weight transport, and of a whole sync.

    python -m tests.bench.transport [--record] [--sizes MB ...] [--sync | --no-sync]

Transport: a sender and a receiver, each a Ray actor as in a campaign. Every turn measures a plain
copy of the bytes within the receiver; the object store (pack, with checksums and the copy into the
store beside it; then verify; then copy into the parameters), by stages; and broadcast (gloo). Sync:
a real learner and a real engine (sync.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import ray
import torch

from rayhf.config.schema import LearnerConfig
from rayhf.types import WeightBucket
from rayhf.weights import buckets as weight_buckets
from rayhf.weights.broadcast import Receiver, Rendezvous, Sender
from rayhf.weights.buckets import (
    Buffers,
    bucket_layout,
    pack_buckets,
    unpack_bucket,
    verify_buckets,
)
from tests.bench.results import put_section
from tests.bench.sync import Stages, measure_sync, sync_report

MB = 10**6
SIZES_MB = (10, 100, 500, 2000)
BUCKET_BYTES = LearnerConfig().bucket_mib << 20
TURNS = 5
WARM_UP = 3
"""Turns before those: two versions are in the object store at a time, and new shared memory is slow
when it is first written."""
WANTED = 0.4
"""Share of a plain copy's speed from 100 MB on."""


def tensors(total_bytes: int) -> list[torch.Tensor]:
    """Return float32 matrices of 4 MiB, and one with the rest."""
    each = 1 << 20
    whole, rest = divmod(total_bytes // 4, each)
    return [torch.rand(1024, 1024) for _ in range(whole)] + ([torch.rand(rest)] if rest else [])


class Learner:
    def __init__(self, total_bytes: int) -> None:
        named = [(f"w{number}", tensor) for number, tensor in enumerate(tensors(total_bytes))]
        per_bucket = BUCKET_BYTES // (4 << 20)
        self.buckets = [named[i : i + per_bucket] for i in range(0, len(named), per_bucket)]
        self.buffers = Buffers()
        self.stages = Stages()
        self.stages.wrap(weight_buckets, "fill_bucket", "pack")
        self.stages.wrap(weight_buckets, "checksum", "checksum")
        self.stages.wrap(ray, "put", "put")

    def publish(self) -> tuple[list[Any], dict[str, float]]:
        """Put buckets into the object store; return them and seconds by stage."""
        self.stages.take()
        started = time.perf_counter()
        stored = list(
            pack_buckets(self.buckets, torch.float32, store=ray.put, buffers=self.buffers)
        )
        publish_s = time.perf_counter() - started
        return stored, self.stages.take() | {"publish": publish_s}

    def open(self) -> tuple[Rendezvous, list[WeightBucket]]:
        """Open a process group of two; return its rendezvous and the layout of what is sent."""
        self.sender = Sender("127.0.0.1", members=2, timeout_s=300, device=torch.device("cpu"))
        self.layouts = [
            bucket_layout([(name, tuple(t.shape)) for name, t in named], torch.float32)
            for named in self.buckets
        ]
        return self.sender.rendezvous, [
            WeightBucket(tensors=specs, payload=None, checksum="") for specs in self.layouts
        ]

    def join(self) -> None:
        self.sender.join()

    def send(self) -> None:
        for specs, named in zip(self.layouts, self.buckets, strict=True):
            self.sender.send(1, specs, (tensor for _, tensor in named))
        self.sender.finish()


class Engine:
    def __init__(self, total_bytes: int) -> None:
        self.weights = {
            f"w{i}": torch.empty_like(tensor) for i, tensor in enumerate(tensors(total_bytes))
        }
        self.source = {name: torch.rand_like(tensor) for name, tensor in self.weights.items()}

    def receive(self, buckets: list[Any], *payloads: Any) -> dict[str, float]:
        """Return the seconds to verify the buckets, and to copy them into the parameters."""
        started = time.perf_counter()
        verify_buckets(buckets, payloads)
        verified = time.perf_counter()
        for bucket, payload in zip(buckets, payloads, strict=True):
            for name, tensor in unpack_bucket(bucket, payload):
                self.weights[name].copy_(tensor)
        return {"verify": verified - started, "load": time.perf_counter() - verified}

    def join(self, meeting: Rendezvous) -> None:
        self.receiver = Receiver(meeting, 1, torch.device("cpu"))

    def receive_broadcast(self, layouts: list[WeightBucket]) -> None:
        for bucket, flat in self.receiver.receive(1, layouts):
            for name, tensor in unpack_bucket(bucket, flat):
                self.weights[name].copy_(tensor)

    def copy(self) -> float:
        started = time.perf_counter()
        for name, tensor in self.source.items():
            self.weights[name].copy_(tensor)
        return time.perf_counter() - started


def measure(size_mb: int) -> dict[str, float]:
    """Return medians over the turns, in seconds."""
    actor: Any = ray.remote(num_cpus=0)
    sender = actor(Learner).remote(size_mb * MB)
    receiver = actor(Engine).remote(size_mb * MB)
    meeting, layouts = ray.get(sender.open.remote())
    ray.get([sender.join.remote(), receiver.join.remote(meeting)])
    turns: list[dict[str, float]] = []
    stored: list[Any] = []
    for turn in range(WARM_UP + TURNS):
        copy_s = ray.get(receiver.copy.remote())
        started = time.perf_counter()
        buckets, stages = ray.get(sender.publish.remote())
        payloads = [bucket.payload for bucket in buckets]
        stored = payloads  # frees the version before
        bare = [replace(bucket, payload=None) for bucket in buckets]
        stages |= ray.get(receiver.receive.remote(bare, *payloads))
        total_s = time.perf_counter() - started
        stages["calls"] = total_s - sum(stages[name] for name in ("publish", "verify", "load"))
        started = time.perf_counter()
        ray.get([sender.send.remote(), receiver.receive_broadcast.remote(layouts)])
        broadcast_s = time.perf_counter() - started
        if turn >= WARM_UP:
            turns.append(stages | {"copy": copy_s, "total": total_s, "broadcast": broadcast_s})
        del buckets, payloads
    del stored
    for actor in (sender, receiver):
        ray.kill(actor)
    return {name: statistics.median(each[name] for each in turns) for name in turns[0]}


SPEEDS = {
    "plain copy": "copy",
    "object store": "total",
    "broadcast": "broadcast",
}
STAGES = {
    "publish": "publish: pack, checksum and put",
    "pack": "of it pack",
    "checksum": "checksum",
    "put": "put, beside them",
    "verify": "verify",
    "load": "load",
    "calls": "Ray calls",
}


def transport_report(results: dict[int, dict[str, float]]) -> str:
    """Return the tables of RESULTS.md; seconds by size in MB."""
    heads = ["MB", *(f"{name} GB/s" for name in SPEEDS), "object store's share of a plain copy"]
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    shares = {}
    for size, seconds in results.items():
        rates = [size / 1000 / seconds[stage] for stage in SPEEDS.values()]
        shares[size] = seconds["copy"] / seconds["total"]
        cells = [f"{size:,}", *(f"{rate:.2f}" for rate in rates), f"{shares[size]:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Where the object store's time goes, in plain copies of the same bytes:", ""]
    lines += [f"| MB | {' | '.join(STAGES.values())} | sum |", "|" + "--:|" * (len(STAGES) + 2)]
    for size, seconds in results.items():
        times = [seconds[stage] / seconds["copy"] for stage in (*STAGES, "total")]
        lines.append(f"| {size:,} | " + " | ".join(f"{each:.2f}" for each in times) + " |")
    large = [share for size, share in shares.items() if size >= 100]
    if large:
        met = "yes" if min(large) >= WANTED else "no"
        lines += ["", f"At least {WANTED:.0%} from 100 MB on: {met} (least {min(large):.0%})."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES_MB, help="in MB")
    parser.add_argument(
        "--sync", action=argparse.BooleanOptionalAction, default=True, help="measure a sync, too"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the tables into tests/bench/RESULTS.md"
    )
    options = parser.parse_args()
    ray.init(
        num_cpus=2, object_store_memory=5 * 10**9, include_dashboard=False, log_to_driver=False
    )
    if options.sizes:
        results = {size: measure(size) for size in options.sizes}
        setting = f"A sender and a receiver on one machine, float32, medians of {TURNS} turns."
        text = f"{setting}\n\n{transport_report(results)}"
        print(text, flush=True)
        if options.record:
            put_section("## Weight transport", text)
    if options.sync:
        text = sync_report(measure_sync())
        print(text)
        if options.record:
            put_section("## Weight sync", text)


if __name__ == "__main__":
    main()
