"""Nash-MD: win rates against the mixture, and the gradient on a tabular game, exactly."""

import asyncio

import numpy as np
import pytest
import torch
from campaigns import make_config
from pydantic import ValidationError

from rayhf.algorithms.base import SelectionContext, compare_all
from rayhf.algorithms.nash_md import NashMD, NashMDConfig, mixture_win_rates
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.planning.preflight import check_settings
from rayhf.types import Compared, Completion, Invalid, Prompt, Sampling, float_array, token_array

CONTEXT = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=4))
WIN = np.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.3], [0.2, 0.7, 0.5]])


class Comparer:
    """Exploration context that only compares, by the moves' win probabilities."""

    async def compare(self, completions):
        moves = [int(c.token_ids[0]) for c in completions]
        return Compared(win=WIN[np.ix_(moves, moves)].copy(), source="pairwise")


def group_of(name, moves, log_policy, comparer=None):
    """One prompt's group of one-token completions."""
    prompt = Prompt(prompt_id=name, messages=({"role": "user", "content": "q"},), token_ids=(1,))
    completions = [
        Completion(
            prompt_id=name,
            index=i,
            seed=i,
            text=str(move),
            token_ids=token_array([move]),
            logprobs=float_array([log_policy[move]]),
            finish_reason="stop",
            policy_version=0,
        )
        for i, move in enumerate(moves)
    ]
    answers = [("answer", completion) for completion in completions]
    return asyncio.run(compare_all(prompt, comparer or Comparer(), answers))


def annotated(examples, log_ref):
    return [
        type(e)(
            rows=tuple(
                row.with_tokens(ref_logp=np.array([log_ref[row.response_ids[0]]], dtype=np.float32))
                for row in e.rows
            )
        )
        for e in examples
    ]


def test_win_rates_are_weighted_means_over_the_others():
    weights = np.array([1.0, 2.0, 3.0])
    rates, opponents = mixture_win_rates(WIN, np.log(weights) + 100.0)
    assert rates == pytest.approx(
        [(2 * 0.1 + 3 * 0.8) / 5, (0.9 + 3 * 0.3) / 4, (0.2 + 2 * 0.7) / 3]
    )
    assert opponents == pytest.approx([25 / 13, 16 / 10, 9 / 5])
    unknown = WIN.copy()
    unknown[0, 1] = unknown[1, 0] = np.nan
    rates, _ = mixture_win_rates(unknown, np.log(weights))
    assert rates[:2] == pytest.approx([0.8, 0.3])


@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_the_regularized_game(mixture):
    """With many samples, against the exact gradient of E_p[P(y > q) - tau log(p / p_ref)]."""
    tau = 0.2
    rng = np.random.default_rng(0)
    logits = np.array([1.0, 0.0, -0.5])
    log_ref = np.log([0.2, 0.3, 0.5])
    log_p = logits - np.log(np.exp(logits).sum())
    p = np.exp(log_p)
    algorithm = NashMD(NashMDConfig(samples=60, mixture=mixture, kl={"coef": tau}))
    groups = [group_of(str(i), rng.choice(3, 60, p=p), log_p) for i in range(80)]
    selection = algorithm.select(groups, CONTEXT)
    examples, metrics = algorithm.credit(annotated(selection.examples, log_ref))
    assert not any(name.startswith("win/") for name in examples[0].rows[0].scalars)

    theta = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    moves = torch.tensor([int(e.rows[0].response_ids[0]) for e in examples])
    totals = Totals(tokens=len(moves), rows=len(moves), examples=len(examples))
    micro = build_micro_batch(examples, totals, "cpu")
    algorithm.loss()(theta.log_softmax(-1)[moves], micro).loss.backward()

    opponent = np.exp((1 - mixture) * log_p + mixture * log_ref)
    opponent /= opponent.sum()
    reward = WIN @ opponent - 0.5 - tau * (log_p - log_ref)
    exact = -p * (reward - p @ reward)  # of the loss, for softmax logits
    assert theta.grad.numpy() == pytest.approx(exact, abs=0.015)
    assert metrics["nash_md/win_rate"] == pytest.approx(p @ WIN @ opponent, abs=0.01)
    assert (metrics["nash_md/opponents"] > 58) == (mixture == 0.0)


def test_advantages_of_one_prompt_by_hand():
    """Two completions: each is the other's only opponent, whatever its weight."""
    algorithm = NashMD(NashMDConfig(samples=2, kl={"coef": 0.1}, missing_eos_penalty=0.0))
    group = group_of("p", [0, 2], np.log([0.5, 0.25, 0.25]))
    selection = algorithm.select([group], CONTEXT)
    log_ref = np.log([0.25, 0.25, 0.5])
    examples, _ = algorithm.credit(annotated(selection.examples, log_ref))
    ratio = np.log([2.0, 0.5])
    expected = [0.3 - 0.1 * (ratio[0] - ratio[1]), -0.3 - 0.1 * (ratio[1] - ratio[0])]
    advantages = [float(e.rows[0].tokens["advantage"][0]) for e in examples]
    assert advantages == pytest.approx(expected, rel=1e-5)


def test_completions_without_a_comparison_are_dropped():
    class Silent:
        async def compare(self, completions):
            return Invalid(reason="no verdict")

    unscored = group_of("p", [0, 1], np.log([0.5, 0.25, 0.25]), Silent())
    selection = NashMD(NashMDConfig(samples=2)).select([unscored], CONTEXT)
    assert selection.examples == () and selection.metrics["ppo/groups_dropped"] == 1


def test_what_would_not_be_nash_md_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="expected where: reward and estimator: k1"):
        NashMDConfig(kl={"where": "loss", "estimator": "k3"})
    config = make_config(tmp_path, algorithm={"type": "nash_md"}, rollout={"top_p": 0.9})
    with pytest.raises(ConfigError, match=r"expected top_p 1 and top_k 0, got 0\.9 and 0"):
        check_settings(config)
