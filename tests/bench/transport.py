"""How fast weights travel: `python -m tests.bench.transport [--record]`.

A sender and a receiver, each a Ray actor as in a campaign: pack into buckets with a checksum, hand over, check, copy into the
parameters. Beside it, in the same turn, a plain copy of the same bytes from memory to memory within the receiver: the most that
anything could reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import ray
import torch

from rayhf.rollout.weights import pack_bucket, unpack_bucket, verify_bucket
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
class Sender:
    def __init__(self, total_bytes: int) -> None:
        self.weights = tensors(total_bytes)

    def publish(self) -> tuple[list[Any], float]:
        """Buckets with their payload in the object store, and the seconds that took."""
        started, buckets, waiting, size = time.perf_counter(), [], [], 0
        for number, tensor in enumerate(self.weights):
            if waiting and size + tensor.nbytes > BUCKET_BYTES:
                buckets.append(self._put(waiting))
                waiting, size = [], 0
            waiting.append((f"w{number}", tensor))
            size += tensor.nbytes
        buckets.append(self._put(waiting))
        return buckets, time.perf_counter() - started

    @staticmethod
    def _put(named: list[tuple[str, torch.Tensor]]) -> Any:
        bucket = pack_bucket(named, torch.float32)
        return replace(bucket, payload=ray.put(bucket.payload))


@ray.remote(num_cpus=0)
class Receiver:
    def __init__(self, total_bytes: int) -> None:
        self.weights = {f"w{i}": torch.empty_like(tensor) for i, tensor in enumerate(tensors(total_bytes))}
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
            checking, copying = checking + checked - started, copying + time.perf_counter() - checked
        return checking, copying

    def copy(self) -> float:
        started = time.perf_counter()
        for name, tensor in self.source.items():
            self.weights[name].copy_(tensor)
        return time.perf_counter() - started


def measure(size_mb: int) -> dict[str, float]:
    """Medians over the turns, in seconds."""
    sender, receiver = Sender.remote(size_mb * MB), Receiver.remote(size_mb * MB)
    turns: list[dict[str, float]] = []
    for turn in range(TURNS + 1):
        started = time.perf_counter()
        buckets, sent = ray.get(sender.publish.remote())
        payloads = [bucket.payload for bucket in buckets]
        checked, copied = ray.get(receiver.receive.remote([replace(b, payload=None) for b in buckets], *payloads))
        whole = time.perf_counter() - started
        plain = ray.get(receiver.copy.remote())
        if turn:  # the first one touches every page for the first time
            turns.append({"whole": whole, "publish": sent, "check": checked, "load": copied, "copy": plain})
        del buckets, payloads
    for actor in (sender, receiver):
        ray.kill(actor)
    return {name: statistics.median(each[name] for each in turns) for name in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the table into tests/bench/RESULTS.md")
    options = parser.parse_args()
    ray.init(num_cpus=2, object_store_memory=5 * 10**9, include_dashboard=False, log_to_driver=False)
    lines = [
        "| MB | publish s | check s | load s | whole s | GB/s | plain copy GB/s | share |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for size in SIZES_MB:
        found = measure(size)
        rate, plain = size / 1000 / found["whole"], size / 1000 / found["copy"]
        cells = [
            *(f"{found[name]:.3f}" for name in ("publish", "check", "load", "whole")),
            f"{rate:.2f}",
            f"{plain:.2f}",
            f"{rate / plain:.0%}",
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if options.record:
        put_section(
            "## Weight transport", "\n".join(["Object store, one sender and one receiver on one machine, float32.", "", *lines])
        )


if __name__ == "__main__":
    main()
