"""MNPO: its loss by hand, its opponents, and the population in the run directory."""

import json
import shutil

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner
from pydantic import ValidationError

from rayhf.algorithms.mnpo import MNPO, MNPOConfig
from rayhf.config.algorithms import PopulationConfig
from rayhf.errors import CheckpointError, ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.monitoring.audit import audit
from rayhf.planning.preflight import check_settings
from rayhf.types import Example, Row, token_array


def row(sample, **logps):
    return Row(
        prompt_id="p",
        sample=sample,
        prompt_ids=token_array((1,)),
        response_ids=token_array((2, 3)),
        tokens={name: np.asarray(values, dtype=np.float32) for name, values in logps.items()},
    )


def loss_of(config, chosen, rejected, logp):
    import torch

    algorithm = MNPO(config)
    (example,), _ = algorithm.credit([Example(rows=(row(0, **chosen), row(1, **rejected)))])
    micro = build_micro_batch([example], Totals(tokens=4, rows=2, examples=1), "cpu")
    output = torch.tensor(logp, dtype=torch.float32, requires_grad=True)
    result = algorithm.loss()(output, micro)
    result.loss.backward()
    return result, output.grad.tolist()


def pair(names, chosen, rejected):
    """Token values of a pair from the sums of two equal tokens."""
    return (
        {name: [value / 2] * 2 for name, value in zip(names, chosen, strict=True)},
        {name: [value / 2] * 2 for name, value in zip(names, rejected, strict=True)},
    )


NAMES = ("behavior_logp", "ref_logp", "old_logp", "past_logp_1", "past_logp_2")


def test_loss_by_hand():
    """Gaps: policy 2, reference 1, current 0.5, past -1 and 3."""
    chosen, rejected = pair(NAMES, (-1, -2, -2, -4, -1), (-1, -3, -2.5, -3, -4))
    config = MNPOConfig(eta=0.5, tau=0.1, population={"size": 2}, weights=(1, 2, 1))
    # tau / eta = 0.2; opponents (0.5 * 1 + -1 * 2 + 3 * 1) / 4 = 0.375
    h = 2.0 - 0.2 * 1.0 - 0.8 * 0.375
    expected = 0.5 * (h - 1.0) ** 2  # eta * (H - 1 / (2 eta))^2: INPO's scale
    result, gradient = loss_of(config, chosen, rejected, [-1.0, -1.0, -2.0, -2.0])
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient == pytest.approx([h - 1.0] * 2 + [1.0 - h] * 2, rel=1e-6)
    assert result.metrics["mnpo/gap"] == pytest.approx(2.0)


def test_with_no_past_policy_it_is_inpo():
    from rayhf.algorithms.inpo import INPO, INPOConfig

    chosen, rejected = pair(NAMES[:3], (-1, -2, -2), (-1, -3, -2.5))
    config = MNPOConfig(eta=0.5, tau=0.1, population={"size": 0})
    result, _ = loss_of(config, chosen, rejected, [-1.0, -1.0, -2.0, -2.0])
    example = Example(rows=(row(0, **chosen), row(1, **rejected)))
    micro = build_micro_batch([example], Totals(tokens=4, rows=2, examples=1), "cpu")
    import torch

    loss = INPO(INPOConfig(eta=0.5, tau=0.1)).loss()
    inpo = loss(torch.tensor([-1.0, -1.0, -2.0, -2.0]), micro)
    assert result.loss.item() == inpo.loss.item()


def test_the_initial_policy_has_the_place_of_past_ones_that_lack():
    algorithm = MNPO(MNPOConfig(population={"size": 3}, weights=(4, 3, 2, 1)))
    example = Example(rows=(row(0, old_logp=[1, 1], past_logp_1=[2, 4]),))
    (credited,), metrics = algorithm.credit([example])
    # 0.4 of the current one; the rest of the initial one, which is the only past one.
    assert credited.rows[0].tokens["opponent_logp"] == pytest.approx([1.6, 2.8])
    assert metrics == {"mnpo/past": 1.0}
    tokens = {f"past_logp_{number}": [number] * 2 for number in range(10, 0, -1)}
    algorithm = MNPO(MNPOConfig(population={"size": 10}, weights=(0,) * 10 + (1,)))
    (credited,), _ = algorithm.credit([Example(rows=(row(0, old_logp=[0, 0], **tokens),))])
    assert credited.rows[0].tokens["opponent_logp"].tolist() == [10, 10]


