"""tests.bench.gpu_pace where there is no GPU: its path from a random model to tables, and its FLOPs
against torch's own count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rayhf.models.forward import PolicyHead, build_inputs
from rayhf.planning.shape import read_shape
from tests.bench import gpu, gpu_pace
from tests.bench.random_llama import make_rows, micro_batches, write_model


def test_tiny_size_runs_on_cpu() -> None:
    job = gpu_pace.Job(kind="", size="tiny", model="", device="cpu", warmup=0, steps=1)
    text = gpu_pace.report(job, checkpointing=(True,), devices=False)
    assert text.startswith("**Not measured on a GPU yet**") and "Seed 0: 180,672 parameters" in text
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    pace, memory, agreement = ([cell.strip() for cell in row.split("|")[2:-1]] for row in rows)
    assert float(pace[1].replace(",", "")) > 0 and float(pace[2]) > 0
    assert pace[3] == ""  # the CPU has no peak in the table, so there is no MFU
    assert 0.5 < float(memory[3]) < 2
    assert float(agreement[1]) < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, checkpointing: bool) -> None:
    """Torch counts attention as if every token saw all of its row, which is one more time what
    causal attention costs."""
    size = gpu_pace.SIZES["tiny"]
    write_model(size, tmp_path, seed=0, device="cpu")
    shape = read_shape(tmp_path, key="model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (micro, *_) = micro_batches(make_rows(size, seed=0), size.budget)
    with FlopCounterMode(display=False) as counter:
        PolicyHead(model)(build_inputs(micro, "cpu"), 1.0)[0].sum().backward()
    passes = 4 if checkpointing else 3
    seen = len(micro) * (max(map(len, micro)) - 1) ** 2
    unmasked = passes * 2 * shape.layers * shape.heads * shape.head_dim * seen
    expected = gpu_pace.flops(shape, [micro], padded=True, recomputed=checkpointing) + unmasked
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert gpu_pace.flops(shape, [micro], padded=False, recomputed=False) < expected


@pytest.mark.parametrize("name", gpu.STEPS)
def test_every_step_says_that_there_is_no_gpu(name: str) -> None:
    with pytest.raises(SystemExit, match="sees no CUDA device here; nothing was run"):
        gpu.run_step(name)


def test_steps_end_at_their_limits_and_do_not_stop_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real child processes: one that refuses without a GPU, one that gets no time."""
    monkeypatch.setitem(gpu.STEPS, "pace", replace(gpu.STEPS["pace"], limit_s=0.01))
    worked, text = gpu.run_steps(["pace", "nccl"])
    assert not worked
    assert "**pace**: **failed**" in text and "not done after 0 s" in text
    assert "**nccl**: **failed**" in text and "sees no CUDA device here" in text
