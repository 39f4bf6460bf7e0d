"""tests.bench.gpu where there is no GPU: its path from a random model to tables, and its FLOPs
against torch's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rayhf.models.forward import PolicyHead, build_inputs
from rayhf.planning.shape import read_shape
from tests.bench import gpu
from tests.bench.random_llama import make_rows, micro_batches, write_model


def test_tiny_size_runs_on_cpu() -> None:
    job = gpu.Job(kind="", size="tiny", model="", device="cpu", warmup=0, steps=1)
    text = gpu.report(job, checkpointing=(True,), devices=False)
    assert text.startswith("**Not measured on a GPU yet**") and "Seed 0: 180,672 parameters" in text
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    pace, memory, agreement = ([cell.strip() for cell in row.split("|")[2:-1]] for row in rows)
    assert (
        float(pace[1].replace(",", "")) > 0 and float(pace[2]) > 0 and pace[3] == ""
    )  # no peak, no MFU
    assert 0.5 < float(memory[3]) < 2
    assert float(agreement[1]) < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, checkpointing: bool) -> None:
    """Torch counts attention as if every token saw all of its row, which is one more time what
    causal attention costs."""
    size = gpu.SIZES["tiny"]
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
    expected = gpu.flops(shape, [micro], padded=True, recomputed=checkpointing) + unmasked
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert gpu.flops(shape, [micro], padded=False, recomputed=False) < expected
