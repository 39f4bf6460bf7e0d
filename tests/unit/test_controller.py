"""The controller with fake roles: schedules, staleness, failures, resume."""

import json

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, FakeRollout, FakeScorer, SilentObserver

from rayhf.config.load import dump_config
from rayhf.config.yaml_text import parse_yaml
from rayhf.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    ScorerError,
    WeightSyncError,
)
from rayhf.run_dir.identity import config_changes
from rayhf.run_dir.store import RunDir
from rayhf.types import Failed, Invalid, Scored


def test_campaign_writes_the_documented_run_directory(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    run = config.run.dir
    assert [m["iteration"] for m in metrics_of(config)] == [0, 1, 2, 3, 4]
    assert [("eval/toy/sampled" in m) for m in metrics_of(config)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    samples = pq.read_table(run / "samples/iteration-000003.parquet").to_pylist()
    assert len({(s["prompt_id"], s["sample"]) for s in samples}) == len(samples) == 16
    assert samples[0]["policy_version"] == 2 and samples[0]["outcome"] == "Scored"
    pairs = pq.read_table(run / "examples/iteration-000003.parquet").to_pylist()
    assert pairs and all(p["scores"][0] > p["scores"][1] and p["margin"] > 0 for p in pairs)
    assert json.loads((run / "campaign.json").read_text())["state"] == "done"
    assert (run / "policy/config.json").exists() and (
        run / "checkpoints/iteration-000004/MANIFEST.json"
    ).exists()


def test_resume_after_a_crash_equals_the_uninterrupted_run(tmp_path):
    whole, broken = make_config(tmp_path / "whole"), make_config(tmp_path / "broken")
    run_campaign(whole)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=FakeLearner(fail_at=3))
    run_campaign(broken)
    assert metrics_of(broken) == metrics_of(whole)
    for i in range(1, 5):
        name = f"samples/iteration-{i:06d}.parquet"
        assert pq.read_table(whole.run.dir / name).equals(pq.read_table(broken.run.dir / name))


def test_waves_do_not_depend_on_arrival_order(tmp_path):
    rollout = FakeRollout(delay=0.01)
    run_campaign(make_config(tmp_path), rollout=rollout)
    waves = [call for call in rollout.calls if len(call) == 4]
    assert len(waves) == 4 and all(call == sorted(call) for call in waves)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_staleness_is_bounded_and_weights_change_between_calls(tmp_path, staleness):
    config = make_config(tmp_path, run={"iterations": 8, "max_staleness": staleness})
    rollout = FakeRollout(delay=0.005)
    run_campaign(config, rollout=rollout)
    seen = [m["staleness/max"] for m in metrics_of(config)[1:]]
    assert max(seen) == staleness and rollout.busy_at_update == 0
    assert metrics_of(config)[-1]["policy/version"] == 8


def test_ppo_takes_several_steps_and_trains_the_critic(tmp_path):
    config = make_config(
        tmp_path,
        algorithm={"type": "ppo", "samples": 2, "critic_warmup": 1},
        learner={"epochs": 2, "prompts_per_step": 2},
    )
    roles = run_campaign(config, critic=FakeLearner())
    # One iteration only warms up the critic.
    assert roles.critic.steps == 4 * 4
    assert roles.learners["policy"].steps == 3 * 4
    row = roles.learners["policy"].batches[0].examples[0].rows[0]
    assert set(row.tokens) == {
        "behavior_logp",
        "ref_logp",
        "value",
        "old_logp",
        "advantage",
        "return",
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"type": "initial"}, []),
        ({"type": "previous", "every": 2}, [(2, 1.0), (4, 1.0)]),
        ({"type": "ema", "alpha": 0.5, "every": 3}, [(3, 0.5)]),
    ],
)
def test_reference_follows_its_schedule(tmp_path, schedule, expected):
    config = make_config(
        tmp_path, algorithm={"type": "online_dpo", "samples": 4, "reference": schedule}
    )
    assert run_campaign(config).reference.updates == expected


def test_ema_reference_counts_optimizer_steps(tmp_path):
    config = make_config(
        tmp_path,
        run={"iterations": 6},
        algorithm={"type": "online_dpo", "samples": 4, "reference": {"type": "ema", "every": 5}},
        learner={"prompts_per_step": 2},
    )
    # Two steps an iteration: steps 5 and 10 are in iterations 3 and 5.
    assert run_campaign(config).reference.updates == [(3, 0.6), (5, 0.6)]


def test_reference_refresh_is_not_lost_where_an_iteration_trains_nothing(tmp_path):
    class TiesLater(FakeScorer):
        """Scores differ under the first weights only: iterations 2, 3 and 4 are all ties."""

        async def score(self, requests):
            later = any(c.policy_version for r in requests for c in r.completions)
            return await FakeScorer(Scored(value=0.0) if later else None).score(requests)

    config = make_config(
        tmp_path,
        algorithm={
            "type": "online_dpo",
            "samples": 4,
            "reference": {"type": "previous", "every": 2},
        },
    )
    roles = run_campaign(config, scorer=TiesLater())
    assert metrics_of(config)[-1]["policy/version"] == 1
    assert roles.reference.updates == [(1, 1.0), (1, 1.0)]


