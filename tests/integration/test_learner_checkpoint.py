"""Real DeepSpeed on CPU: resume is exact, and a damaged checkpoint is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, SquaredError, WeightedLogp, advance, relative, start, weights

from rayhf.config.schema import LoraConfig
from rayhf.errors import CheckpointError


def resume(
    keywords: dict[str, Any],
    model: Path,
    directory: Path,
    config: dict[str, Any],
    lora: LoraConfig | None,
) -> bool:
    whole = start(keywords, model, lora=lora, **config)
    losses = advance(whole, range(10), 100, WeightedLogp())
    first = start(keywords, model, lora=lora, **config)
    advance(first, range(5), 100, WeightedLogp())
    first.save(directory)
    torch.rand(3)
    second = start(keywords, model, lora=lora, **config)
    second.load(directory)
    assert second.steps == 5
    assert advance(second, range(5, 10), 100, WeightedLogp()) == losses[5:]
    a = weights(whole)
    b = weights(second)
    return all(np.array_equal(a[name], b[name]) for name in a)


DROPOUT = LoraConfig(rank=2, alpha=4, dropout=0.3)


@pytest.mark.parametrize(("stage", "lora"), [(0, None), (2, None), (3, None), (2, DROPOUT)])
def test_resume_is_bit_identical(
    one: Ranks, untied: Path, tmp_path: Path, stage: int, lora: LoraConfig | None
) -> None:
    config = {"zero_stage": stage, "schedule": "cosine", "warmup": 0.3}
    assert one.call(resume, untied, tmp_path, config, lora) == [True]


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [(3, "bfloat16", None), (2, "bfloat16", None), (2, "float32", DROPOUT)],
)
def test_resume_on_two_ranks(
    two: Ranks, tied: Path, tmp_path: Path, stage: int, dtype: str, lora: LoraConfig | None
) -> None:
    assert two.call(resume, tied, tmp_path, {"zero_stage": stage, "dtype": dtype}, lora)[0]


def write(
    keywords: dict[str, Any],
    model: Path,
    directory: Path,
    head: str,
    lora: LoraConfig | None,
    config: Any,
) -> Any:
    """Take three steps, save many small files, take two more steps.

    Returns the last steps' metrics, the weights before and after all, and the state at the save.
    """
    from rayhf.learner import checkpoint

    engine = start(keywords, model, head=head, lora=lora, **config)
    before = weights(engine)
    loss = WeightedLogp() if head == "policy" else SquaredError()
    advance(engine, range(3), 100, loss)
    checkpoint.save(
        engine.engine, directory, engine.identity(), steps=engine.steps, share_bytes=8_000
    )
    state = masters(engine)
    return advance(engine, range(3, 5), 100, loss), before, weights(engine), state


def masters(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return masters and moments as torch's optimizer or DeepSpeed's own helpers have them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    result = {}
    for name, parameter in engine.engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.stage == 0:
            result[name] = parameter.detach()
            result.update(
                {
                    f"{name}.{key}": engine.engine.optimizer.state[parameter][key]
                    for key in ("exp_avg", "exp_avg_sq")
                }
            )
        else:
            result[name] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                result[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
    return {name: tensor.detach().numpy().copy() for name, tensor in result.items()}


def read(
    keywords: dict[str, Any],
    model: Path,
    directory: Path,
    again: Path,
    head: str,
    lora: LoraConfig | None,
    config: Any,
) -> Any:
    """Load the checkpoint, save it again, and take the same two steps as `write`."""
    engine = start(keywords, model, head=head, lora=lora, **config)
    before = weights(engine)
    engine.load(directory)
    assert engine.steps == 3
    engine.save(again)
    return (
        advance(engine, range(3, 5), 100, WeightedLogp() if head == "policy" else SquaredError()),
        before,
        weights(engine),
    )


def saved(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors of a checkpoint but the random states."""
    from safetensors.numpy import load_file

    files = [*directory.glob("weights-*"), *directory.glob("optimizer-*")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


FLOAT32 = {"dtype": "float32"}
DECAYED = {"weight_decay": 0.1}
BFLOAT16 = {"dtype": "bfloat16"}
ADAPTED = LoraConfig(rank=2, alpha=4)


@pytest.mark.parametrize(
    ("head", "lora", "before", "after"),
    [
        *(
            ("policy", None, (i, s, FLOAT32), (j, s, FLOAT32))
            for s in (0, 2, 3)
            for i, j in ((2, 2), (2, 1), (1, 2))
        ),
        ("policy", None, (2, 3, FLOAT32), (1, 0, FLOAT32)),
        ("policy", None, (1, 0, DECAYED), (2, 2, DECAYED)),
        ("policy", None, (2, 3, DECAYED), (2, 1, DECAYED)),
        ("value", ADAPTED, (2, 2, FLOAT32), (1, 3, FLOAT32)),
        ("policy", None, (2, 2, BFLOAT16), (1, 2, BFLOAT16)),
        ("policy", None, (2, 1, BFLOAT16), (2, 3, BFLOAT16)),
        ("policy", None, (2, 3, BFLOAT16), (1, 0, FLOAT32)),
    ],
    ids=lambda value: (
        f"{value[0]}x-zero{value[1]}-{'-'.join(map(str, value[2].values()))}"
        if isinstance(value, tuple)
        else None
    ),
)
def test_checkpoint_fits_any_ranks_and_stage(
    one: Ranks,
    two: Ranks,
    tied_llama: Path,
    tmp_path: Path,
    head: str,
    lora: LoraConfig | None,
    before: Any,
    after: Any,
) -> None:
    ranks = {1: one, 2: two}
    settings = [
        {"zero_stage": stage, "schedule": "cosine", "warmup": 0.3, **more}
        for _, stage, more in (before, after)
    ]
    *expected, state = ranks[before[0]].call(
        write, tied_llama, tmp_path / "a", head, lora, settings[0]
    )[0]
    result = ranks[after[0]].call(
        read, tied_llama, tmp_path / "a", tmp_path / "b", head, lora, settings[1]
    )[0]
    first = saved(tmp_path / "a")
    second = saved(tmp_path / "b")
    assert (
        len(list((tmp_path / "a").glob("weights-*")))
        > len(list((tmp_path / "b").glob("weights-*")))
        == after[0]
    )
    assert first.keys() == second.keys() == state.keys() and any(
        name.endswith("exp_avg_sq") for name in first
    )
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, state[name], err_msg=name)
        assert tensor.dtype == np.float32 and tensor.tobytes() == second[name].tobytes(), name
    if before == after:
        assert result[0] == expected[0]
        assert all(np.array_equal(result[2][name], expected[2][name]) for name in expected[2])
    else:
        tolerance = 1e-5 if before[2] == after[2] != BFLOAT16 else 2e-2
        for actual, wanted in zip(result[0], expected[0], strict=True):
            assert actual == pytest.approx(wanted, rel=tolerance, abs=tolerance)
        assert relative(result, expected) < (1e-5 if tolerance == 1e-5 else 0.2)


