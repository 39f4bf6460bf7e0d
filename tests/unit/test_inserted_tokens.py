"""Tokens between those of a response: read by the model, and nothing of them is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_learner_forward import V, make_policy

from rayhf.algorithms.advantages import gae
from rayhf.algorithms.grpo import GRPO, GRPOConfig
from rayhf.algorithms.policy_gradient_config import KLConfig
from rayhf.algorithms.ppo import PPO, PPOConfig
from rayhf.algorithms.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusConfig
from rayhf.config.schema import Packing
from rayhf.episodes import Inserted
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import LossOutput, Totals
from rayhf.losses.preference import Sigmoid, SigmoidConfig
from rayhf.models.forward import PolicyHead, build_inputs, prepare_config
from rayhf.models.packing import pack_examples
from rayhf.types import Example, Row, token_array


def episode(prompt: int, turns: list[int], replies: list[int], *, seed: int = 0) -> Row:
    """Return a row of turns and, between them, replies of so many tokens."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(turns)
    before = [int(end) for end, tokens in zip(ends, replies, strict=False) for _ in range(tokens)]
    tokens = int(ends[-1])
    return Row(
        prompt_id="p",
        sample=seed,
        prompt_ids=token_array(rng.integers(0, V, prompt).tolist()),
        response_ids=token_array(rng.integers(0, V, tokens).tolist()),
        tokens={
            "advantage": rng.normal(size=tokens).astype(np.float32),
            "behavior_logp": -rng.random(tokens).astype(np.float32),
            "ref_logp": -rng.random(tokens).astype(np.float32),
        },
        scalars={"score": 0.0, "truncated": 0.0},
        inserted=Inserted(
            token_ids=token_array(rng.integers(0, V, len(before)).tolist()),
            before=token_array(before),
        )
        if before
        else None,
    )


ROWS = [
    episode(3, [2, 4, 1], [5, 3], seed=1),
    episode(3, [6], [], seed=2),
    episode(4, [1, 1], [2], seed=3),
]


def whole(row: Row) -> tuple[list[int], list[bool]]:
    """Return all tokens of a row, and which of them the policy wrote."""
    ids = row.prompt_ids.tolist()
    own = [False] * len(ids)
    inserted = row.inserted
    for place, token in enumerate(row.response_ids.tolist()):
        if inserted is not None:
            between = inserted.token_ids[inserted.before == place].tolist()
            ids += between
            own += [False] * len(between)
        ids.append(token)
        own.append(True)
    return ids, own


def masked_logps(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """Return the log-probs of the policy's tokens: those of all tokens, masked."""
    ids, own = whole(row)
    logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    chosen = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return chosen[torch.tensor(own[1:])]


@pytest.mark.parametrize("packing", ["off", "rows", "tree"])
def test_logps_and_gradients_are_those_of_a_mask(packing: Packing) -> None:
    plain = make_policy(kind="Llama")
    model = make_policy(kind="Llama")
    prepare_config(model.config, attention="sdpa", packing=packing)  # type: ignore[arg-type]
    weight = torch.linspace(-1, 1, sum(len(row.response_ids) for row in ROWS))
    expected = torch.cat([masked_logps(plain, row) for row in ROWS])
    inputs = build_inputs(ROWS, "cpu", packing=packing)
    result, _ = PolicyHead(model, packing)(inputs, 1.0)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad((result * weight).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((expected * weight).sum(), list(plain.parameters()))
    for actual, other in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)


def grpo_loss(rows: list[Row], model: torch.nn.Module) -> LossOutput:
    examples = [Example(rows=(row,)) for row in rows]
    tokens = sum(len(row.response_ids) for row in rows)
    totals = Totals(tokens=tokens, rows=len(rows), examples=len(rows))
    micro = build_micro_batch(examples, totals, "cpu")
    logp_T, entropy_T = PolicyHead(model)(build_inputs(rows, "cpu"), 1.0, "metric")
    kl = {"coef": 0.1, "estimator": "k3", "where": "loss"}
    algorithm = GRPO(GRPOConfig.model_validate({"kl": kl}))
    return algorithm.loss()(logp_T, replace(micro, entropy_T=entropy_T))


def test_a_loss_counts_the_tokens_of_the_policy_only() -> None:
    """The head is not asked for the replies at all: its logits there have no gradient."""
    model = make_policy()
    row = ROWS[0]
    output = grpo_loss([row], model)
    assert float(output.metrics["policy/entropy"]) < np.log(V) + 1e-3
    touched: list[torch.Tensor] = []
    head = model.lm_head
    handle = head.register_full_backward_hook(lambda _, __, grad: touched.append(grad[0]))  # type: ignore[operator,union-attr]
    grpo_loss([row], model).loss.backward()
    handle.remove()
    assert touched[0].shape[-2] == len(row.response_ids) == 7


def test_pairs_sum_over_the_tokens_of_the_policy() -> None:
    pair = Example(rows=(ROWS[0], ROWS[2]), scalars={"margin": 1.0})
    micro = build_micro_batch([pair], Totals(tokens=9, rows=2, examples=1), "cpu")
    logp_T = torch.linspace(-2, -1, 9, requires_grad=True)
    loss = Sigmoid(SigmoidConfig(beta=0.5), importance_cap=None)(logp_T, micro).loss
    ref = torch.tensor(np.concatenate([r.tokens["ref_logp"] for r in pair.rows]))
    gap = logp_T - ref
    expected = -torch.nn.functional.logsigmoid(0.5 * (gap[:7].sum() - gap[7:].sum()))
    torch.testing.assert_close(loss, expected)


def test_costs_include_what_is_fed() -> None:
    assert [len(row) for row in ROWS] == [18, 9, 8]
    (batch,) = pack_examples([ROWS[:1]], packing="rows", budget=100)
    assert batch.cost == 17


def test_a_turns_reward_is_on_its_last_token() -> None:
    row = ROWS[0]
    turn_reward = np.zeros(7, np.float32)
    turn_reward[[1, 5, 6]] = (1.0, 2.0, 4.0)
    value = np.linspace(0, 1, 7).astype(np.float32)
    row = replace(
        row,
        tokens={**row.tokens, "turn_reward": turn_reward, "value": value},
        scalars={"score": 7.5, "truncated": 0.0},
    )
    plain = {"kl": KLConfig(coef=0.0), "reward_clip": None}
    ppo = PPO(PPOConfig(**plain, whiten_advantages=False, gamma=0.9, lam=0.8))
    ((example,), _) = ppo.credit([Example(rows=(row,))])
    rewards = turn_reward.astype(np.float64)
    rewards[-1] += 0.5  # what the score has besides
    advantage, returns = gae(rewards, value, [7], 0.9, 0.8)
    np.testing.assert_allclose(example.rows[0].tokens["advantage"], advantage, rtol=1e-6)
    np.testing.assert_allclose(example.rows[0].tokens["return"], returns, rtol=1e-6)
    reinforce = ReinforcePlusPlus(ReinforcePlusPlusConfig(**plain))
    ((example,), _) = reinforce.credit([Example(rows=(row,))])
    own = example.rows[0].tokens["advantage"]
    assert own[0] == own[1] > own[2] == own[5] > own[6]
