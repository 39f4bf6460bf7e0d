"""The environment of an engine's process."""

from __future__ import annotations

import pytest

from rayhf.errors import ConfigError
from rayhf.rollout.env import check_env, engine_env, openmp_env


def test_compilation_is_disabled_on_cpu_only() -> None:
    assert engine_env("cpu", 2)["TORCHDYNAMO_DISABLE"] == "1"
    assert engine_env("cpu", 2)["OMP_NUM_THREADS"] == "2"
    assert not {"TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"} & engine_env("gpu", 2).keys()
    assert engine_env("gpu")["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_threads_that_wait_do_not_spin_for_long_unless_the_environment_says_so(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert engine_env("cpu")["GOMP_SPINCOUNT"] == openmp_env()["GOMP_SPINCOUNT"]
    assert "GOMP_SPINCOUNT" not in engine_env("gpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert openmp_env() == {}


def test_users_log_level_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert engine_env("cpu")["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert engine_env("cpu")["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in engine_env("cpu", 1).items():
        monkeypatch.setenv(name, value)
    check_env("cpu")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with pytest.raises(
        ConfigError, match="TORCHDYNAMO_DISABLE is None, a rollout engine on cpu needs '1'"
    ):
        check_env("cpu")
    check_env("gpu")
