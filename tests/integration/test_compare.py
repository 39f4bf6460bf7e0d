"""`rayhf compare` with real engines: the initial policy against a trained one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.compare import PAGE
from rayhf.config.load import dump_config, load_config
from rayhf.errors import ConfigError
from rayhf.run_dir.files import write_manifest
from rayhf.tiny import build

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("RAYHF_TINY_DIR") or ROOT / ".tiny")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory whose policy is the initial one, without any campaign."""
    task = build(DIRECTORY, tasks=["arithmetic"])["arithmetic"]
    config = load_config(
        ROOT / "configs/tiny/online_dpo_arithmetic.yaml",
        [
            f"run.dir={tmp_path}",
            "run.eval_prompts=6",
            f"policy.model={task.policy}",
            f"prompts.train={task.train}",
            f"prompts.heldout={task.heldout}",
        ],
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"iteration": 1, "scorer/reward_mean": 0.5}) + "\n"
    )
    shutil.copytree(task.policy, tmp_path / "policy")
    write_manifest(tmp_path / "policy", {})
    return tmp_path


def test_equal_policies_answer_the_same(run: Path) -> None:
    shown = CliRunner().invoke(app, ["compare", str(run)], catch_exceptions=False)
    assert shown.exit_code == 0 and "6 prompts" in shown.output
    (line,) = [line for line in shown.output.splitlines() if "difference" in line]
    assert "0.000 to 0.000" in line
    page = (run / PAGE).read_text(encoding="utf-8")
    assert page.count("<tr><td>") == 6 and "plotly" in page


def test_run_without_a_policy_is_refused(run: Path) -> None:
    shutil.rmtree(run / "policy")
    with pytest.raises(ConfigError, match="no exported policy yet"):
        CliRunner().invoke(app, ["compare", str(run)], catch_exceptions=False)
