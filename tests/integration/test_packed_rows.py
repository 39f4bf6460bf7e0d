"""Packed rows compute what padded ones do, one row at a time: every architecture of the table.

Random tiny models in float32 on CPU, with sequences longer than their sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import BASE, SETTINGS, VOCABULARY
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import rayhf.models.tree_attention as tree_attention
from rayhf.config.schema import LearnerConfig, Packing
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.losses.sft import SFTLoss
from rayhf.models.architectures import ARCHITECTURES, check_packing, packing_of
from rayhf.models.forward import PolicyHead, build_inputs, prepare_config
from rayhf.types import Example, Row, token_array

TOLERANCE = 1e-5
"""Of log-probs in nats, and of gradients as a share of the largest."""


def make_row(prompt_id: str, prompt: Sequence[int], response: Sequence[int]) -> Row:
    return Row(
        prompt_id=prompt_id,
        sample=0,
        prompt_ids=token_array(prompt),
        response_ids=token_array(response),
    )


def make_rows() -> list[Row]:
    """Return samples of one prompt, a pair, paths of a search tree, and a row twice."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(3, VOCABULARY, count).tolist()

    prompt = ids(40)
    samples = [make_row("samples", prompt, ids(int(n))) for n in rng.integers(1, 12, 4)]
    stem = ids(30)
    steps = [ids(9), ids(7)]
    paths = [
        make_row("tree", stem, steps[0]),
        make_row("tree", stem, steps[1]),
        make_row("tree", stem + steps[0], ids(5)),
        make_row("tree", stem + steps[0], ids(8)),
        make_row("tree", stem + steps[0][:4], ids(8)),
    ]
    pair = [make_row("pair", ids(3), ids(20)), make_row("pair", ids(3), ids(2))]
    return [samples[0], pair[0], *paths, *samples[1:], pair[1], samples[2]]


def make_model(model_type: str, packing: Packing) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {k: v for k, v in (BASE | SETTINGS[model_type]).items() if v != "unset"}
    config = CONFIG_MAPPING[model_type](**settings)
    prepare_config(config, attention="sdpa", packing=packing)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def run(model: PreTrainedModel, batches: Sequence[Sequence[Row]], packing: Packing) -> list[Tensor]:
    """Return log-probs, and the gradients of their weighted sum."""
    head = PolicyHead(model)
    logp_T = torch.cat([head(build_inputs(b, "cpu", packing=packing), 0.7)[0] for b in batches])
    weight_T = torch.linspace(-1, 1, len(logp_T))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((logp_T * weight_T).sum(), parameters, allow_unused=True)
    return [logp_T.detach(), *(g for g in gradients if g is not None)]


def gap(model_type: str, packing: Packing) -> float:
    """Return the largest difference between packed rows and rows one at a time."""
    rows = make_rows()
    alone = run(make_model(model_type, "off"), [[row] for row in rows], "off")
    packed = run(make_model(model_type, packing), [rows], packing)
    assert len(alone) == len(packed)
    logprobs = float((alone[0] - packed[0]).abs().max())
    largest = max(float(gradient.abs().max()) for gradient in alone[1:])
    gradients = [
        float((a - b).abs().max()) / largest for a, b in zip(alone[1:], packed[1:], strict=True)
    ]
    return max(logprobs, *gradients)


PACKED = [name for name, e in ARCHITECTURES.items() if not (e.refused or e.padded)]


@pytest.mark.parametrize("model_type", PACKED)
def test_packed_rows_equal_rows_one_at_a_time(model_type: str) -> None:
    assert gap(model_type, "tree") < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_sequences_of_several_blocks(
    model_type: str, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "BLOCK", 16)
    assert gap(model_type, packing) < TOLERANCE


@pytest.mark.parametrize("model_type", [n for n, e in ARCHITECTURES.items() if e.padded])
def test_models_that_cannot_take_packed_rows_fail_rather_than_ignore_the_tree(
    model_type: str,
) -> None:
    with pytest.raises(RuntimeError, match=r"set learner\.packing=off"):
        gap(model_type, "tree")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_flex_attention_computes_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, on the CPU: only its forward pass runs there."""
    rows = make_rows()
    head = PolicyHead(make_model(model_type, "tree"))
    inputs = build_inputs(rows, "cpu", packing="tree")
    expected = head(inputs, 1.0)[0]
    monkeypatch.setattr(tree_attention, "FLEX_DEVICES", ("cpu",))
    with torch.compiler.set_stance("force_eager"):
        actual = head(build_inputs(rows, "cpu", packing="tree"), 1.0)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_loss_of_packed_conversations_is_the_padded_one() -> None:
    """sft: assistant tokens only, of conversations that share nothing."""
    rng = np.random.default_rng(1)
    examples = []
    for number, length in enumerate((3, 40, 17, 5, 29)):
        mask = (rng.random(length) < 0.6).astype(np.float32)
        row = make_row(f"p{number}", rng.integers(3, VOCABULARY, 4).tolist(), [7] * length)
        row = row.with_tokens(mask=mask)
        examples.append(Example(rows=(row,), scalars={"trained_tokens": float(mask.sum())}))
    rows = [row for example in examples for row in example.rows]
    trained = sum(example.scalars["trained_tokens"] for example in examples)
    totals = Totals(tokens=94, rows=5, examples=5, scalars={"trained_tokens": trained})
    micro = build_micro_batch(examples, totals, "cpu")

    def loss(packing: Packing) -> dict[str, float]:
        head = PolicyHead(make_model("llama", packing))
        inputs = build_inputs(rows, "cpu", packing=packing)
        logp_T, entropy_T = head(inputs, 1.0, "metric")
        output = SFTLoss()(logp_T, replace(micro, entropy_T=entropy_T))
        return {name: float(value) for name, value in output.metrics.items()}

    for packing in ("tree", "rows"):
        assert loss(packing) == pytest.approx(loss("off"), rel=1e-5)


def test_what_cannot_be_packed_is_padded_or_refused() -> None:
    def line(model_type: str, **settings: str) -> str:
        config = LearnerConfig(**settings)  # type: ignore[arg-type]
        return check_packing({"model_type": model_type}, config, key="policy.model")

    assert line("llama") == "policy.model: rows packed, shared prefixes once"
    assert line("llama", packing="rows") == "policy.model: rows packed, every row whole"
    assert line("llama", packing="off") == "policy.model: padded rows (learner.packing=off)"
    assert line("nemotron").startswith("policy.model: padded rows (nemotron: its layers")
    assert line("llama", attention="eager").startswith("policy.model: padded rows (learner.atten")
    assert packing_of("bloom", LearnerConfig()) == "off"
    for packing in ("tree", "rows"):
        with pytest.raises(ConfigError, match=f"learner.packing is {packing}, but rows of policy"):
            line("stablelm", packing=packing)
