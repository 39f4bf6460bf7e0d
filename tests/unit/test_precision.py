"""Rounding between learner and engines: stochastic rounding, sync metrics, and what check says."""

import pytest
import torch
from campaigns import make_config, metrics_of, run_campaign
from safetensors.torch import save_file

from rayhf.errors import ConfigError
from rayhf.planning.precision import hidden_share, precision_warning
from rayhf.planning.preflight import check_settings
from rayhf.weights.rounding import round_stochastic
from rayhf.weights.sync_metrics import SAMPLE, SyncMeter

DTYPES = (torch.bfloat16, torch.float16)


def neighbors(values, dtype):
    """The numbers of `dtype` next to each value, below and above, by brute force."""
    nearest = values.to(dtype)
    step = torch.tensor(1, dtype=torch.int16)
    bits = nearest.view(torch.int16)
    # One step up and down in magnitude; sorting gives below and above for either sign.
    grid = torch.stack([(bits - step).view(dtype), nearest, (bits + step).view(dtype)])
    grid = grid.float().sort(0).values
    below = torch.where(grid[1] > values, grid[0], grid[1])
    above = torch.where(grid[1] > values, grid[1], torch.where(grid[1] == values, grid[1], grid[2]))
    return below, above


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stochastic_rounding_takes_a_neighbor_and_is_unbiased(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator) * torch.logspace(-3, 1, 400)
    draws = torch.stack(
        [round_stochastic(values, dtype, seed=seed).float() for seed in range(2000)]
    )
    below, above = neighbors(values, dtype)
    assert bool(((draws == below) | (draws == above)).all())
    error = (draws.mean(0) - values) / (above - below)
    assert float(error.abs().max()) < 5 * 0.5 / 2000**0.5
    assert float((draws != values.to(dtype).float()).float().mean()) > 0.1  # nearest would fail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_dtype_stay(dtype):
    values = torch.tensor([0.0, 1.0, -2.5, 2.0**-14, 2.0**-20, 3.0e4]).to(dtype).float()
    assert torch.equal(round_stochastic(values, dtype, seed=1).float(), values)


def test_seed_decides_the_bits(monkeypatch):
    values = torch.linspace(0.1, 0.2, 10_000).reshape(100, 100)
    first = round_stochastic(values, torch.bfloat16, seed=3)
    assert torch.equal(first, round_stochastic(values, torch.bfloat16, seed=3))
    assert not torch.equal(first, round_stochastic(values, torch.bfloat16, seed=4))
    assert first.shape == values.shape and first.dtype == torch.bfloat16


def sync(meter, trained, sent=None, dtype=torch.bfloat16):
    meter.begin()
    meter.observe("w", trained, trained if sent is None else sent, dtype)
    return meter.metrics()


def started(initial, **settings):
    meter = SyncMeter(initial.numel(), **{"is_exact": True, **settings})
    meter.start([("w", initial)])
    return meter


def test_hidden_update_is_lost_until_it_reaches_half_a_step():
    initial = torch.ones(1000)  # bfloat16's step above 1 is 2**-7
    meter = started(initial)
    assert meter.metrics() == {}
    assert sync(meter, initial + 2.0**-10) == {
        "sync/changed_fraction": 0.0,
        "sync/update_lost": 1.0,
    }
    over = sync(meter, initial + 2.0**-8 + 2.0**-9)
    assert over["sync/changed_fraction"] == 1.0
    assert over["sync/update_lost"] == pytest.approx(-1 / 3)  # rounded up to 2**-7
    assert sync(meter, initial + 2.0**-7) == {
        "sync/changed_fraction": 0.0,
        "sync/update_lost": 0.0,
    }


def test_unbiased_rounding_loses_nothing():
    initial = torch.ones(200_000)
    trained = initial + 2.0**-11
    sent = round_stochastic(trained, torch.bfloat16, seed=0)
    metrics = sync(started(initial), trained, sent)
    assert abs(metrics["sync/update_lost"]) < 0.05
    assert metrics["sync/changed_fraction"] == pytest.approx(1 / 16, abs=0.01)


def test_only_a_float32_learner_can_say_what_is_lost():
    initial = torch.ones(10, dtype=torch.bfloat16)
    assert sync(started(initial, is_exact=False), initial * 2) == {"sync/changed_fraction": 1.0}


def test_sample_is_bounded():
    meter = SyncMeter(50 * SAMPLE, is_exact=True)
    meter.start([("w", torch.zeros(1_000_000))])
    assert 0 < meter._initial["w"].numel() < 20_000


def test_metrics_of_a_sync_are_metrics_of_the_iteration(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    assert ["sync/changed_fraction" in line for line in metrics_of(config)] == [False] + 4 * [True]


# -------------------------------------------------------------------------------------------- check


@pytest.fixture
def model(tmp_path):
    """Weights like a language model's: a normal distribution of width 0.05, rounded to bfloat16."""
    (tmp_path / "m").mkdir()
    weights = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    save_file({"w": weights.bfloat16(), "norm": torch.ones(8)}, tmp_path / "m/model.safetensors")
    return tmp_path


def warning(base, *, lr, learner="float32", policy="bfloat16", lora=None, **settings):
    config = make_config(
        base,
        policy={"model": "m", "dtype": policy, "lora": lora},
        learner={"lr": lr, "dtype": learner, **settings},
    )
    _, derived = check_settings(config)
    return precision_warning(config, derived, base)


def test_check_warns_of_updates_that_rounding_hides(model):
    message = warning(model, lr=1e-5)
    for part in ("policy.dtype=float32 or float16", "sync_rounding=stochastic", "sync/update_lost"):
        assert part in message
    masters = warning(model, lr=1e-6, learner="bfloat16")
    assert "float32 masters" in masters and "learner.dtype=float32" in masters
    assert "policy.dtype=float32," in warning(model, lr=1e-7, policy="float16")


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3},
        {"lr": 1e-5, "policy": "float32"},
        {"lr": 1e-5, "policy": "float16"},
        {"lr": 1e-5, "lora": {}},
        {"lr": 1e-5, "sync_rounding": "stochastic"},
        {"lr": 5e-5, "epochs": 8},
    ],
    ids=str,
)
def test_no_warning_where_engines_follow(model, settings):
    assert warning(model, **settings) is None


def test_share_is_that_of_the_rounded_weights(model):
    torch.manual_seed(0)
    weights = (torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    update = 1e-4
    moved = (weights.float().abs() + update).bfloat16() != weights.abs()
    share = hidden_share(model / "m", update=update, dtype="bfloat16")
    assert share == pytest.approx(1 - float(moved.float().mean()), abs=0.01)
    assert hidden_share(model / "missing", update=update, dtype="bfloat16") is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"policy": "float32"}, r"policy\.dtype float32; expected nearest"),
        ({"learner": "bfloat16"}, r"learner\.dtype is bfloat16"),
        ({"lora": {}}, r"with policy\.lora the engines merge adapters"),
    ],
    ids=str,
)
def test_stochastic_rounding_of_nothing_is_refused(model, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        warning(model, lr=1e-5, sync_rounding="stochastic", **settings)
