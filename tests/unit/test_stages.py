"""sft, dpo and kto through the real controller with fake roles: order, steps, resume, engines."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from campaigns import make_config, metrics_of
from fakes import FakeChat, FakeLearner, FakeReference, FakeRollout, FakeScorer, SilentObserver
from fakes import make_prompts as heldout_prompts

from launch.assemble import actor_specs_of
from rayhf.algorithms.base import needs_frozen_reference
from rayhf.campaign.controller import Controller
from rayhf.campaign.data import CampaignData
from rayhf.config.load import load_config
from rayhf.config.registry import ALGORITHMS, EVALUATIONS
from rayhf.data.chat import Chat
from rayhf.data.examples import EncodedExample, encoded_row
from rayhf.data.prompts import PromptSet
from rayhf.data.readers import open_source
from rayhf.errors import ConfigError
from rayhf.evaluation.base import EvaluationSetup
from rayhf.planning.placement import actor_specs
from rayhf.planning.plan import Plan
from rayhf.planning.preflight import check_settings, prepare
from rayhf.roles import Roles
from rayhf.run_dir.store import RunDir
from rayhf.scorer.none import NoScorer
from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.types import Prompt

NAMES = ("sft", "dpo", "kto")


def config_of(name, directory, **sections):
    sections = {"scorer": {}, "prompts": {"train": "t", "batch": 4}, **sections}
    return make_config(directory, algorithm={"type": name}, **sections)


def examples_of(name, count=12):
    """Examples whose tokens are their number."""
    rows = {"sft": 1, "dpo": 2, "kto": 1}[name]
    scalars = {"sft": {"trained_tokens": 1.0}, "dpo": {}, "kto": {"desirable": 1.0}}[name]
    mask = [True, False] if name == "sft" else None
    return [
        EncodedExample(
            prompt_id=f"e{i:02d}",
            rows=tuple(encoded_row([50 + i], [i, j], mask) for j in range(rows)),
            scalars=scalars,
        )
        for i in range(count)
    ]


def run(config, *, learner=None, rollout=None, evaluations=None):
    """Run a campaign; return its roles."""
    algorithm = ALGORITHMS.build(config.algorithm)
    examples = examples_of(config.algorithm.type)
    algorithm._max_length = 64
    algorithm.set_examples(examples)
    prompts = [Prompt(prompt_id=e.prompt_id, messages=(), token_ids=()) for e in examples]
    heldout = heldout_prompts(3) if config.prompts.heldout else []
    roles = Roles(
        rollouts={"policy": rollout} if rollout else {},
        scorer=NoScorer(),
        evaluator=FakeScorer() if heldout else None,
        learners={"policy": learner or FakeLearner()},
        critic=None,
        reference=FakeReference() if needs_frozen_reference(algorithm) else None,
    )
    data = CampaignData(
        chat=FakeChat(),
        prompts=PromptSet(prompts=tuple(prompts), duplicates=0, label="test"),
        heldout=tuple(heldout),
        evaluations=evaluations or {},
    )
    store = RunDir(config)
    try:
        controller = Controller(
            config,
            algorithm=algorithm,
            roles=roles,
            data=data,
            store=store,
            observer=SilentObserver(),
        )
        asyncio.run(controller.run())
    finally:
        store.close()
    return roles


def seen(roles):
    """The examples of each optimizer step, by the number in their first row."""
    batches = roles.learners["policy"].batches
    return [[e.rows[0].response_ids[0] for e in b.examples] for b in batches]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    whole, broken = config_of(name, tmp_path / "a"), config_of(name, tmp_path / "b")
    first = run(whole)
    killed = FakeLearner(fail_at=3)
    with pytest.raises(RuntimeError, match="killed"):
        run(broken, learner=killed)
    second = run(broken)
    assert metrics_of(whole) == metrics_of(broken)
    assert seen(second) == seen(first)[2:]  # from the checkpoint of iteration 2 on
    for file in sorted((whole.run.dir / "examples").glob("*.parquet")):
        assert file.read_bytes() == (broken.run.dir / "examples" / file.name).read_bytes()


def test_an_epoch_has_every_row_once_and_the_next_another_order(tmp_path):
    steps = seen(run(config_of("sft", tmp_path, run={"iterations": 6})))
    epochs = [[e for step in part for e in step] for part in (steps[:3], steps[3:])]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_sft_trains_on_masked_tokens_and_reports_nothing_of_samples(tmp_path):
    config = config_of("sft", tmp_path)
    roles = run(config)
    row = roles.learners["policy"].batches[0].examples[0].rows[0]
    assert row.tokens["mask"].tolist() == [1.0, 0.0]
    last = metrics_of(config)[-1]
    assert last["sft/tokens"] == 4 and last["policy/version"] == 4
    assert not [name for name in last if name.startswith(("rollout/", "scorer/", "eval/"))]


def test_kto_estimates_the_kl_on_other_examples_responses(tmp_path):
    class Recording(FakeLearner):
        async def outputs(self, rows, *, temperature):
            self.asked = [(row.prompt_ids[0] - 50, row.response_ids[0]) for row in rows]
            return [np.full(len(row.response_ids), 0.5, np.float32) for row in rows]

    roles = run(config_of("kto", tmp_path, run={"iterations": 1}), learner=Recording())
    learner = roles.learners["policy"]
    own, mismatched = learner.asked[0::2], learner.asked[1::2]
    assert all(prompt == response for prompt, response in own)
    assert [response for _, response in mismatched] == [r for _, r in own[1:] + own[:1]]
    (batch,) = learner.batches
    # Two tokens: policy 0.5 each, reference -1 each.
    assert [e.scalars["kl"] for e in batch.examples] == pytest.approx([3.0] * 4)
    assert all(len(e.rows) == 1 and "ref_logp" in e.rows[0].tokens for e in batch.examples)


def test_kl_of_kto_is_never_negative(tmp_path):
    class Below(FakeLearner):
        async def outputs(self, rows, *, temperature):
            return [np.full(len(row.response_ids), -9.0, np.float32) for row in rows]

    roles = run(config_of("kto", tmp_path, run={"iterations": 1}), learner=Below())
    assert {e.scalars["kl"] for e in roles.learners["policy"].batches[0].examples} == {0.0}


def test_engines_get_weights_only_before_an_evaluation(tmp_path):
    updates = []

    class Recording(FakeRollout):
        async def update(self, snapshot):
            await super().update(snapshot)
            updates.append(snapshot.version)

    prompts = {"train": "t", "heldout": "h", "task": "toy", "batch": 4}
    config = config_of(
        "sft",
        tmp_path,
        run={"iterations": 5, "eval_every": 2},
        prompts=prompts,
        scorer={"evaluate": [{"type": "rule", "function": "a:b"}]},
    )
    run(config, rollout=Recording())
    assert updates == [2, 4, 5]
    measured = [m["iteration"] for m in metrics_of(config) if "eval/toy/sampled" in m]
    assert measured == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("sections", "roles"),
    [
        ({}, ["learner"]),
        ({"scorer": {"train": [{"type": "rule", "function": "a:b"}]}}, ["learner"]),
        (
            {
                "prompts": {"train": "t", "heldout": "h", "batch": 4},
                "scorer": {"evaluate": [{"type": "rule", "function": "a:b"}]},
            },
            ["rollout", "learner", "evaluator"],
        ),
        ({"evaluations": {"val": {"type": "validation_loss", "prompts": "v"}}}, ["learner"]),
    ],
)
def test_actors(tmp_path, sections, roles):
    config = config_of("sft", tmp_path, **sections)
    check_settings(config)
    specs = actor_specs(config, critic=False, reference=False, generates=False)
    assert [spec.role for spec in specs] == roles


@pytest.mark.parametrize(
    ("name", "sections", "expected"),
    [
        ("sft", {"rollout": {"temperature": 0.7}}, "rollout.temperature is 0.7, but sft"),
        ("dpo", {"run": {"max_staleness": 1}}, "run.max_staleness is 1, but dpo"),
        ("kto", {"prompts": {"train": "t", "batch": 1}}, "prompts.batch is 1, but kto"),
        ("online_dpo", {}, "scorer.train: online_dpo scores the completions"),
        ("sft", {"prompts": {"train": "t", "heldout": "h"}}, "expected scorer.evaluate"),
    ],
)
def test_refusals(tmp_path, name, sections, expected):
    with pytest.raises(ConfigError, match=expected):
        check_settings(config_of(name, tmp_path, **sections))


def test_losses_of_other_families_are_refused():
    base = {"run": {"dir": "r", "iterations": 1}, "policy": {"model": "m"}}
    base["prompts"] = {"train": "t"}
    with pytest.raises(ConfigError, match="'kto' is a loss of another family"):
        load_config({**base, "algorithm": {"type": "dpo", "loss": "kto"}})
    with pytest.raises(ConfigError, match="'ipo' is a loss of another family; valid: kto"):
        load_config({**base, "algorithm": {"type": "kto", "loss": "ipo"}})


def test_reference_free_losses_need_no_reference():
    algorithm = ALGORITHMS.build(ALGORITHMS.config_type("dpo")(loss={"type": "simpo"}))
    assert not needs_frozen_reference(algorithm) and algorithm.loss().entropy == "off"


def measure(tmp_path, kind, rows, *, reference):
    """Run an evaluation whose learner gives -len(prompt) per token."""

    class Lengths(FakeLearner):
        async def outputs(self, rows, *, temperature):
            return [-np.arange(1, len(r.response_ids) + 1, dtype=np.float32) for r in rows]

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EVALUATIONS.config_type(kind)(prompts={"type": "file", "path": file})
    tokenizer = train_tokenizer(["a b c"], POLICY_FORMAT, max_vocab=270, max_length=64)
    setup = EvaluationSetup(
        task="val",
        base=tmp_path,
        chat=Chat(tokenizer, max_length=64),
        heldout=(),
        open_sources=lambda sources, key: [
            ("", open_source(source, base=tmp_path, key=key), source) for source in sources
        ],
        load_prompts=lambda *_: (),
    )
    evaluation = EVALUATIONS.build(config, setup)
    roles = SimpleNamespace(
        learners={"policy": Lengths()}, reference=FakeReference() if reference else None
    )
    recorded = []
    metrics = asyncio.run(evaluation.measure(SimpleNamespace(roles=roles, record=recorded.append)))
    for values in recorded:  # a figure is the mean of what is recorded by prompt
        mean = np.average(values.values_P, weights=values.weights_P)
        assert metrics.pop(values.metric) == pytest.approx(mean)
        metrics[values.metric] = mean
    assert len(recorded) == len(metrics)
    return metrics


def test_validation_loss_is_a_mean_over_tokens(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcb"}]
    metrics = measure(tmp_path, "validation_loss", rows, reference=False)
    # Each completion ends with an end-of-turn token: 2 and 4 tokens.
    assert metrics == {"eval/val/nll": pytest.approx((1 + 2 + 1 + 2 + 3 + 4) / 6)}


def test_pair_accuracy_is_of_the_implicit_reward(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "bcb"},
        {"prompt": "b", "chosen": "bcb", "rejected": "b"},
        {"prompt": "c", "chosen": "bc", "rejected": "b"},
        {"prompt": "c", "chosen": "b", "rejected": "b"},
    ]
    metrics = measure(tmp_path, "pair_accuracy", rows, reference=True)
    # Log-probs -3, -6, -10 of 2, 3, 4 tokens; the reference has -1 per token.
    assert metrics["eval/val/pair_accuracy"] == pytest.approx(1 / 3)
    margins = [(-3 + 2) - (-10 + 4), (-10 + 4) - (-3 + 2), (-6 + 3) - (-3 + 2)]
    assert metrics["eval/val/pair_margin"] == pytest.approx(sum(margins) / 3)
    free = measure(tmp_path, "pair_accuracy", rows, reference=False)
    assert free["eval/val/pair_margin"] == pytest.approx((7 - 7 - 3) / 3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["a b c"], POLICY_FORMAT, max_vocab=270, max_length=64)
    size = ModelSize(hidden=64, layers=1, intermediate=64)
    new_model(size, tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def prepare_rows(tmp_path, policy, rows, **algorithm):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        tmp_path,
        algorithm={"type": "sft", **algorithm},
        policy={"model": str(policy), "max_length": 32},
        prompts={"train": str(file), "batch": 2},
        scorer={},
    )
    return prepare(config, base=tmp_path)


def test_rows_are_checked_before_anything_starts(tmp_path, policy):
    rows = [{"prompt": "a", "completion": word} for word in ("a", "b", "c" * 40, "b")]
    with pytest.raises(ConfigError, match=r"^prompts\.train: .*rows\.jsonl row 3: \d+ tokens"):
        prepare_rows(tmp_path, policy, rows)
    # rollout.max_tokens is far above the model's length: nothing is generated.
    prepared = prepare_rows(tmp_path, policy, rows, too_long="drop")
    assert len(prepared.data.prompts.prompts) == 2 and prepared.data.prompts.duplicates == 1
    with pytest.raises(ConfigError, match=r"row 1: `messages` has no assistant turn"):
        prepare_rows(tmp_path, policy, [{"messages": [{"role": "user", "content": "a"}]}])


def test_plan_has_no_engine(tmp_path, policy):
    rows = [{"prompt": "a", "completion": word} for word in ("a", "b")]
    prepared = prepare_rows(tmp_path, policy, rows)
    specs = actor_specs_of(prepared.config, prepared.algorithm)
    plan = Plan(prepared.config, prepared.algorithm, prepared.derived, base=tmp_path)
    assert [need.spec.name for need in plan.needs(specs, None)] == ["learner rank 0"]
    names = [name for name, _ in prepared.derived.table(prepared.config)]
    assert "rows per iteration" in names and "weight transport" not in names
    assert plan.disk().samples > 0
