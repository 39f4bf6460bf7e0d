"""The forward pass against full logits, log_softmax and gather; and the learning-rate schedule."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rayhf.models.forward as forward
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.learner.schedule import lr_factor
from rayhf.losses.base import Totals
from rayhf.models.forward import (
    PolicyHead,
    SelectLogSoftmax,
    ValueHead,
    build_inputs,
    prepare_config,
)
from rayhf.types import Example, Row, token_array

V = 61


RESCALED = {
    "Gemma2": {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 1.5, "head_dim": 8},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.6},
    "Cohere": {"logit_scale": 0.3},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def make_policy(*, tied: bool = False, kind: str = "Qwen2") -> nn.Module:
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attention_dropout=0.1,
        **RESCALED.get(kind, {}),
    )
    prepare_config(config, attention="sdpa")
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.train()


def make_rows(lengths: list[tuple[int, int]]) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            prompt_id=f"p{i}",
            sample=i,
            prompt_ids=token_array(rng.integers(0, V, p).tolist()),
            response_ids=token_array(rng.integers(0, V, r).tolist()),
            tokens={"advantage": rng.normal(size=r).astype(np.float32)},
            scalars={"score": float(i)} if i % 2 else {},
        )
        for i, (p, r) in enumerate(lengths)
    ]


def plain_logprobs(model: nn.Module, row: Row, temperature: float) -> Tensor:
    """Return one row's log-probs from all its logits, without padding."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logp = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, dim=-1)
    start = len(row.prompt_ids) - 1
    return logp[start:-1].gather(1, ids[0, start + 1 :, None]).squeeze(1)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Qwen3", *RESCALED])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_logprobs_and_gradients_match_the_plain_formula(
    kind: str, tied: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(forward, "LOGITS_LIMIT", 5 * V)
    model = make_policy(tied=tied, kind=kind)
    rows = make_rows([(3, 7), (1, 1), (9, 4), (2, 12)])
    weight = torch.linspace(-1, 1, sum(len(r.response_ids) for r in rows))
    expected = torch.cat([plain_logprobs(model, row, 0.7) for row in rows])
    expected_gradient = torch.autograd.grad((expected * weight).sum(), list(model.parameters()))
    result, entropy = PolicyHead(model)(build_inputs(rows, "cpu"), 0.7)
    gradient = torch.autograd.grad((result * weight).sum(), list(model.parameters()))
    assert entropy is None
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_logprobs_are_bitwise_equal_in_every_mode() -> None:
    policy = PolicyHead(make_policy())
    inputs = build_inputs(make_rows([(3, 7), (1, 1), (9, 4)]), "cpu")
    with_gradient = policy.train()(inputs, 0.9)[0]
    with torch.no_grad():
        without = policy.eval()(inputs, 0.9)[0]
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient.detach(), without)


@pytest.mark.parametrize("entropy", ["off", "metric", "loss"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_select_log_softmax_gradients(entropy: forward.Entropy, tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, V, dtype=torch.float32, requires_grad=True)
    target = torch.randint(V, (6, tokens))  # with repeated ones
    a, b = torch.randn(6, tokens), torch.randn(6)

    def total(logp: Tensor, h: Tensor | None) -> Tensor:
        return (logp * a).sum() + ((h * b).sum() if h is not None and h.requires_grad else 0.0)

    logp, h = SelectLogSoftmax.apply(logits, target, entropy)
    actual = torch.autograd.grad(total(logp, h), logits)[0]
    full = torch.log_softmax(logits, -1)
    plain_h = -(full.exp() * full).sum(-1)
    plain = torch.autograd.grad(
        total(full.gather(1, target), plain_h if entropy == "loss" else None), logits
    )[0]
    torch.testing.assert_close(actual, plain)
    if entropy == "off":
        assert h is None
    else:
        torch.testing.assert_close(h, plain_h)
        assert h.requires_grad == (entropy == "loss")


def test_value_is_read_before_each_response_token() -> None:
    """Changing token t changes later values only."""
    import transformers

    config = make_policy().config
    config.num_labels = 1  # type: ignore[union-attr]
    value = ValueHead(transformers.Qwen2ForTokenClassification(config)).eval()
    row = make_rows([(4, 6)])[0]
    changed = Row(
        prompt_id="c",
        sample=0,
        prompt_ids=token_array(row.prompt_ids),
        response_ids=token_array((*row.response_ids[:2], 5, *row.response_ids[3:])),
    )
    a, b = (value(build_inputs([r], "cpu"), 1.0)[0] for r in (row, changed))
    assert torch.equal(a[:3], b[:3])
    assert not torch.isclose(a[3:], b[3:]).any()


def test_micro_batch_concatenates_rows() -> None:
    rows = make_rows([(3, 2), (1, 4), (2, 1)])
    examples = [Example(rows=(rows[0], rows[1]), scalars={"margin": 0.5}), Example(rows=(rows[2],))]
    micro = build_micro_batch(examples, Totals(tokens=7, rows=3, examples=2), "cpu")
    assert micro.row_T.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert micro.length_R.tolist() == [2, 4, 1]
    assert micro.example_R.tolist() == [0, 0, 1]
    assert micro.tokens["advantage"].tolist() == [
        float(x) for row in rows for x in row.tokens["advantage"]
    ]
    assert torch.equal(micro.rows["score"].isnan(), torch.tensor([True, False, True]))
    assert micro.rows["score"][1] == 1.0
    assert micro.examples["margin"][0] == 0.5 and micro.examples["margin"][1].isnan()


def test_row_without_prompt_or_response_is_refused() -> None:
    row = Row(prompt_id="q", sample=2, prompt_ids=token_array(()), response_ids=token_array((1,)))
    with pytest.raises(
        ConfigError, match="row of prompt 'q', sample 2: 0 prompt and 1 response tokens"
    ):
        build_inputs([row], "cpu")


def test_attention_with_capped_scores_is_not_left_to_sdpa() -> None:
    capped, plain = make_policy(kind="Gemma2").config, make_policy().config
    assert capped._attn_implementation == "eager" and plain._attn_implementation == "sdpa"


def test_schedule() -> None:
    def factors(kind: str, warmup: float) -> list[float]:
        return [
            lr_factor(s, total_steps=10, warmup=warmup, kind=kind, min_lr=0.1) for s in range(12)
        ]  # type: ignore[arg-type]

    assert factors("constant", 0.0) == [1.0] * 12
    assert factors("constant", 0.2)[:3] == [0.5, 1.0, 1.0]
    for kind in ("linear", "cosine"):
        values = factors(kind, 0.2)
        assert values[1:3] == [1.0, 1.0]
        assert values[9:] == pytest.approx([0.1] * 3)
        assert all(a >= b for a, b in pairwise(values[1:]))
    assert factors("linear", 0.0)[3] == pytest.approx(1 - 0.9 * 3 / 9)
