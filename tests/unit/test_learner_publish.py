"""What a learner's actor does with the buckets of its engine; the engine is a fake."""

import time

import numpy as np
import torch

import actors.learner
from actors.learner import LearnerActor
from rayhf.types import Probe
from rayhf.weights.buckets import Buffers, pack_buckets


def test_at_most_two_buckets_are_in_memory(monkeypatch):
    """Together they are as large as the model: each is put before the next but one is packed."""
    log = []

    class Engine:
        def probe(self):
            return Probe(token_ids=(1, 2), logprobs=(-1.0,))

        def buckets(self, dtype, bucket_bytes, *, whole, version, store):
            return pack_buckets(self.gather(), torch.float32, store=store, buffers=Buffers())

        def gather(self):
            for number in range(4):
                log.append(f"packed {number}")
                yield [("w", torch.full((4,), float(number)))]

    def put(payload):
        number = int(payload.view(np.float32)[0])
        time.sleep(0.05)  # time for packing to run ahead, if nothing stops it
        log.append(f"put {number}")
        return f"reference {number}"

    monkeypatch.setattr(actors.learner.ray, "put", put)
    actor = LearnerActor()
    actor.engine = Engine()
    buckets, _ = actor.publish(1, "float32", 1 << 20, "object_store", False)
    assert [bucket.payload for bucket in buckets] == [f"reference {i}" for i in range(4)]
    for number in range(2, 4):
        assert log.index(f"put {number - 2}") < log.index(f"packed {number}")
