"""What a learner's actor does with the buckets of its engine; the engine is a fake."""

import actors.learner
from actors.learner import LearnerActor
from rayhf.types import Probe, WeightBucket


def test_each_bucket_is_put_before_the_next_one_is_packed(monkeypatch):
    """Together they are as large as the model."""
    log = []

    class Engine:
        def probe(self):
            return Probe(token_ids=(1, 2), logprobs=(-1.0,))

        def buckets(self, dtype, bucket_bytes, *, whole, version):
            for number in range(3):
                log.append(f"packed {number}")
                yield WeightBucket(tensors=(), payload=number, checksum="")

    def put(payload):
        log.append(f"put {payload}")
        return f"reference {payload}"

    monkeypatch.setattr(actors.learner.ray, "put", put)
    actor = LearnerActor()
    actor.engine = Engine()
    buckets, _ = actor.publish(1, "bfloat16", 1 << 20, "object_store", False)
    assert log == ["packed 0", "put 0", "packed 1", "put 1", "packed 2", "put 2"]
    assert [bucket.payload for bucket in buckets] == [f"reference {i}" for i in range(3)]
