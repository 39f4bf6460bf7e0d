"""Distillation on the teacher's likeliest tokens: the KL, the forward passes, a run, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaigns import metrics_of, run_campaign
from chat_tokenizer import make_model_directory
from fakes import FakeLearner, FakeScorer
from test_distill import config_of
from test_learner_forward import V, make_policy, make_rows
from test_policy_gradient import build
from torch import Tensor

import rayhf.models.forward as forward
from rayhf.config.registry import ALGORITHMS
from rayhf.config.schema import Packing
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.losses.distill import DistillLoss, top_reverse_kl
from rayhf.models.forward import PolicyHead, build_inputs, prepare_config
from rayhf.models.outputs import split_top
from rayhf.planning.preflight import check_settings
from rayhf.planning.reference import check_teacher
from rayhf.scorer.none import NoScorer
from rayhf.types import Example, Row


def full_kl(policy: Tensor, teacher: Tensor) -> Tensor:
    return (policy.exp() * (policy - teacher)).sum(-1)


@pytest.mark.parametrize("k", [4, 5])
def test_kl_of_all_tokens_is_exact_in_value_and_gradient(k: int) -> None:
    """With one token left out, the rest is that token."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    policy = torch.log_softmax(logits, -1)
    teacher = torch.log_softmax(torch.randn(3, 5, dtype=torch.float64), -1)
    top = teacher.topk(k).indices
    kl = top_reverse_kl(policy.gather(1, top), teacher.gather(1, top))
    expected = full_kl(policy, teacher)
    torch.testing.assert_close(kl, expected)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (kl, expected)]
    torch.testing.assert_close(*gradients)


def test_kl_of_fewer_tokens_is_smaller_and_sees_the_rest() -> None:
    torch.manual_seed(0)
    policy = torch.log_softmax(3 * torch.randn(200, 50, dtype=torch.float64), -1)
    teacher = torch.log_softmax(3 * torch.randn(200, 50, dtype=torch.float64), -1)
    kls = []
    for k in (1, 4, 16, 49):
        top = teacher.topk(k).indices
        kls.append(top_reverse_kl(policy.gather(1, top), teacher.gather(1, top)))
        assert (kls[-1] >= -1e-5).all()
    ordered = [*kls, full_kl(policy, teacher)]
    assert all((a <= b + 1e-4).all() for a, b in pairwise(ordered))
    # Equal within the top tokens after renormalizing, but half of the policy is elsewhere.
    half = torch.tensor([[0.5, 0.4]]).log() + np.log(0.5)
    assert top_reverse_kl(half, torch.tensor([[0.5, 0.4]]).log()).item() > 0.3


def test_kl_is_finite_where_one_token_has_all_probability() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]], requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([[60.0, 0.0, 0.0], [60.0, 0.0, 0.0]]), -1)
    kl = top_reverse_kl(torch.log_softmax(logits, -1)[:, :1], teacher[:, :1])
    assert kl[0].item() == 0.0 and 13.0 < kl[1].item() < 14.0  # log(1 / SMALLEST_REST)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isfinite().all()


def with_top(rows: list[Row], teacher: PolicyHead, k: int) -> list[Row]:
    with torch.no_grad():
        output = teacher(build_inputs(rows, "cpu", packing=teacher.packing), 0.7, "off", k)
    tops = split_top(output, [len(row.response_ids) for row in rows])
    return [row.with_tokens(top, ref_logp=top.sampled) for row, top in zip(rows, tops, strict=True)]


