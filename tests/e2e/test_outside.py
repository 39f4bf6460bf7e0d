"""A separately installed plugin package, and the Python API: both use only public names."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from world import make_world, write_config

pytestmark = pytest.mark.timeout(1200)  # generous: on a shared machine a start takes minutes
RAYHF = Path(sys.executable).with_name("rayhf")
PACKAGE = Path(__file__).parents[1] / "outside"
NOTEBOOK = """
import asyncio
import rayhf

async def cell():  # a notebook's cells run inside an event loop
    config = rayhf.load_config("outside.yaml", ["run.iterations=3"])
    result = rayhf.run(config)
    last = result.metrics[-1]
    print("result:", last["policy/version"], (result.policy / "config.json").exists())

asyncio.run(cell())
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed, beside rayhf and apart from it."""
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "outside")
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def run(command: list[object], world: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_outside_package_imports_only_rayhf() -> None:
    """Nothing below `rayhf.`: what it uses is the public API."""
    for file in PACKAGE.rglob("*.py"):
        assert "from rayhf." not in file.read_text() and "import rayhf." not in file.read_text()


def test_outside_plugins_in_a_campaign_that_the_api_continues(
    world: Path, installed: dict[str, str]
) -> None:
    config = write_config(
        world,
        "outside",
        algorithm={"type": "best_of_n", "margin_step": 0.005},
        scorer={"train": [{"type": "rayhf_outside.scorer:Parity", "parity": "odd"}]},
        trackers=[{"type": "rayhf_outside.tracker:CsvTracker"}],
    )
    listed = run([RAYHF, "list", "algorithms"], world, {**installed, "COLUMNS": "200"})
    assert "best_of_n" in listed and "rayhf-outside" in listed
    run([RAYHF, "run", config], world, installed)
    # Through the Python API it continues.
    assert "result: 3.0 True" in run([sys.executable, "-c", NOTEBOOK], world, installed)
    lines = [
        json.loads(line) for line in (world / "outside/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    # The margin grows with every iteration, also over the restart after the second.
    margins = [line["best_of_n/margin"] for line in lines[1:]]
    assert margins == pytest.approx([0.0, 0.005, 0.01])
    assert lines[-1]["policy/version"] == 3 and 0.0 < lines[-1]["scorer/reward_mean"] < 1.0
    with (world / "outside/metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert [float(row[0]) for row in rows] == [0, 1, 2, 3]
    assert float(rows[-1][1]) == lines[-1]["scorer/reward_mean"]


def test_bad_settings_of_plugins_are_refused(world: Path, installed: dict[str, str]) -> None:
    config = write_config(world, "refused", algorithm={"type": "best_of_n", "marginstep": 1})
    done = subprocess.run(
        [RAYHF, "check", config], cwd=world, env=installed, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "unknown key algorithm.marginstep; did you mean margin_step?" in done.stderr


def test_loss_of_a_package_goes_with_an_algorithm_of_rayhf(
    world: Path, installed: dict[str, str]
) -> None:
    """That a campaign trains with a loss from outside is tested in test_jobs.py."""
    config = write_config(world, "loss")
    run([RAYHF, "check", config, "algorithm.loss=squared_margin"], world, installed)
