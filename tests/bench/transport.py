"""Speed of weight sync.

    python -m tests.bench.transport [--record]

A sender and a receiver, each a Ray actor as in a campaign: pack into buckets with a checksum, send,
verify, copy into the parameters. Every turn measures the object store (one step after the other),
broadcast (gloo; packing, sending, verifying and copying overlap), and, as the upper bound, a plain
copy of the same bytes within the receiver.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import ray
import torch

from rayhf.types import WeightBucket
from rayhf.weights.broadcast import Receiver, Rendezvous, Sender
from rayhf.weights.buckets import lay_out, pack_bucket, unpack_bucket, verify_bucket
from tests.bench.results import put_section

MB = 10**6
SIZES_MB = (10, 100, 500, 2000)
BUCKET_BYTES = 256 << 20
"""The default of learner.bucket_mib."""
TURNS = 5


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

    def publish(self) -> tuple[list[Any], float]:
        """Put buckets into the object store; return them and the seconds that took."""
        started = time.perf_counter()
        packed = [pack_bucket(named, torch.float32) for named in self.buckets]
        stored = [replace(bucket, payload=ray.put(bucket.payload)) for bucket in packed]
        return stored, time.perf_counter() - started

    def open(self) -> tuple[Rendezvous, list[WeightBucket]]:
        """Open a process group of two; return its rendezvous and the layout of what is sent."""
        self.sender = Sender("127.0.0.1", members=2, timeout_s=300, device=torch.device("cpu"))
        self.layouts = [
            lay_out([(name, tuple(t.shape)) for name, t in named], torch.float32)
            for named in self.buckets
        ]
        return self.sender.meeting, [
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

    def receive(self, buckets: list[Any], *payloads: Any) -> tuple[float, float]:
        """Return the seconds to verify the buckets, and to copy them into the parameters."""
        verifying = 0.0
        copying = 0.0
        for bucket, payload in zip(buckets, payloads, strict=True):
            started = time.perf_counter()
            verify_bucket(bucket, payload)
            verified = time.perf_counter()
            for name, tensor in unpack_bucket(bucket, payload):
                self.weights[name].copy_(tensor)
            verifying += verified - started
            copying += time.perf_counter() - verified
        return verifying, copying

    def join(self, meeting: Rendezvous) -> None:
        self.receiver = Receiver(meeting, 1, torch.device("cpu"))

    def receive_broadcast(self, layouts: list[WeightBucket]) -> None:
        for bucket, flat in self.receiver.arrivals(1, layouts):
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
    for turn in range(TURNS + 1):
        started = time.perf_counter()
        buckets, publish_s = ray.get(sender.publish.remote())
        payloads = [bucket.payload for bucket in buckets]
        bare = [replace(bucket, payload=None) for bucket in buckets]
        verify_s, load_s = ray.get(receiver.receive.remote(bare, *payloads))
        total_s = time.perf_counter() - started
        started = time.perf_counter()
        ray.get([sender.send.remote(), receiver.receive_broadcast.remote(layouts)])
        broadcast_s = time.perf_counter() - started
        copy_s = ray.get(receiver.copy.remote())
        if turn:  # the first turn touches every page for the first time
            turns.append(
                {
                    "publish": publish_s,
                    "verify": verify_s,
                    "load": load_s,
                    "total": total_s,
                    "broadcast": broadcast_s,
                    "copy": copy_s,
                }
            )
        del buckets, payloads
    for actor in (sender, receiver):
        ray.kill(actor)
    return {name: statistics.median(each[name] for each in turns) for name in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", action="store_true", help="write the table into tests/bench/RESULTS.md"
    )
    options = parser.parse_args()
    ray.init(
        num_cpus=2, object_store_memory=5 * 10**9, include_dashboard=False, log_to_driver=False
    )
    heads = ["MB", "object store: publish s", "verify s", "load s", "total s", "broadcast s"]
    heads += ["plain copy s", "object store GB/s", "broadcast GB/s", "plain copy GB/s"]
    heads += ["share of a plain copy"]
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    for size in SIZES_MB:
        seconds = measure(size)
        rates = [size / 1000 / seconds[name] for name in ("total", "broadcast", "copy")]
        cells = [
            *(f"{value:.3f}" for value in seconds.values()),
            *(f"{rate:.2f}" for rate in rates),
            f"{rates[0] / rates[2]:.0%}, {rates[1] / rates[2]:.0%}",
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if options.record:
        setting = f"A sender and a receiver on one machine, float32, medians of {TURNS} turns."
        put_section("## Weight transport", "\n".join([setting, "", *lines]))


if __name__ == "__main__":
    main()