def test_which_policies_an_iteration_reads_and_which_are_kept():
    three = PopulationConfig(size=3)
    assert [three.read_by(t) for t in (1, 2, 3, 9)] == [[], [0], [1, 0], [7, 6, 5]]
    sparse = PopulationConfig(size=2, every=4)
    assert [sparse.read_by(t) for t in (1, 2, 5, 6, 14)] == [[], [0], [0], [4, 0], [12, 8]]
    for population in (three, sparse, PopulationConfig(size=1), PopulationConfig(size=0)):
        for last in range(20):
            later = {n for t in range(last + 1, 40) for n in population.read_by(t) if n <= last}
            assert set(population.kept(last)) == later


def config_of(directory, *, size=2, every=1, **run):
    directory.mkdir(exist_ok=True)
    algorithm = {"type": "mnpo", "samples": 4, "population": {"size": size, "every": every}}
    return make_config(
        directory, algorithm=algorithm, run={"iterations": 8, "keep_best": False, **run}
    )


def members(config):
    folder = config.run.dir / "population"
    return sorted(int(path.name[-6:]) for path in folder.iterdir())


def past_logps(roles):
    """By iteration: the past policies' log-probs of a token, which are minus their steps."""
    rows = [batch.examples[0].rows[0] for batch in roles.learners["policy"].batches]
    return [
        [float(values[0]) for name, values in sorted(row.tokens.items()) if "past" in name]
        for row in rows
    ]


def test_iterations_read_past_policies_and_retention_keeps_what_a_checkpoint_needs(tmp_path):
    config = config_of(tmp_path / "a", checkpoint_every=3)
    roles = run_campaign(config)
    assert past_logps(roles) == [[], [0], [-1, 0], [-2, -1], [-3, -2], [-4, -3], [-5, -4], [-6, -5]]
    # Checkpoints 6 and 8 are kept; 6 needs the policies after 6, 5 and 4.
    assert members(config) == [4, 5, 6, 7, 8]
    assert all(not finding.problem for finding in audit(config.run.dir, deep=False))
    sparse = config_of(tmp_path / "b", every=3, size=1)
    assert past_logps(run_campaign(sparse)) == [[], [0], [0], [0], [-3], [-3], [-3], [-6]]
    assert members(sparse) == [3, 6]


@pytest.mark.parametrize("fail_at", (2, 3, 5))
def test_a_killed_run_continues_with_the_same_opponents(tmp_path, fail_at):
    whole, broken = (config_of(tmp_path / name) for name in "ab")
    expected = past_logps(run_campaign(whole))
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=FakeLearner(fail_at=fail_at))
    committed = json.loads((broken.run.dir / "campaign.json").read_text())["iteration"]
    again = run_campaign(broken)
    assert past_logps(again) == expected[committed:]
    assert metrics_of(whole) == metrics_of(broken)
    assert members(whole) == members(broken)
    for name in ("credit", "examples"):
        for file in (whole.run.dir / name).iterdir():
            assert file.read_bytes() == (broken.run.dir / name / file.name).read_bytes()


def test_a_lost_past_policy_stops_the_resumed_run(tmp_path):
    config = config_of(tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, learner=FakeLearner(fail_at=5))
    assert members(config) == [0, 1, 2, 3, 4, 5]  # checkpoints 2 and 4
    steps = config.run.dir / "population/iteration-000003/steps"
    steps.write_text("7")
    with pytest.raises(CheckpointError, match=r"iteration-000003: steps .*restore it from a copy"):
        run_campaign(config)
    assert members(config) == [0, 1, 2, 3, 4]  # iteration 5 will be repeated
    problems = [f.problem for f in audit(config.run.dir, deep=True) if "past policy" in f.what]
    assert sum(map(bool, problems)) == 1
    shutil.rmtree(steps.parent)
    with pytest.raises(CheckpointError, match="past policy"):
        run_campaign(config)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValidationError, match=r"are 3 with the sum 6; expected 2 .*size 1"):
        MNPOConfig(weights=(1, 2, 3))
    with pytest.raises(ValidationError, match="with a sum above 0"):
        MNPOConfig(weights=(0, 0))
    algorithm = {"type": "mnpo", "reference": {"type": "previous"}}
    with pytest.raises(ConfigError, match=r"expected algorithm\.reference=\{type: initial\}"):
        check_settings(make_config(tmp_path, algorithm=algorithm))
    config = make_config(tmp_path, algorithm={"type": "mnpo"}, reference={"ranks": 2})
    with pytest.raises(ConfigError, match=r"which a sharded reference cannot load; .*ranks=1"):
        check_settings(config)
