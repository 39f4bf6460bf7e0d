"""The inbox: a row is taken by one iteration, once, also when the iteration is repeated."""

import json
import multiprocessing

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeScorer

from rayhf.algorithms.base import SelectionContext, TakesLabels
from rayhf.config.registry import ALGORITHMS
from rayhf.control.labels import check_label, uncertain_pairs
from rayhf.errors import ConfigError
from rayhf.monitoring.audit import audit
from rayhf.run_dir.inbox import Inbox, submit_rows, submitted_rows
from rayhf.types import Example, Sampling, given_row


def test_row_is_taken_by_one_iteration_only(tmp_path):
    first = submit_rows(tmp_path, "labels", [{"n": 1}, {"n": 2}, {"n": 3}], source="a")
    inbox = Inbox(tmp_path)
    assert [row["n"] for row in inbox.take("labels", 4, limit=2)] == [1, 2]
    submit_rows(tmp_path, "labels", [{"n": 4}], source="b")
    again = Inbox(tmp_path)  # another attempt
    assert [row["n"] for row in again.take("labels", 4)] == [1, 2]
    assert [row["n"] for row in again.take("labels", 5)] == [3, 4]
    assert again.take("labels", 6) == [] and again.take("prompts", 4) == []
    assert len(set(first)) == 3 and submitted_rows(tmp_path, "labels")[3]["source"] == "b"


def test_torn_line_costs_no_other_line(tmp_path):
    submit_rows(tmp_path, "prompts", [{"prompt": "one"}], source="a")
    with (tmp_path / "inbox" / "prompts.jsonl").open("ab") as file:
        file.write(b'{"id": "x", "prompt": "tor')
    submit_rows(tmp_path, "prompts", [{"prompt": "two"}], source="a")
    assert [row["prompt"] for row in submitted_rows(tmp_path, "prompts")] == ["one", "two"]


def _many(run, name):
    for number in range(50):
        submit_rows(run, "labels", [{"n": number}, {"n": number}], source=name)


def test_concurrent_submissions(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=_many, args=(tmp_path, name))
        for name in "abc"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = submitted_rows(tmp_path, "labels")
    assert len(rows) == 300 and len({row["id"] for row in rows}) == 300


def test_submitted_prompts_are_in_the_next_iteration(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2}, rollout={"max_tokens": 8})
    config.run.dir.mkdir()
    long = {"prompt": "x" * 100}
    broken = {"prompt": "y", "messages": "both"}
    submit_rows(
        config.run.dir, "prompts", [{"prompt": "mine", "answer": 3}, long, broken], source="me"
    )
    run_campaign(config)
    tables = [
        pq.read_table(config.run.dir / f"samples/iteration-{n:06d}.parquet").to_pylist()
        for n in (1, 2)
    ]
    prompts = [{row["prompt_id"] for row in rows} for rows in tables]
    assert [len(ids) for ids in prompts] == [4, 4]
    submitted = [[p for p in ids if not p.startswith("p")] for ids in prompts]
    assert len(submitted[0]) == 1 and submitted[1] == []
    assert [f for f in audit(config.run.dir, deep=False) if f.problem] == []


def test_labels_are_trained_on_once_with_their_lineage(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2, "checkpoint_every": 1})
    run_campaign(config)
    pairs = uncertain_pairs(config.run.dir, 100)
    assert len({pair.pair_id for pair in pairs}) == len(pairs) == 8
    newest = [pair.certainty for pair in pairs if pair.pair_id.startswith("2/")]
    assert newest == sorted(newest) and pairs[0].pair_id.startswith("2/")
    for pair, verdict in zip(pairs, ("first", "second", "tie"), strict=False):
        check_label(config.run.dir, pair.pair_id, verdict)
        submit_rows(
            config.run.dir, "labels", [{"pair_id": pair.pair_id, "verdict": verdict}], source="ann"
        )
    assert len(uncertain_pairs(config.run.dir, 100)) == 5  # labeled pairs are left out
    run_campaign(make_config(tmp_path, run={"iterations": 4, "checkpoint_every": 1}))
    lines = metrics_of(config)
    assert [line.get("pairs/human", 0) for line in lines] == [0, 0, 0, 2, 0]
    given = [
        row
        for row in pq.read_table(config.run.dir / "examples/iteration-000003.parquet").to_pylist()
        if row["samples"] == [-1, -1]
    ]
    samples = pq.read_table(config.run.dir / "samples/iteration-000002.parquet").to_pylist()
    completions = {(row["prompt_id"], row["text"]): row["token_ids"] for row in samples}
    first = pairs[0]
    second = pairs[1]
    prompts = [pair.pair_id.split("/")[1] for pair in (first, second)]
    assert [m["content"] for m in first.messages] == [str(int(prompts[0][1:]))]
    assert [row["response_ids"] for row in given] == [
        [completions[prompts[0], first.first], completions[prompts[0], first.second]],
        [completions[prompts[1], second.second], completions[prompts[1], second.first]],
    ]
    assert [f for f in audit(config.run.dir, deep=True) if f.problem] == []


@pytest.mark.parametrize(
    "algorithm",
    [{"type": "hypo", "offline": {"path": "x"}}, {"type": "iterative_dpo", "samples": 4}],
)
def test_preference_algorithms_take_labels(tmp_path, algorithm):
    config = make_config(tmp_path, algorithm=algorithm)
    loop = ALGORITHMS.build(config.algorithm)
    label = Example(rows=(given_row("p", (1,), (2, 3)), given_row("p", (1,), (4,))))
    selection = loop.select(
        [], SelectionContext(iteration=1, seed=1, sampling=Sampling(max_tokens=8), labels=(label,))
    )
    assert isinstance(loop, TakesLabels) and selection.metrics["pairs/human"] == 1
    assert [row.response_ids.tolist() for row in selection.examples[0].rows] == [[2, 3], [4]]


def test_label_of_unknown_pair_is_refused(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2})
    run_campaign(config)
    run = config.run.dir
    prompt = uncertain_pairs(run, 1)[0].pair_id.split("/")[1]
    numbers = (f"9/{prompt}/0/1", f"2/{prompt}/0/0", f"2/{prompt}/0/9", f"2/{prompt}/-1/0")
    for pair in ("", "2/p/0/1", *numbers, f"../../etc/{prompt}/0", "²/p/0/1"):
        with pytest.raises(ConfigError, match="no pair"):
            check_label(run, pair, "first")
    with pytest.raises(ConfigError, match="the verdict is 'best'; expected first, second, tie"):
        check_label(run, f"2/{prompt}/0/1", "best")


def test_certainty_of_pairwise_scorers_is_their_own(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "sppo", "samples": 3}, run={"iterations": 1})
    run_campaign(config, scorer=FakeScorer())
    rows = pq.read_table(config.run.dir / "samples/iteration-000001.parquet").to_pylist()
    wins = {(row["prompt_id"], row["text"]): row["wins"] for row in rows}
    for pair in uncertain_pairs(config.run.dir, 10):
        _, prompt, i, j = pair.pair_id.split("/")
        assert pair.certainty == abs(wins[prompt, pair.first][int(j)] - 0.5) and i != j
        others = [
            abs(w - 0.5) for (p, _), row in wins.items() if p == prompt for w in row if w != 0.5
        ]
        assert pair.certainty <= min(others, default=0.5)
    assert json.loads((config.run.dir / "campaign.json").read_text())["iteration"] == 1
