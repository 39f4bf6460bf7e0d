"""Buckets: packed tensors are unpacked unchanged, and damage is detected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rayhf.errors import ConfigError, WeightSyncError
from rayhf.weights.buckets import (
    check_complete,
    checkpoint_shapes,
    pack_bucket,
    pack_buckets,
    snapshot_checksum,
    unpack_bucket,
    verify_bucket,
    verify_buckets,
)

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(deadline=None)  # starts a thread
@given(shapes=SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_unpacked_tensors_equal_packed_ones(
    shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    tensors = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    bucket = pack_bucket(tensors.items(), dtype)
    bucket.payload.flags.writeable = False
    verify_bucket(bucket, bucket.payload)
    received = dict(unpack_bucket(bucket, bucket.payload))
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == dtype
        assert torch.equal(received[name], tensor.to(dtype))
    assert all(spec.offset % 16 == 0 for spec in bucket.tensors)


def test_buckets_that_share_buffers_are_those_packed_alone() -> None:
    """A buffer is used again, for a smaller bucket with padding, and then for a larger one."""
    sizes = [40, 7, 3, 90, 5]
    gathered = [[(f"a{n}", torch.randn(n)), (f"b{n}", torch.randn(3))] for n in sizes]
    alone = [pack_bucket(named, torch.bfloat16) for named in gathered]
    stored = list(pack_buckets(gathered, torch.bfloat16, store=bytes))
    assert [b.checksum for b in stored] == [b.checksum for b in alone]
    assert [b.payload for b in stored] == [bytes(b.payload) for b in alone]
    verify_buckets(alone, [b.payload for b in alone])
    alone[3].payload[0] ^= 1
    with pytest.raises(WeightSyncError, match=r"weight bucket a90 \.\. b90"):
        verify_buckets(alone, [b.payload for b in alone])


def test_error_in_storing_a_bucket_is_raised() -> None:
    def full(payload: object) -> None:
        raise OSError("no space")

    gathered = [[("w", torch.ones(3))] for _ in range(3)]
    with pytest.raises(OSError, match="no space"):
        list(pack_buckets(gathered, torch.float32, store=full))


def test_transposed_parameters_and_gradients_do_not_matter() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T)
    ((_, received),) = unpack_bucket(
        bucket := pack_bucket([("w", weight)], torch.float32), bucket.payload
    )
    assert torch.equal(received, weight.detach())


def test_equal_weights_have_equal_checksums() -> None:
    first, second = (
        pack_bucket([("a", torch.ones(3)), ("b", torch.zeros(5))], torch.bfloat16) for _ in range(2)
    )
    assert first.checksum == second.checksum
    assert snapshot_checksum([first, second]) == snapshot_checksum([second, first])
    other = pack_bucket([("a", torch.ones(3) * 2)], torch.bfloat16)
    assert snapshot_checksum([first, other]) != snapshot_checksum([other, first])


@pytest.mark.parametrize("position", [0, 13, -1])
def test_one_flipped_bit_is_detected(position: int) -> None:
    bucket = pack_bucket([("first", torch.ones(3)), ("last", torch.ones(2))], torch.float32)
    payload = bucket.payload.copy()
    payload[position] ^= 1
    with pytest.raises(
        WeightSyncError, match=rf"first \.\. last \(2 tensors\): received .*{bucket.checksum}"
    ):
        verify_bucket(bucket, payload)


def test_short_and_wrong_payloads_are_refused() -> None:
    bucket = pack_bucket([("w", torch.ones(100))], torch.float32)
    with pytest.raises(WeightSyncError, match="has 399 bytes, its tensors need 400"):
        verify_bucket(bucket, bucket.payload[:399])
    with pytest.raises(WeightSyncError, match="expected flat uint8"):
        verify_bucket(bucket, bucket.payload.view("float32"))


EXPECTED: Mapping[str, tuple[int, ...]] = {"a": (3,), "b": (2, 2)}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"a": (3,)}, "missing b; unexpected none"),
        ({"a": (3,), "b": (2, 2), "c": ()}, "missing none; unexpected c"),
        ({"a": (3,), "b": (4,)}, r"b was sent with shape \(4,\), the model has \(2, 2\)"),
    ],
)
def test_names_and_shapes_must_be_the_models(
    sent: dict[str, tuple[int, ...]], message: str
) -> None:
    bucket = pack_bucket(
        [(name, torch.zeros(shape)) for name, shape in sent.items()], torch.float32
    )
    with pytest.raises(WeightSyncError, match=message):
        check_complete(EXPECTED, [bucket])


def test_parameter_may_be_sent_only_once() -> None:
    bucket = pack_bucket([("a", torch.zeros(3)), ("b", torch.zeros(2, 2))], torch.float32)
    check_complete(EXPECTED, [bucket])
    with pytest.raises(WeightSyncError, match="b was sent twice"):
        check_complete(EXPECTED, [bucket, replace(bucket, tensors=bucket.tensors[1:])])


def test_checkpoint_shapes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        checkpoint_shapes(tmp_path, tied=False)
    save_file(
        {"a": torch.zeros(3), "lm_head.weight": torch.zeros(4, 3)}, tmp_path / "1.safetensors"
    )
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {"b": torch.zeros(2, 2), "layer.rotary_emb.inv_freq": torch.zeros(2)},
        tmp_path / "2.safetensors",
    )
    assert checkpoint_shapes(tmp_path, tied=False) == {**EXPECTED, "lm_head.weight": (4, 3)}
    assert checkpoint_shapes(tmp_path, tied=True) == EXPECTED
