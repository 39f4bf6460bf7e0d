"""On-policy distillation: advantages, their expected gradient, refusals, a run and its resume."""

import json
import math

import numpy as np
import pytest
import torch
from campaigns import make_config, metrics_of, run_campaign
from chat_tokenizer import make_model_directory
from fakes import FakeLearner, FakeReference, FakeScorer
from test_policy_gradient import CONTEXT, build, group_of

from rayhf.algorithms.base import needs_frozen_reference
from rayhf.config.registry import ALGORITHMS
from rayhf.errors import ConfigError, PausedError
from rayhf.losses.base import MicroBatch, Totals
from rayhf.planning.preflight import _check_models, check_settings
from rayhf.scorer.none import NoScorer
from rayhf.types import float_array

TEACHER = {"reference": {"model": "teacher"}, "scorer": {}}


def config_of(directory, *, algorithm=None, **sections):
    return make_config(
        directory,
        algorithm={"type": "distill", "samples": 2, **(algorithm or {})},
        **{**TEACHER, **sections},
    )


def credited(teacher, scores=(0.0, 0.0), **settings):
    """The advantages of two completions of two tokens; the policy's log-probs are -1."""
    algorithm = build(type="distill", samples=2, **settings)
    selection = algorithm.select([group_of(scores)], CONTEXT)
    examples = [
        type(e)(rows=(e.rows[0].with_tokens(ref_logp=float_array(teacher)),))
        for e in selection.examples
    ]
    examples, metrics = algorithm.credit(examples)
    return [e.rows[0].tokens["advantage"].tolist() for e in examples], {
        **selection.metrics,
        **metrics,
    }


def test_advantage_is_the_teachers_log_prob_minus_the_policys():
    advantages, metrics = credited([-0.5, -3.0])
    assert advantages == [[0.5, -2.0], [0.5, -2.0]] and metrics == {"ppo/kl_coef": 1.0}
    assert credited([-0.5, -3.0], kl={"coef": 2.0})[0][0] == [1.0, -4.0]


def test_discount_credits_a_token_with_what_follows():
    assert credited([-0.5, -3.0], discount=1.0)[0][0] == [-1.5, -2.0]
    assert credited([-0.5, -3.0], discount=0.5)[0][0] == [-0.5, -2.0]


def test_reward_beside_the_teacher():
    advantages, metrics = credited([-0.5, -3.0], (1.0, 3.0), reward_coef=0.5, scale="none")
    assert advantages == [[0.0, -2.5], [1.0, -1.5]]
    assert metrics["ppo/groups_uniform"] == 0.0
    scaled, _ = credited([-1.0, -1.0], (1.0, 3.0), reward_coef=0.5)
    assert scaled[1][0] == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)  # GRPO's deviation is sqrt 2
    advantages, metrics = credited(
        [-0.5, -3.0], (1.0, 3.0), reward_coef=0.5, scale="none", reward_clip=0.75
    )
    assert advantages == [[0.0, -0.75], [0.75, -0.75]] and metrics["ppo/reward_clipped"] == 1.0


def test_completions_that_score_alike_still_learn_from_the_teacher():
    algorithm = build(type="distill", samples=2, reward_coef=1.0)
    selection = algorithm.select([group_of([1.0, 1.0])], CONTEXT)
    assert len(selection.examples) == 2 and selection.no_signal is None
    assert credited([-0.5, -3.0], (1.0, 1.0), reward_coef=1.0)[0][0] == [0.5, -2.0]