def refuse(keywords: dict[str, Any], model: Path, other: Path, directory: Path) -> None:
    start(keywords, model, zero_stage=0).save(directory)
    index = directory / "learner.json"
    file = directory / "weights-00000.safetensors"
    found = sorted(path.name for path in directory.parent.rglob("*") if path.is_file())
    assert found == [
        "learner.json",
        "optimizer-00000.safetensors",
        "random-00000.safetensors",
        "weights-00000.safetensors",
    ]
    with pytest.raises(CheckpointError, match="head=policy, this learner has head=value"):
        start(keywords, model, head="value").load(directory)
    with pytest.raises(CheckpointError, match="lora=False, this learner has lora=True"):
        start(keywords, model, lora=ADAPTED).load(directory)
    with pytest.raises(
        CheckpointError,
        match=r"another model: it has model\.lm_head\.weight with shape None, "
        r"this learner \(97, 32\)",
    ):
        start(keywords, other).load(directory)
    engine = start(keywords, model, zero_stage=2)
    advance(engine, range(1), 100, WeightedLogp())
    before = weights(engine)
    content = index.read_text()
    tensors = file.read_bytes()
    changed = json.loads(content)
    name = next(iter(changed["parameters"]))
    changed["parameters"][name]["shape"] = [96, 32]
    index.write_text(json.dumps(changed))
    with pytest.raises(
        CheckpointError, match=rf"{name} with shape \(96, 32\), this learner \(97, 32\)"
    ):
        engine.load(directory)
    index.write_text(content)
    file.write_bytes(tensors.replace(b"[97,32]", b"[32,97]"))
    with pytest.raises(
        CheckpointError, match=r"weights-00000\.safetensors does not hold what learner\.json says"
    ):
        engine.load(directory)
    file.write_bytes(tensors[:-4])
    with pytest.raises(CheckpointError, match=r"cannot read .*weights-00000"):
        engine.load(directory)
    file.write_bytes(tensors)
    (directory / "optimizer-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*optimizer-00000"):
        engine.load(directory)
    with pytest.raises(CheckpointError, match="no learner checkpoint"):
        engine.load(directory / "nowhere")
    after = weights(engine)
    assert engine.steps == 1 and all(np.array_equal(before[name], after[name]) for name in before)


def test_wrong_or_damaged_checkpoint_changes_nothing(
    one: Ranks, tied_llama: Path, untied: Path, tmp_path: Path
) -> None:
    one.call(refuse, tied_llama, untied, tmp_path / "state")
