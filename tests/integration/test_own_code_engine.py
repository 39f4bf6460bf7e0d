"""A model directory that brings code along, and vLLM: the code never runs. Other loaders:
tests/unit/test_own_code.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayhf.rollout.env import engine_env

os.environ.update(engine_env("cpu", 1))

from own_code import make_plain, own_code

from rayhf.config.schema import RolloutConfig
from rayhf.errors import ConfigError
from rayhf.rollout.engine import RolloutEngine


def build(path: Path) -> RolloutEngine:
    return RolloutEngine(
        path, RolloutConfig(kv_cache_gib=0.01), dtype="float32", max_length=64, seed=0, device="cpu"
    )


def test_vllm_runs_no_code_of_a_model_directory(tmp_path: Path) -> None:
    plain = make_plain(tmp_path / "plain")
    with pytest.raises(ConfigError, match="vLLM refuses"):
        build(own_code(plain, tmp_path / "needed", model_type="own"))
    engine = build(own_code(plain, tmp_path / "ignored", model_type=None))
    engine.close()
    assert not (tmp_path / "mark").exists()