def test_expected_gradient_is_that_of_the_reverse_kl():
    logits = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5, 0.4], dtype=torch.float64), dim=0)
    policy = torch.log_softmax(logits, dim=0)
    kl = (policy.exp() * (policy - teacher)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    loss = build(type="distill").loss()
    total = torch.zeros((), dtype=torch.float64)
    for token in range(4):  # every token, weighted by how often the policy samples it
        logp_T = policy[token : token + 1]
        micro = MicroBatch(
            tokens={
                "behavior_logp": logp_T.detach(),
                "ref_logp": teacher[token : token + 1],
                "advantage": (teacher[token] - logp_T).detach(),
            },
            rows={},
            examples={},
            row_T=torch.zeros(1, dtype=torch.int64),
            length_R=torch.ones(1),
            example_R=torch.zeros(1, dtype=torch.int64),
            totals=Totals(tokens=1, rows=1, examples=1),
        )
        total = total + policy[token].exp().detach() * loss(logp_T, micro).loss
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_campaign_without_a_scorer_and_its_resume(tmp_path):
    whole = config_of(tmp_path / "a")
    broken = config_of(tmp_path / "b")
    check_settings(whole)
    first = run_campaign(whole, scorer=NoScorer(), heldout=())
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, scorer=NoScorer(), heldout=(), learner=FakeLearner(fail_at=3))
    second = run_campaign(broken, scorer=NoScorer(), heldout=())
    assert metrics_of(whole) == metrics_of(broken)
    assert second.learners["policy"].steps == first.learners["policy"].steps == 4
    for file in sorted((whole.run.dir / "examples").glob("*.parquet")):
        assert file.read_bytes() == (broken.run.dir / "examples" / file.name).read_bytes()
    rows = [e.rows[0] for b in first.learners["policy"].batches for e in b.examples]
    # The fakes' log-probs are (-1, -2, -0.5) of the policy and -1 of the teacher.
    assert len(rows) == 32
    assert all(row.tokens["advantage"].tolist() == [0.0, 1.0, -0.5] for row in rows)
    assert "scorer/reward_mean" not in metrics_of(whole)[1]


def test_distance_to_the_teacher_and_its_entropy_pause_nothing(tmp_path):
    class Far(FakeReference):
        async def logprobs(self, rows, *, temperature):
            return [np.full(len(row.response_ids), -90.0, dtype=np.float32) for row in rows]

    class Measuring(FakeLearner):
        async def step(self, batch, loss):
            measured = {"reference/kl": 270.0, "policy/entropy": 4.0 / (1 + self.steps) ** 4}
            return await super().step(batch, loss) | measured

    roles = {"scorer": NoScorer(), "heldout": (), "reference": Far(), "learner": Measuring()}
    run_campaign(config_of(tmp_path / "a"), **roles)
    with pytest.raises(PausedError, match="guard kl"):
        run_campaign(
            make_config(tmp_path / "b", algorithm={"type": "grpo", "samples": 2}),
            **roles | {"scorer": FakeScorer(), "learner": Measuring()},
        )


def test_reward_needs_a_scorer_and_a_teacher_a_reference(tmp_path):
    assert needs_frozen_reference(ALGORITHMS.build(config_of(tmp_path).algorithm))
    with pytest.raises(ConfigError, match=r"scorer\.train: distill scores the completions"):
        check_settings(config_of(tmp_path, algorithm={"reward_coef": 1.0}))


@pytest.mark.parametrize(
    ("algorithm", "sections", "expected"),
    [
        ({}, {"reference": {}}, r"reference\.model: distill learns from a teacher, and there is"),
        ({"refill": {"budget": 2.0}}, {}, "the teacher judges these too"),
        ({"missing_eos_penalty": 1.0}, {}, "with reward_coef 0 there are none"),
        ({"samples": 1, "reward_coef": 1.0}, {}, "expected samples of at least 2"),
        ({"kl": {"target": 6.0}}, {}, r"algorithm\.kl\.target"),
        ({"kl": {"where": "loss"}}, {}, r"algorithm\.kl\.where"),
    ],
)
def test_refusals(tmp_path, algorithm, sections, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(config_of(tmp_path, algorithm=algorithm, **sections))


def test_teacher_for_shorter_sequences_is_refused(tmp_path):
    policy = make_model_directory(tmp_path / "policy")
    teacher = make_model_directory(tmp_path / "teacher")
    settings = json.loads((teacher / "config.json").read_text())
    limit = settings["max_position_embeddings"]
    (teacher / "config.json").write_text(
        json.dumps({**settings, "max_position_embeddings": limit - 8})
    )
    models = {"policy.model": policy, "reference.model": teacher}
    config = config_of(tmp_path, rollout={"max_tokens": 8})
    algorithm = ALGORITHMS.build(config.algorithm)
    with pytest.raises(ConfigError, match=f"policy.max_length of at most {limit - 8}"):
        _check_models(config, algorithm, models)
    policy_section = {"model": "m", "max_length": limit - 8}
    config = config_of(tmp_path, rollout={"max_tokens": 8}, policy=policy_section)
    assert _check_models(config, algorithm, models) == limit - 8
