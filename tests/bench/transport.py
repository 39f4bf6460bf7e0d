"""How fast weights travel: `python -m tests.bench.transport [--record]`.

A sender and a receiver, each a Ray actor as in a campaign: pack into buckets with a checksum, hand
over, check, copy into the parameters. Twice in every turn, through the object store (one step after
the other) and by broadcast (gloo; packing, sending, checking and copying overlap); and a plain copy
of the same bytes from memory to memory within the receiver: the most that anything could reach.
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
from rayhf.weights.buckets import bucket_layout, pack_bucket, unpack_bucket, verify_bucket
from tests.bench.results import put_section

MB = 10**6
SIZES_MB = (10, 100, 500, 2000)
BUCKET_BYTES = 256 << 20
"""As learner.bucket_mib."""
TURNS = 5


def tensors(total_bytes: int) -> list[torch.Tensor]:
    """float32 matrices of 4 MiB, and one with the rest."""
    each = 1 << 20
    whole, rest = divmod(total_bytes // 4, each)
    return [torch.rand(1024, 1024) for _ in range(whole)] + ([torch.rand(rest)] if rest else [])


@ray.remote(num_cpus=0)
class Learner:
    def __init__(self, total_bytes: int) -> None:
        named = [(f"w{number}", tensor) for number, tensor in enumerate(tensors(total_bytes))]
        most = BUCKET_BYTES // (4 << 20)
        self.buckets = [named[i : i + most] for i in range(0, len(named), most)]

    def publish(self) -> tuple[list[Any], float]:
        """Buckets with their payload in the object store, and the seconds that took."""
        started = time.perf_counter()
        packed = [pack_bucket(named, torch.float32) for named in self.buckets]
        stored = [replace(bucket, payload=ray.put(bucket.payload)) for bucket in packed]
        return stored, time.perf_counter() - started

    def open(self) -> tuple[Rendezvous, list[Any]]:
        """A group of two, and what will be sent."""
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


@ray.remote(num_cpus=0)
class Engine:
    def __init__(self, total_bytes: int) -> None:
        self.weights = {
            f"w{i}": torch.empty_like(tensor) for i, tensor in enumerate(tensors(total_bytes))
        }
        self.source = {name: torch.rand_like(tensor) for name, tensor in self.weights.items()}

    def receive(self, buckets: list[Any], *payloads: Any) -> tuple[float, float]:
        """Seconds to check the buckets, and to copy them into place."""
        checking = copying = 0.0
        for bucket, payload in zip(buckets, payloads, strict=True):
            started = time.perf_counter()
            verify_bucket(bucket, payload)
            checked = time.perf_counter()
            for name, tensor in unpack_bucket(bucket, payload):
                self.weights[name].copy_(tensor)
            checking, copying = (
                checking + checked - started,
                copying + time.perf_counter() - checked,
            )
        return checking, copying

    def join(self, meeting: Rendezvous) -> None:
        self.receiver = Receiver(meeting, 1, torch.device("cpu"))

    def take(self, announced: list[Any]) -> None:
        for bucket, flat in self.receiver.receive(1, announced):
            for name, tensor in unpack_bucket(bucket, flat):
                self.weights[name].copy_(tensor)

    def copy(self) -> float:
        started = time.perf_counter()
        for name, tensor in self.source.items():
            self.weights[name].copy_(tensor)
        return time.perf_counter() - started


def measure(size_mb: int) -> dict[str, float]:
    """Medians over the turns, in seconds."""
    sender, receiver = Learner.remote(size_mb * MB), Engine.remote(size_mb * MB)
    meeting, announced = ray.get(sender.open.remote())
    ray.get([sender.join.remote(), receiver.join.remote(meeting)])
    turns: list[dict[str, float]] = []
    for turn in range(TURNS + 1):
        started = time.perf_counter()
        buckets, sent = ray.get(sender.publish.remote())
        payloads = [bucket.payload for bucket in buckets]
        checked, copied = ray.get(
            receiver.receive.remote([replace(b, payload=None) for b in buckets], *payloads)
        )
        whole = time.perf_counter() - started
        started = time.perf_counter()
        ray.get([sender.send.remote(), receiver.take.remote(announced)])
        broadcast = time.perf_counter() - started
        plain = ray.get(receiver.copy.remote())
        if turn:  # the first one touches every page for the first time
            turns.append(
                {
                    "publish": sent,
                    "check": checked,
                    "load": copied,
                    "whole": whole,
                    "broadcast": broadcast,
                    "copy": plain,
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
    lines = [
        "| MB | object store: publish s | check s | load s | whole s | broadcast s | plain copy s | object store GB/s | "
        "broadcast GB/s | plain copy GB/s | share of a plain copy |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for size in SIZES_MB:
        found = measure(size)
        stored, sent, plain = (size / 1000 / found[name] for name in ("whole", "broadcast", "copy"))
        cells = [
            *(f"{seconds:.3f}" for seconds in found.values()),
            *(f"{rate:.2f}" for rate in (stored, sent, plain)),
            f"{stored / plain:.0%}, {sent / plain:.0%}",
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if options.record:
        put_section(
            "## Weight transport",
            "\n".join(
                ["A sender and a receiver on one machine, float32, medians of five.", "", *lines]
            ),
        )


if __name__ == "__main__":
    main()
