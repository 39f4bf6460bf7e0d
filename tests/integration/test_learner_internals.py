"""DeepSpeed's internals are as rayhf.weights.deepspeed_internals describes them, at every stage."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, WeightedLogp, advance, start

from rayhf.config.schema import LoraConfig

ADAPTED = LoraConfig(rank=2, alpha=4)
STAGES = [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]


def move_masters(
    keywords: dict[str, Any], model: Path, stage: int, dtype: str, lora: LoraConfig | None
) -> dict[str, tuple[int, int, int]]:
    """Compare masters with the model, change them, and compare again.

    Returns each parameter's first element and number of elements on this rank, and its size.
    """
    from rayhf.weights.deepspeed_internals import trained_parameters, update_model

    engine = start(keywords, model, lora=lora, zero_stage=stage, dtype=dtype)
    whole = whole_parameters(engine)
    parameters = trained_parameters(engine.engine)
    assert [(p.name, p.shape) for p in parameters] == [(n, t.shape) for n, t in whole.items()]
    for parameter in parameters:
        if (shard := parameter.shard) is not None:
            master = shard.of(shard.flat)
            part = whole[parameter.name].flatten()[shard.first : shard.first + shard.numel]
            assert master.dtype == torch.float32 and torch.equal(master.to(part.dtype), part)
            master.mul_(-2)
    with torch.no_grad():
        update_model(engine.engine)
    for name, tensor in whole_parameters(engine).items():
        assert torch.equal(tensor, -2 * whole[name]), name
    return {p.name: (*p.range(), p.numel()) for p in parameters}


def whole_parameters(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    named = {n: p for n, p in engine.engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.stage == 3):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"), [*((*case, None) for case in STAGES), (3, "float32", ADAPTED)]
)
def test_masters_are_where_they_are_expected_and_reach_the_model(
    two: Ranks, untied: Path, stage: int, dtype: str, lora: LoraConfig | None
) -> None:
    first, second = two.call(move_masters, untied, stage, dtype, lora)
    assert first.keys() == second.keys()
    for name, (start_0, numel_0, size) in first.items():
        start_1, numel_1, _ = second[name]
        if stage == 0:
            assert (start_0, numel_0) == (start_1, numel_1) == (0, size)
        else:
            assert numel_0 + numel_1 == size
            assert numel_0 in (0, size) or (start_0, start_1) == (0, numel_0)


def step_and_list_storages(keywords: dict[str, Any], model: Path, stage: int, dtype: str) -> None:
    from rayhf.weights.deepspeed_internals import device_storages, step_was_skipped

    engine = start(keywords, model, zero_stage=stage, dtype=dtype)
    advance(engine, range(1), 100, WeightedLogp())
    optimizer = engine.engine.basic_optimizer
    states = list(optimizer.state.values())
    expected = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    if stage:  # at stage 0 on CPU the weights are in a mapped file
        assert not step_was_skipped(engine.engine)
        expected += [p for group in optimizer.param_groups for p in group["params"]]
        expected += [getattr(p, "ds_tensor", p) for p in engine.engine.module.parameters()]
    pointers = {storage.data_ptr() for storage in device_storages(engine.engine)}
    assert states and {t.untyped_storage().data_ptr() for t in expected} <= pointers


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_all_storages_are_found(two: Ranks, untied: Path, stage: int, dtype: str) -> None:
    two.call(step_and_list_storages, untied, stage, dtype)


def check_process(keywords: dict[str, Any], model: Path) -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    timeout_s = start(keywords, model).config.collective_timeout_s
    assert deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] is False
    assert build_shm_op() is None
    backend = torch.distributed.new_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=timeout_s)


def test_no_shared_memory_build_and_a_timeout_for_new_groups(two: Ranks, untied: Path) -> None:
    two.call(check_process, untied)
