"""The table of loops against baselines: its cases, its arithmetic, its reading of a run."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayhf.config.registry import ALGORITHMS
from tests.bench.loop_cases import CASES, GRPO, Setup
from tests.bench.loops import Figures, Row, Runner, interval, plan, read, section, table, tune

METRIC = "eval/arithmetic/sampled"
CASE = CASES["dr_grpo"]


def figures(after, *, tokens=100):
    """A run's record, of as many prompts as `after` has values."""
    values = {f"p{number}": value for number, value in enumerate(after)}
    return Figures(
        before={METRIC: dict.fromkeys(values, 0.25)},
        after={METRIC: values},
        prompts=32,
        completions=256,
        tokens=tokens,
        other_tokens=0,
        calls=256,
        seconds=60.0,
    )


def row(setup, *runs, **changes):
    """A setup's runs on seeds 11, 12, ..."""
    seeds = range(11, 11 + len(runs))
    return Row(setup=setup, rate="0.0002", runs=dict(zip(seeds, runs, strict=True)), **changes)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_algorithm_is_in_a_case_and_every_setup_is_valid():
    setups = [s for case in CASES.values() for s in (case.loop, *case.baselines)]
    types = {setup.config.algorithm.type for setup in setups}
    assert types == set(ALGORITHMS.builtin)


def test_equal_setups_share_runs_whatever_they_are_called():
    assert Setup(label="the baseline", preset="grpo_arithmetic").name == GRPO.name
    assert GRPO.plus("learner.lr=1e-4").name != GRPO.name
    assert GRPO.plus("a=1", "a=2").name != GRPO.plus("a=2", "a=1").name


def test_interval_holds_prompts_and_seeds():
    random = np.random.default_rng(0)
    prompts = random.random((1, 400)) < 0.5
    mean, low, high = interval(prompts.astype(float))
    assert mean == prompts.mean()
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)  # binomial
    # Seeds that are asked the same prompts and answer alike say nothing new.
    assert np.subtract(*interval(np.repeat(prompts, 3, axis=0))[1:]) == pytest.approx(low - high)
    # Seeds that differ do: standard error sqrt(var / S), here without any spread of prompts.
    means = np.array([0.4, 0.5, 0.6])
    draws = interval(np.repeat(means[:, None], 5, axis=1))
    assert draws[0] == pytest.approx(0.5)
    assert draws[1] == pytest.approx(0.5 - 0.1 * np.sqrt(1.5)) and draws[2] > 0.6


def test_table_says_better_only_where_the_interval_does():
    worse = row(
        CASE.baselines[0], figures([0.0, 1.0] * 50), figures([0.0, 1.0] * 50), figures([0, 1] * 50)
    )
    better = row(CASE.loop, figures([1.0] * 100), figures([1.0] * 100, tokens=400))
    lines = table([better, worse], CASE, (11, 12, 13))
    loop, baseline = (dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:])
    assert loop["seed 11"] == "0.250 -> 1.000" and loop["seed 13"] == "not finished"
    assert loop["tokens"] == "250" and loop["loop minus baseline"] == ""
    # The difference is that of the two seeds that both have.
    assert baseline["loop minus baseline"].startswith("+0.500 (+0.")
    assert baseline["the loop is"] == "better"
    assert cells(table([worse, better], CASE, (11,))[3])[6] == "worse"
    same = row(CASE.loop, figures([1.0, 0.0] * 50))
    assert "no difference shown" in table([same, worse], CASE, (11,))[3]
    assert "not finished" in table([same, row(CASE.baselines[0])], CASE, (11,))[3]


class Finished(Runner):
    """Runs of which a table says the accuracy, by learning rate."""

    def figures(self, setup, seed, metrics):
        after = {1e-4: 0.5, 2e-4: 0.75, 4e-4: None}[round(setup.config.learner.lr, 6)]
        return None if after is None else figures([after] * 10)


def test_tuning_takes_the_best_rate_that_finished(tmp_path):
    low = GRPO.plus("learner.lr=1e-4")
    chosen, line = tune(GRPO, CASE, Finished(directory=tmp_path))
    assert chosen == GRPO and cells(line)[2:] == ["0.500", "0.750", "not finished", "0.0002"]
    text = section("dr_grpo", CASE, Finished(directory=tmp_path), [11], tuned=True)
    assert "tuned alike" in text and "Tuning on seed 7" in text
    assert low.config.learner.lr == 1e-4


def test_run_is_read_from_its_directory(tmp_path):
    run = Runner(directory=tmp_path).path(GRPO, 11)
    for folder in ("evaluations", "samples"):
        (run / folder).mkdir(parents=True)
    for iteration, value in ((0, 0.25), (2, 0.75)):
        rows = [{"metric": METRIC, "prompt_id": "a", "value": value}]
        pq.write_table(
            pa.Table.from_pylist(rows), run / f"evaluations/iteration-00000{iteration}.parquet"
        )
    sample = {"iteration": 1, "prompt_id": "a", "kind": "answer", "outcome": "Scored"}
    sample |= {"token_ids": [1, 2, 3], "wins": [0.5, 1.0, 0.0]}
    judged = {**sample, "kind": "judgement", "outcome": None, "token_ids": [1], "wins": None}
    path = run / "samples/iteration-000001.parquet"
    lines = [{"iteration": 0}, {"iteration": 1, "rollout/tokens": 2.0, "time/iteration_s": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    pq.write_table(pa.Table.from_pylist([sample] * 3), path)
    one = read(run, [METRIC])
    assert (one.before, one.after) == ({METRIC: {"a": 0.25}}, {METRIC: {"a": 0.75}})
    assert (one.prompts, one.completions, one.seconds) == (1, 3, 1.5)
    # More tokens were recorded than counted: the run was resumed.
    assert (one.tokens, one.other_tokens, one.calls) == (9, 0, 3)

    pq.write_table(pa.Table.from_pylist([sample, judged]), path)
    assert (read(run, [METRIC]).other_tokens, read(run, [METRIC]).calls) == (1, 1)


def test_plan_names_the_cases_that_share_a_run(tmp_path):
    lines = [*plan(["dr_grpo", "distill"], Runner(directory=tmp_path), [11])]
    assert lines[1].startswith("grpo_arithmetic (GRPO): for dr_grpo, distill; finished seeds []")
    assert sum(line.startswith("sft_arithmetic ") for line in lines) == 1