def all_logps(model: torch.nn.Module, row: Row) -> Tensor:
    """Return the whole distribution before each response token: (T, V)."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logp = torch.log_softmax(model(input_ids=ids).logits[0].float() / 0.7, dim=-1)
    return logp[len(row.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("packing", ["off", "rows", "tree"])
def test_teacher_and_policy_agree_with_all_logits(
    packing: Packing, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(forward, "LOGITS_LIMIT", 5 * V)
    plain_teacher = make_policy(kind="Llama")
    plain_policy = make_policy(kind="Qwen2")
    k = 6
    rows = make_rows([(3, 7), (1, 1), (9, 4)])
    # Two more of the first prompt, which share a prefix with it.
    first = rows[0]
    rows += [
        Row(
            prompt_id=first.prompt_id,
            sample=n,
            prompt_ids=first.prompt_ids,
            response_ids=np.concatenate([first.response_ids[:n], rows[2].response_ids]),
            tokens={"advantage": np.zeros(n + 4, np.float32)},
        )
        for n in (2, 5)
    ]
    teacher_TV = torch.cat([all_logps(plain_teacher, row) for row in rows]).detach()
    policy_TV = torch.cat([all_logps(plain_policy, row) for row in rows])
    top_TK = teacher_TV.topk(k).indices
    weight = torch.linspace(-1, 1, len(teacher_TV))
    expected = top_reverse_kl(policy_TV.gather(1, top_TK), teacher_TV.gather(1, top_TK))
    wanted = torch.autograd.grad((expected * weight).sum(), list(plain_policy.parameters()))
    for model in (plain_teacher, plain_policy):
        prepare_config(model.config, attention="sdpa", packing=packing)  # type: ignore[arg-type]
    annotated = with_top(rows, PolicyHead(plain_teacher, packing), k)
    assert all(row.reference_top is not None for row in annotated)
    inputs = build_inputs(annotated, "cpu", packing=packing)
    assert inputs.top_TK is not None and torch.equal(inputs.top_TK, top_TK)
    output, _ = PolicyHead(plain_policy, packing)(inputs, 0.7)
    totals = Totals(tokens=1, rows=1, examples=1)
    micro = build_micro_batch([Example(rows=(row,)) for row in annotated], totals, "cpu")
    assert micro.reference_top_TK is not None
    torch.testing.assert_close(
        micro.reference_top_TK, teacher_TV.gather(1, top_TK), rtol=1e-4, atol=1e-4
    )
    plain, _ = PolicyHead(plain_policy, packing)(build_inputs(rows, "cpu", packing=packing), 0.7)
    assert plain.shape == (len(teacher_TV),) and torch.equal(plain, output[:, 0])
    kl = top_reverse_kl(output[:, 1:], micro.reference_top_TK)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad((kl * weight).sum(), list(plain_policy.parameters()))
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_loss_is_the_reward_s_plus_the_kl() -> None:
    rows = with_top(make_rows([(3, 4), (2, 3)]), PolicyHead(make_policy()), 5)
    rows = [row.with_tokens(behavior_logp=row.tokens["ref_logp"]) for row in rows]
    totals = Totals(tokens=7, rows=2, examples=2)
    micro = build_micro_batch([Example(rows=(row,)) for row in rows], totals, "cpu")
    output, _ = PolicyHead(make_policy(kind="Llama"))(build_inputs(rows, "cpu"), 0.7)
    settings = {"type": "distill", "samples": 2, "top_k": 5, "reward_coef": 0.5}
    loss = build(**settings, kl={"coef": 0.25}).loss()
    assert isinstance(loss, DistillLoss)
    with pytest.raises(ValueError, match="the rows have none"):
        loss(output[:, 0], micro)
    result = loss(output[:, 0], replace(micro, top_TK=output[:, 1:]))
    kl_T = top_reverse_kl(output[:, 1:], micro.reference_top_TK)  # type: ignore[arg-type]
    reward = loss.policy(output[:, 0], micro).loss
    torch.testing.assert_close(result.loss, reward + 0.25 * kl_T.mean())
    assert result.metrics["distill/kl"].item() == pytest.approx(kl_T.sum().item() / 2, rel=1e-5)
    assert 0 < result.metrics["distill/policy_mass"] < 1
    assert reward.item() != 0.0


def rows_of(roles: Any) -> list[Row]:
    """Return all rows that were trained on; without scores, which are NaN."""
    learner = roles.learners["policy"]
    assert isinstance(learner, FakeLearner)
    examples = [example for batch in learner.batches for example in batch.examples]
    return [replace(row, scalars={}) for example in examples for row in example.rows]


def test_rows_carry_the_teachers_tokens_also_streamed_and_resumed(tmp_path: Path) -> None:
    algorithm = {"top_k": 3}
    configs = {
        name: config_of(tmp_path / name, algorithm=algorithm, reference=reference)
        for name, reference in {
            "plain": {"model": "teacher"},
            "streamed": {"model": "teacher", "stream": "on"},
            "resumed": {"model": "teacher"},
        }.items()
    }
    check_settings(configs["plain"])
    runs = {}
    roles: dict[str, Any] = {"scorer": NoScorer(), "heldout": ()}
    for name in ("plain", "streamed"):
        runs[name] = rows_of(run_campaign(configs[name], **roles))
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(configs["resumed"], learner=FakeLearner(fail_at=3), **roles)
    resumed = rows_of(run_campaign(configs["resumed"], **roles))
    assert runs["plain"] == runs["streamed"]
    assert resumed == runs["plain"][-len(resumed) :]
    assert metrics_of(configs["plain"]) == metrics_of(configs["resumed"])
    for row in runs["plain"]:
        assert row.reference_top is not None and row.reference_top.top_ids.shape == (3, 3)
        assert row.tokens["ref_logp"].tolist() == [-1.0] * 3
        assert row.tokens["advantage"].tolist() == [0.0] * 3  # the teacher is in the loss


def test_reward_is_the_advantage(tmp_path: Path) -> None:
    algorithm = {"top_k": 3, "reward_coef": 1.0, "scale": "none"}
    config = config_of(
        tmp_path, algorithm=algorithm, scorer={"train": [{"type": "rule", "function": "m:f"}]}
    )
    check_settings(config)
    rows = rows_of(run_campaign(config, scorer=FakeScorer(), heldout=()))
    assert any(row.tokens["advantage"].any() for row in rows)
    assert all(len(set(row.tokens["advantage"].tolist())) == 1 for row in rows)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"discount": 0.5}, "expected discount 0, or top_k 0"),
        ({"reward_clip": 2.0}, "expected null, or reward_coef above 0"),
        ({"top_k": -1}, r"algorithm\.top_k"),
    ],
)
def test_refusals(tmp_path: Path, algorithm: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config_of(tmp_path, algorithm={"top_k": 4, **algorithm})


def test_teacher_with_more_tokens_than_the_policy_is_refused(tmp_path: Path) -> None:
    models = {}
    for name, size in {"policy": 100, "teacher": 104}.items():
        directory = make_model_directory(tmp_path / name)
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**settings, "vocab_size": size}))
        models[name] = directory

    def check(policy: str, teacher: str, top_k: int) -> None:
        config = config_of(tmp_path, algorithm={"top_k": top_k})
        given = {"policy.model": models[policy], "reference.model": models[teacher]}
        check_teacher(config, ALGORITHMS.build(config.algorithm), given)

    check("teacher", "policy", 99)
    check("policy", "teacher", 0)
    with pytest.raises(ConfigError, match=r"top_k=0, or a teacher with at most 100"):
        check("policy", "teacher", 4)
    with pytest.raises(ConfigError, match=r"reference\.model has 100 tokens; expected less"):
        check("teacher", "policy", 100)