@pytest.mark.parametrize("outcome", [Failed(reason="ValueError: no"), Invalid(reason="NaN")])
def test_missing_scores_stop_the_run_and_never_train(tmp_path, outcome):
    config, learner = make_config(tmp_path, prompts={"train": "t", "batch": 4}), FakeLearner()
    with pytest.raises(ScorerError, match=outcome.reason):
        run_campaign(config, scorer=FakeScorer(outcome), learner=learner)
    assert learner.steps == 0


def test_other_and_locked_campaigns_are_refused(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    with pytest.raises(
        ConfigError, match=r"holds another campaign: algorithm\.loss\.beta was 0\.1, now 0\.2"
    ):
        RunDir(
            make_config(
                tmp_path, algorithm={"type": "online_dpo", "samples": 4, "loss": {"beta": 0.2}}
            )
        )
    store = RunDir(config)
    with pytest.raises(LockedError, match="in use by host"):
        RunDir(config)
    store.close()
    RunDir(
        make_config(tmp_path, run={"iterations": 9})
    ).close()  # going on longer is the same campaign


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"rollout": {"top_p": 0.9}}, r"rollout\.top_p was 1\.0, now 0\.9"),
        ({"rollout": {"top_k": 8}}, r"rollout\.top_k was 0, now 8"),
        ({"reference": {"model": "m2"}}, r"reference\.model was None, now 'm2'"),
        (
            {"scorer": {"train": [{"type": "rule", "function": "a:b", "weight": 0.5}]}},
            r"scorer\.train\[0\]\.weight was 1\.0, now 0\.5; choose",
        ),
    ],
)
def test_other_sampling_and_another_reference_are_another_campaign(tmp_path, section, expected):
    RunDir(make_config(tmp_path)).close()
    with pytest.raises(ConfigError, match=rf"holds another campaign: {expected}"):
        RunDir(make_config(tmp_path, **section))


def test_damaged_checkpoint_is_replaced_by_the_older_one(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    checkpoints = config.run.dir / "checkpoints"
    (checkpoints / "iteration-000004/learner/steps").write_text("9")
    store = RunDir(config)
    assert store.latest().iteration == 2
    (checkpoints / "iteration-000002/state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*state\.json is missing"):
        store.latest()
    store.close()
    assert len(list(checkpoints.glob(".corrupt-*"))) == 2


def test_continued_with_other_inputs_is_refused(tmp_path):
    """The reference loads its model again, and the prompts are rendered again."""
    config = make_config(tmp_path)
    inputs = {"chat template": "a", "policy.model/model.safetensors": "b"}
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, learner=FakeLearner(fail_at=3), inputs=inputs)
    for changed, names in (
        ({"chat template": "x"}, "chat template"),
        ({"policy.model/config.json": "new"}, "policy.model/config.json"),
    ):
        with pytest.raises(CheckpointError, match=f"changed since: {names}; restore") as error:
            run_campaign(config, inputs=inputs | changed)
        assert error.value.exit_code == 5
    run_campaign(config, inputs=inputs)


def test_exported_policy_gets_the_campaigns_files(tmp_path):
    run_campaign(make_config(tmp_path), exported_files={"chat_template.jinja": "{{ é }}"})
    exported = tmp_path / "run" / "policy" / "chat_template.jinja"
    assert exported.read_text(encoding="utf-8") == "{{ é }}"


def test_engines_are_compared_with_the_learner_before_the_first_iteration(tmp_path):
    class OtherWeights(FakeRollout):
        async def verify(self, probe):
            raise WeightSyncError("weights 0 do not compute what the learner computes")

    config = make_config(tmp_path)
    rollout = OtherWeights()
    with pytest.raises(WeightSyncError, match="weights 0"):
        run_campaign(config, rollout=rollout)
    assert rollout.calls == [] and not (config.run.dir / "metrics.jsonl").exists()
    rollout = FakeRollout()
    run_campaign(config, rollout=rollout)
    assert rollout.verified == [0]


def test_a_continued_run_says_what_changed_in_config_and_functions(tmp_path):
    lines = []

    class Lines(SilentObserver):
        def event(self, kind, message):
            lines.append(f"{kind}: {message}")

    config = make_config(tmp_path, run={"iterations": 1})
    run_campaign(config, observer=Lines(), functions={"rewards.py": "a"})
    more = make_config(tmp_path, run={"iterations": 2}, learner={"lr": 5e-5})
    run_campaign(more, observer=Lines(), functions={"rewards.py": "b"})
    (changed,) = (line for line in lines if line.startswith("warn: rewards.py changed since"))
    assert "since iteration 1:" in changed
    (continued,) = (line for line in lines if line.startswith("continue: after iteration 1"))
    assert "learner.lr was 1e-06, now 5e-05" in continued and "run.iterations was 1" in continued


def test_addresses_that_may_hold_a_password_are_not_printed(tmp_path):
    first = {"type": "mlflow", "uri": "https://me:secret@a", "experiment": "x"}
    old = parse_yaml(dump_config(make_config(tmp_path, trackers=[first])))
    changes = config_changes(old, make_config(tmp_path, trackers=[{**first, "uri": "https://b"}]))
    assert changes == ["trackers[0].uri is another one"]
