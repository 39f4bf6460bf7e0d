"""CPU time that Ray adds to the controller, per request.

    python -m tests.bench.ray_calls

Calls through the real pool and supervision to one actor that responds at once, many in flight.
Measured is the CPU time of this process, Ray's threads included. scale_sim.py measures the same
path without Ray.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray

from actors.process import process_info
from actors.rollout import RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import ObjectStore
from rayhf.types import Completion, GenerateRequest, Sampling, float_array, token_array

IN_FLIGHT = 512
CALLS = 4096
MAX_NUM_SEQS = 1 << 20
"""Of the actor: so many that every call is sent at once."""


class Engine:
    """An engine whose completions have `length` tokens."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._steps = 0

    async def generate(self, requests: list[Any], version: int) -> list[Any]:
        self._steps += 1
        return [
            tuple(
                Completion(
                    prompt_id=request.prompt_id,
                    index=index,
                    seed=seed,
                    text="four" * self._length,
                    token_ids=token_array((1000 + seed + i) % 150_000 for i in range(self._length)),
                    logprobs=float_array(-(i + 0.5) / 3 for i in range(self._length)),
                    finish_reason="stop",
                    policy_version=version,
                )
                for index, seed in enumerate(request.seeds)
            )
            for request in requests
        ]

    async def progress(self) -> int:
        return self._steps

    def process_info(self) -> Any:
        return process_info()


def _request(prompt_id: str, length: int, seeds: tuple[int, ...]) -> GenerateRequest:
    sampling = Sampling(max_tokens=length)
    return GenerateRequest(
        prompt_id=prompt_id,
        number=0,
        token_ids=tuple(range(1000, 1016)),
        sampling=sampling,
        seeds=seeds,
    )


async def cost_us(length: int, samples: int, per_call: int) -> float:
    """Measure the CPU time per request, in calls of `per_call` requests."""
    create: Any = ray.remote(num_cpus=0, max_concurrency=100_000)(Engine).remote
    actor = SupervisedActor(
        "engine", lambda: create(length), limits=SupervisionLimits(stall_s=300.0, restarts=0)
    )
    await actor.start()
    transport = ObjectStore([actor], timeout_s=600.0)
    pool = RolloutPool([actor], transport, max_num_seqs=MAX_NUM_SEQS, timeout_s=600.0)
    waiting = iter(range(CALLS // per_call))

    async def call() -> None:
        for number in waiting:
            seeds = tuple(range(number, number + samples))
            await pool.generate(
                [_request(f"{number:08x}{i:08x}", length, seeds) for i in range(per_call)],
                version=0,
            )

    await pool.generate([_request("first", length, (1,))], version=0)
    started = time.process_time()
    await asyncio.gather(*(call() for _ in range(max(1, IN_FLIGHT // per_call))))
    spent = time.process_time() - started
    await actor.kill(stacks=False)
    return spent / (CALLS // per_call * per_call) * 1e6


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    print(
        "| tokens per completion | completions per request | requests per call | us per request |"
    )
    print("|--:|--:|--:|--:|")
    for length, samples, per_call in (
        (32, 2, 1),
        (32, 2, 8),
        (32, 2, 64),
        (512, 2, 1),
        (512, 8, 1),
    ):
        cost = asyncio.run(cost_us(length, samples, per_call))
        print(f"| {length} | {samples} | {per_call} | {cost:.0f} |", flush=True)


if __name__ == "__main__":
    main()
