"""The catalog of metrics: complete, and printed as it is."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from rayhf.monitoring.catalog import METRICS, find

ROOT = Path(__file__).parents[2]
NAMES = re.compile(
    r'f?"((?:policy|rollout|scorer|reference|learner|critic|pairs|eval|time|staleness|selection'
    r"|ppo|dpo|sppo|inpo|mnpo|nash_md|xpo|dno|distill|hypo|sft|kto|mcts|tpo|spar|value|game|tasks"
    r'|self_rewarding)/[\w{}/.]+)"'
)


def written_names():
    """Every metric name in the source, with its f-string parts as they stand."""
    for room in ("rayhf", "actors"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name == "catalog.py":
                continue
            for name in NAMES.findall(file.read_text()):
                if "{" not in name.rpartition("/")[2]:  # else the last part is not known here
                    yield re.sub(r"\{[^}]*\}", "x", name), file.relative_to(ROOT)


def test_every_metric_in_the_source_is_in_the_catalog():
    missing = {f"{name} ({file})" for name, file in written_names() if find(name) is None}
    assert missing == set()
    assert len({name for name, _ in written_names()}) > 90


def test_names_are_unique_and_complete():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.meaning and metric.writer for metric in METRICS)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("policy/version", "<policy>/version"),
        ("eval/a.b/sampled", "eval/<task>/sampled"),
        ("refiner/sft/nll", "<objective>/sft/nll"),
        ("game/share/rock", "<task>/share/<answer>"),
        ("rollout/tokens", "rollout/tokens"),
    ],
)
def test_patterns(name, row):
    assert find(name).name == row and find("rollout/nonsense/x/y z") is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("algorithms", "reinforce++"),
        ("losses", "discopop"),
        ("scorers", "pairwise_rule"),
        ("sources", "file"),
        ("trackers", "wandb"),
        ("evaluations", "exploitability"),
        ("metrics", "rollout/mismatch_kl"),
    ],
)
def test_rayhf_list(kind, expected):
    shown = CliRunner().invoke(app, ["list", kind], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and expected in shown.output
