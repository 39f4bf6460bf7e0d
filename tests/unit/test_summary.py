"""The table at a campaign's end: every change of a figure has its interval."""

from __future__ import annotations

import re

import pytest
from campaigns import make_config, run_campaign
from fakes import FakeScorer
from rich.console import Console
from view_runs import write_run

from launch.summary import short_number, summary
from launch.view import iteration_line
from rayhf.run_dir.records import read_metrics
from rayhf.types import Invalid

INTERVAL = re.compile(r"-?\d\.\d{3} to -?\d\.\d{3}")


def lines_of(table):
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table)
    return shown.get().splitlines()


def test_every_difference_has_an_interval(tmp_path):
    lines = lines_of(summary(write_run(tmp_path), "toy"))
    text = "\n".join(lines)
    (end,) = (line for line in lines if line.endswith("┘"))
    assert "…" not in text and all(
        line.endswith(("┓", "┃", "┩", "│", "┤", "┘")) for line in lines[1 : lines.index(end) + 1]
    )
    (first,) = (n for n, line in enumerate(lines) if "held-out, temperature 1" in line)
    cells = [cell.strip() for cell in lines[first].split("│")[2:5]]
    assert cells == ["0.500", "0.900", "+0.400"]
    assert [bool(INTERVAL.search(cell)) for cell in lines[first + 1].split("│")[2:5]] == [True] * 3
    assert lines[first + 1].split("│")[4].strip() == "0.400 to 0.400"
    for name in ("held-out, greedy", "eval/pairs/", "training reward"):
        assert name in text
    assert (
        "eval/pairs/pair_accuracy: held-out pairs that the implicit reward ranks (share)"
        in " ".join(text.split())
    )
    differences = [line for line in lines if re.search(r"│ +[+-]\d+\.\d{3} │$", line)]
    followed = [lines[lines.index(line) + 1] for line in differences]
    assert len(differences) == 4 and all(INTERVAL.search(line) for line in followed)


def test_figure_that_was_measured_once_has_no_difference(tmp_path):
    path = write_run(tmp_path, iterations=1)
    (path / "evaluations/iteration-000001.parquet").unlink()
    lines = lines_of(summary(path, "toy"))
    (row,) = (line for line in lines if "held-out, temperature 1" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["", "0.500", ""]


def test_campaign_records_what_its_evaluations_found(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2, "eval_every": 1})
    run_campaign(config)
    lines = lines_of(summary(config.run.dir, config.prompts.task))
    labels = " ".join(line.split("│")[1].strip() for line in lines if "│" in line)
    for name in ("held-out, temperature 1", "held-out, greedy", "length, tokens", "truncated"):
        assert name in labels
    assert "\n".join(lines).count(" to ") > 8


def test_completions_without_a_score_are_named_beside_the_mean(tmp_path):
    class Half(FakeScorer):
        async def score(self, requests):
            scored = await super().score(requests)
            return [
                (Invalid(reason="odd"),) if len(each) == 1 and number % 2 else each
                for number, each in enumerate(scored)
            ]

    config = make_config(tmp_path, run={"iterations": 1, "eval_every": 1})
    run_campaign(config, scorer=Half())
    (_, line) = read_metrics(config.run.dir)
    task = config.prompts.task
    assert line[f"eval/{task}/unscored"] == pytest.approx(1 / 3)
    assert "(33.3% without a score)" in iteration_line(line, 1, task)


@pytest.mark.parametrize("folder", ["evaluations", "samples"])
def test_damaged_tables_do_not_fail_a_finished_run(tmp_path, folder):
    path = write_run(tmp_path)
    for file in (path / folder).iterdir():
        file.write_bytes(b"PAR1 and no more")
    assert "seconds, all iterations" in "\n".join(lines_of(summary(path, "toy")))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.42841, "0.428"), (-0.0461, "-0.046"), (23.2841, "23.28"), (-123.46, "-123.5")],
)
def test_numbers_are_short(value, text):
    assert short_number(value) == text
