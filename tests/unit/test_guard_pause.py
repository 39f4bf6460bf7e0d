"""A guard's pause: the iteration is committed aside, and `unpause` continues in either way."""

import json

import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner
from typer.testing import CliRunner

import rayhf.run_dir.store
from launch.cli import app
from rayhf.config.service import EndpointSecurity, ServiceConfig
from rayhf.control.commands import FileControl
from rayhf.control.grpc_client import GrpcControl
from rayhf.control.grpc_server import serve_campaign
from rayhf.control.status import read_status
from rayhf.errors import PausedError
from rayhf.monitoring.audit import audit
from rayhf.run_dir.state import read_state
from rayhf.run_dir.store import RunDir

PAUSE_AT = 24


class DriftingLearner(FakeLearner):
    """Its entropy halves for good at the iteration before PAUSE_AT."""

    async def step(self, batch, loss):
        metrics = await super().step(batch, loss)
        return {**metrics, "policy/entropy": 1.0 if self.steps < PAUSE_AT - 1 else 0.1}


def config_of(directory, *, pause=0.25, iterations=26, checkpoint_every=24, **run):
    return make_config(
        directory,
        run={
            "iterations": iterations,
            "eval_every": 0,
            "checkpoint_every": checkpoint_every,
            **run,
        },
        guards={"entropy": {"pause": pause, "unless_gain": None}},
    )


@pytest.fixture
def paused(tmp_path):
    """A campaign of one checkpoint every 24 iterations that a guard paused at the 24th."""
    config = config_of(tmp_path / "paused")
    with pytest.raises(PausedError, match="entropy"):
        run_campaign(config, learner=DriftingLearner())
    return config


def test_unpause_loses_nothing(tmp_path, paused):
    whole = config_of(tmp_path / "whole", pause=None)
    run_campaign(whole, learner=DriftingLearner())
    assert metrics_of(paused) == metrics_of(whole)[: PAUSE_AT + 1]
    assert (paused.run.dir / "samples/iteration-000024.parquet").exists()
    assert not (paused.run.dir / "policy").exists()
    assert [f for f in audit(paused.run.dir, deep=True) if f.problem] == []

    message = FileControl(paused.run.dir).unpause()
    assert "entropy only warns from now on" in message and "after iteration 24" in message
    learner = DriftingLearner()
    run_campaign(paused, learner=learner)
    assert len(learner.batches) == 2  # only the two iterations after the pause
    assert metrics_of(paused) == metrics_of(whole)
    assert not (paused.run.dir / "metrics.rewound.jsonl").exists()
    assert [f for f in audit(paused.run.dir, deep=True) if f.problem] == []


def test_same_command_says_both_ways(paused):
    store = RunDir(paused)
    with pytest.raises(PausedError) as refused:
        store.check_paused()
    store.close()
    run = store.path
    for part in (
        "policy/entropy is 0.1",
        f"`rayhf unpause {run}` accepts the guard and continues after iteration 24",
        f"`rayhf unpause {run} --from healthy` keeps it active and repeats from iteration 1",
    ):
        assert part in str(refused.value)
    assert "--from healthy" in read_status(run).advice


