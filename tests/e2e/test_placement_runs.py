"""Placement in the command line: a cluster that is too small, and a calibrated plan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from campaign_runs import RAYHF
from world import make_world, write_config

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("placement"))


def rayhf(world: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [RAYHF, *map(str, arguments)], cwd=world, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def test_missing_resource_is_named_after_a_table_of_nodes(world: Path) -> None:
    config = write_config(world, "moon", cluster={"resources": {"learner": {"moon": 2}}})
    said, error = rayhf(world, "run", config, code=2)
    assert (
        error
        == "rayhf: no room in the cluster: 2 moon requested (learner 2), 0 available on 1 node(s)\n"
    )
    assert "no place for" in said and "moon free / all" in said


def test_calibration_measures_the_pace(world: Path) -> None:
    config = write_config(world, "paced", run={"iterations": 50})
    said, _ = rayhf(world, "check", config, "--calibrate")
    assert (
        "rounds per hour" in said
        and "one engine writes" in said
        and "50 rounds, without evaluations" in said
    )
    assert not (world / "paced").exists() and not list(world.glob(".calibration-*"))