def test_from_healthy_repeats_and_the_guard_stays_active(tmp_path):
    config = config_of(tmp_path, checkpoint_every=20)
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    shown = CliRunner().invoke(app, ["unpause", str(config.run.dir), "--from", "healthy"])
    assert "after iteration 20" in shown.output
    learner = DriftingLearner()
    with pytest.raises(PausedError, match="entropy"):
        run_campaign(config, learner=learner)
    assert len(learner.batches) == 4  # iterations 21 to 24
    rewound = (config.run.dir / "metrics.rewound.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in rewound] == [21, 22, 23, 24]
    state = read_state(config.run.dir)
    assert (state.iteration, state.unhealthy, state.accepted) == (20, "unhealthy-000024", ())


@pytest.mark.parametrize(("start", "iteration"), [("unhealthy", 24), ("healthy", 0)])
def test_both_ways_over_grpc(tmp_path, paused, start, iteration):
    server = serve_campaign(paused.run.dir, ServiceConfig(), base=tmp_path)
    try:
        there = GrpcControl(server.address, EndpointSecurity(), base=tmp_path)
        assert f"after iteration {iteration}" in there.unpause(start=start)
    finally:
        server.stop()


def test_unhealthy_checkpoint_is_never_loaded_by_itself(paused):
    store = RunDir(paused)
    assert store.latest() is None and store.state.checkpoint is None
    store.close()


def test_retention_keeps_it_until_the_next_healthy_commit(tmp_path):
    config = config_of(tmp_path, checkpoint_every=20)
    checkpoints = config.run.dir / "checkpoints"
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"iteration-000020", "unhealthy-000024"}
    FileControl(config.run.dir).unpause(start="healthy")
    run_campaign(config_of(tmp_path, checkpoint_every=1, pause=None), learner=DriftingLearner())
    assert not list(checkpoints.glob("unhealthy-*"))


class DyingLearner(DriftingLearner):
    """Killed while it saves."""

    async def save(self, directory):
        await super().save(directory)
        raise RuntimeError("killed while saving")


def test_kill_while_saving_repeats_from_the_healthy_commit(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(RuntimeError, match="killed while saving"):
        run_campaign(config, learner=DyingLearner())
    assert not list((config.run.dir / "checkpoints").glob("*ly-*"))
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    assert read_state(config.run.dir).unhealthy == "unhealthy-000024"


def test_kill_between_seal_and_state_repeats_too(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    write = rayhf.run_dir.store.write_state

    def killed(run, state, check):
        if state.state == "paused":
            raise RuntimeError("killed before campaign.json")
        write(run, state, check)

    with monkeypatch.context() as patch:
        patch.setattr(rayhf.run_dir.store, "write_state", killed)
        with pytest.raises(RuntimeError, match=r"killed before campaign\.json"):
            run_campaign(config, learner=DriftingLearner())
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    FileControl(config.run.dir).unpause()
    run_campaign(config, learner=DriftingLearner())
    assert read_status(config.run.dir).state == "done"


@pytest.mark.parametrize("healthy", [0, 20])
def test_damaged_unhealthy_checkpoint_falls_back_with_a_word(tmp_path, healthy):
    config = config_of(tmp_path, checkpoint_every=healthy)
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    checkpoints = config.run.dir / "checkpoints"
    (checkpoints / "unhealthy-000024/learner/steps").write_text("99")
    problems = [f.what for f in audit(config.run.dir, deep=True) if f.problem]
    assert problems == ["checkpoint unhealthy-000024"]
    message = FileControl(config.run.dir).unpause()
    assert "does not have the manifest's checksum" in message or "bytes, the manifest" in message
    assert "so the last healthy checkpoint is used" in message
    assert f"after iteration {healthy}" in message
    assert list(checkpoints.glob(".corrupt-*-unhealthy-000024"))
    run_campaign(config, learner=DriftingLearner())
    assert metrics_of(config)[-1]["iteration"] == 26


def test_unpause_that_was_killed_half_way_is_repeated(paused):
    checkpoints = paused.run.dir / "checkpoints"
    (checkpoints / "unhealthy-000024").rename(checkpoints / "iteration-000024")
    assert "after iteration 24" in FileControl(paused.run.dir).unpause()


def test_last_iteration_accepted_is_exported(tmp_path):
    config = config_of(tmp_path, iterations=PAUSE_AT, checkpoint_every=0)
    with pytest.raises(PausedError):
        run_campaign(config, learner=DriftingLearner())
    FileControl(config.run.dir).unpause()
    learner = DriftingLearner()
    run_campaign(config, learner=learner)
    assert (config.run.dir / "policy/config.json").exists() and not learner.batches
    assert read_status(config.run.dir).state == "done"
