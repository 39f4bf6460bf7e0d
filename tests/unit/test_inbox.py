"""The inbox: a row is taken by one iteration, once, also when the iteration is repeated."""

import json
import multiprocessing
import os

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeChat, FakeScorer

from rayhf.algorithms.base import SelectionContext, TakesLabels
from rayhf.config.registry import ALGORITHMS
from rayhf.control.commands import FileControl
from rayhf.control.labels import check_labels, labeled_examples
from rayhf.control.questions import uncertain_pairs
from rayhf.data.prompts import parse_prompt
from rayhf.errors import ConfigError, QuotaError, StorageError
from rayhf.monitoring.audit import audit
from rayhf.run_dir import inbox as inbox_module
from rayhf.run_dir.inbox import Inbox, RowFile, Submissions, Submitted
from rayhf.run_dir.store import RunDir
from rayhf.types import Example, Sampling, given_row


def verdict(pair: str, word: str = "first") -> dict[str, str]:
    return {"pair_id": pair, "verdict": word}


def submit(run, row_type, rows, source="a"):
    return Submissions(run, row_type).submit(rows, source=source)


def stored(run, row_type):
    return RowFile(run, row_type).read()[0]


def test_row_is_taken_by_one_iteration_only(tmp_path):
    submit(tmp_path, "labels", [verdict("1"), verdict("2"), verdict("3")])
    inbox = Inbox(tmp_path)
    assert [row["pair_id"] for row in inbox.take("labels", 4, limit=2)] == ["1", "2"]
    submit(tmp_path, "labels", [verdict("4")], source="b")
    again = Inbox(tmp_path)  # another attempt
    assert [row["pair_id"] for row in again.take("labels", 4)] == ["1", "2"]
    assert [row["pair_id"] for row in again.take("labels", 5)] == ["3", "4"]
    assert again.take("labels", 6) == [] and again.take("prompts", 4) == []
    assert [row["pair_id"] for row in inbox.take("labels", 5)] == ["3", "4"]
    assert stored(tmp_path, "labels")[3]["source"] == "b"


def test_torn_line_costs_no_other_line(tmp_path):
    submit(tmp_path, "prompts", [{"prompt": "one"}])
    with (tmp_path / "inbox" / "prompts.jsonl").open("ab") as file:
        file.write(b'{"id": "x", "prompt": "tor')
    submit(tmp_path, "prompts", [{"prompt": "two"}])
    assert [row["prompt"] for row in stored(tmp_path, "prompts")] == ["one", "two"]


def _many(run, name):
    for number in range(50):
        rows = [verdict(f"{number}/{turn}") for turn in (1, 2)]
        submit(run, "labels", rows, source=name)


def test_concurrent_submissions(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=_many, args=(tmp_path, name))
        for name in "abca"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = stored(tmp_path, "labels")
    assert len(rows) == 300 and len({row["id"] for row in rows}) == 300


def test_submission_that_is_repeated_adds_nothing(tmp_path):
    many = Submissions(tmp_path, "labels")
    assert many.submit([verdict("1"), verdict("1")], source="a") == Submitted(new=1, repeated=1)
    again = submit(tmp_path, "labels", [verdict("1"), verdict("2")])
    assert again == Submitted(new=1, repeated=1)
    assert many.submit([verdict("1", "tie")], source="a") == Submitted(new=1, replaced=1)
    assert many.submit([verdict("1", "tie")], source="b") == Submitted(new=1)
    assert many.last() == {("1", "a"): "tie ", ("2", "a"): "first ", ("1", "b"): "tie "}
    prompts = [{"prompt": "x", "answer": 1}, {"prompt": "x"}]
    assert submit(tmp_path, "prompts", prompts) == Submitted(new=2)
    as_messages = {"messages": [{"role": "user", "content": "x"}], "answer": "1"}
    assert submit(tmp_path, "prompts", [as_messages], source="b") == Submitted(new=0, repeated=1)


def test_full_inbox_refuses_and_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_FILE_BYTES", 1000)
    submit(tmp_path, "prompts", [{"prompt": "x" * 500}])
    with pytest.raises(QuotaError, match="a campaign accepts 0 MiB of prompts in all"):
        submit(tmp_path, "prompts", [{"prompt": "y" * 500}])
    assert len(stored(tmp_path, "prompts")) == 1


ROW = {"id": "i", "source": "s", "prompt": "p"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (json.dumps({**ROW, "id": [1]}), "`id` must be text"),
        (json.dumps({"id": "i", "prompt": "p"}), "`source` must be text"),
        (json.dumps({**ROW, "answer": float("inf")}), "Infinity is not JSON"),
        (json.dumps({**ROW, "answer": float("nan")}), "NaN is not JSON"),
        ('{"id": "i", "source": "s", "prompt": "p", "answer": 1e999}', "is infinite"),
        (json.dumps({**ROW, "prompt": "\ud800"}), "lone surrogate"),
        (json.dumps({"id": "i", "source": "s"}), "expected either `prompt`"),
        ("[" * 200_000, "nested too deep"),
        ('{"id": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("x" * (2 << 20), "longer than"),
        ("[]", "expected an object, got list"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), "stands in an earlier row"),
    ],
)
def test_line_that_is_no_row_is_skipped_and_named(tmp_path, line, problem):
    (tmp_path / "inbox").mkdir()
    good = json.dumps({**ROW, "id": "good"})
    (tmp_path / "inbox/prompts.jsonl").write_text(f"{good}\n{line}\n")
    warnings: list[str] = []
    inbox = Inbox(tmp_path)
    assert inbox.take("prompts", 1, limit=1, warn=warnings.append)[0]["id"] == "good"
    (warning,) = warnings
    row = 3 if "earlier" in problem else 2
    assert warning.startswith(f"skipped: inbox/prompts.jsonl row {row}: ") and problem in warning
    inbox.take("prompts", 2, warn=warnings.append)
    assert len(warnings) == 1


def test_file_that_is_no_file_blocks_nobody(tmp_path):
    (tmp_path / "inbox").mkdir()
    os.mkfifo(tmp_path / "inbox/prompts.jsonl")
    warnings: list[str] = []
    assert Inbox(tmp_path).take("prompts", 1, warn=warnings.append) == []
    with pytest.raises(StorageError):
        submit(tmp_path, "prompts", [{"prompt": "x"}])
    (tmp_path / "secret").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "inbox/labels.jsonl").symlink_to(tmp_path / "secret")
    assert Inbox(tmp_path).take("labels", 1, warn=warnings.append) == []
    with pytest.raises(ConfigError, match="is a symbolic link"):
        submit(tmp_path, "labels", [verdict("1")])
    assert all("cannot be read" in warning for warning in warnings) and len(warnings) == 2


def test_rows_of_a_damaged_record_are_taken_again(tmp_path):
    submit(tmp_path, "prompts", [{"prompt": "x"}])
    (first,) = Inbox(tmp_path).take("prompts", 1)
    submit(tmp_path, "prompts", [{"prompt": "y"}])
    (second,) = Inbox(tmp_path).take("prompts", 2)
    record = tmp_path / "inbox/taken/prompts-000001.json"
    record.with_suffix(".json.swp").write_text("x")  # an editor's
    record.write_text("[{" + record.read_text())
    warnings: list[str] = []
    assert Inbox(tmp_path).take("prompts", 3, warn=warnings.append) == []
    assert Inbox(tmp_path).take("prompts", 1, warn=warnings.append) == [first]
    assert Inbox(tmp_path).take("prompts", 2, warn=warnings.append) == [second]
    assert set(warnings) == {"inbox/taken/prompts-000001.json is damaged"}


def test_prompt_of_a_megabyte_is_refused_before_it_is_tokenized():
    class Untouched(FakeChat):
        def render(self, messages):
            raise AssertionError

    row = {"place": "inbox/prompts.jsonl row 1", "source": "s", "prompt": "x" * (1 << 20)}
    with pytest.raises(ConfigError, match=r"row 1.* 1,048,576 characters, too many for 56 tokens"):
        parse_prompt(row, Untouched(), max_prompt_tokens=56)


def test_submitted_prompts_are_in_the_next_iteration(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2}, rollout={"max_tokens": 8})
    RunDir(config).close()
    long = {"prompt": "x" * 100}
    broken = {"prompt": "y", "messages": "both"}
    submit(config.run.dir, "prompts", [{"prompt": "mine", "answer": 3}, long])
    with (config.run.dir / "inbox/prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "hand", "source": "me", **broken}) + "\n")
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
    control = FileControl(config.run.dir)
    for pair, word in zip(pairs, ("first", "second", "tie"), strict=False):
        control.label([verdict(pair.pair_id, word)], source="ann")
    assert len(control.uncertain_pairs(100)) == 5  # labeled pairs are left out
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
        with pytest.raises(ConfigError, match=r"no pair|`pair_id` must be text"):
            check_labels(run, [verdict(pair)])
    with pytest.raises(ConfigError, match="the verdict is 'best'; expected first, second, tie"):
        check_labels(run, [verdict(f"2/{prompt}/0/1", "best")])


def test_last_verdict_of_an_annotator_counts_and_contradictions_are_named(tmp_path):
    config = make_config(tmp_path, run={"iterations": 2, "checkpoint_every": 1})
    run_campaign(config)
    control = FileControl(config.run.dir)
    pair = control.uncertain_pairs(1)[0].pair_id
    control.label([verdict(pair, "first")], source="ann")
    said = control.label([verdict(pair, "second")], source="ann")
    assert "1 replace an earlier verdict of yours" in said and "contradict" not in said
    said = control.label([verdict(pair, "first")], source="bob")
    assert f"contradict each other on 1 pairs; the first is '{pair}': first and second" in said
    assert "0 labels submitted" in control.label([verdict(pair, "first")], source="bob")
    warnings: list[str] = []
    rows = Inbox(config.run.dir).take("labels", 3)
    examples = labeled_examples(config.run.dir, rows, warn=warnings.append)
    first, second = (example.rows for example in examples)
    one, other = ([row.response_ids.tolist() for row in rows] for rows in (first, second))
    assert one == other[::-1] and one != other and "contradict" in warnings[0]
    for row in rows:
        row["completions"] = "another"
    assert labeled_examples(config.run.dir, rows, warn=warnings.append) == ()
    assert "are not the ones that were judged" in warnings[-1]


def test_label_of_an_iteration_that_is_repeated_waits(tmp_path):
    """A label of iteration 4, whose checkpoint is damaged before the campaign goes on."""
    config = make_config(tmp_path, run={"iterations": 4, "checkpoint_every": 1})
    run_campaign(config)
    run = config.run.dir
    pair = uncertain_pairs(run, 1)[0].pair_id
    assert pair.startswith("4/")
    FileControl(run).label([verdict(pair, "first")], source="ann")
    with (run / "inbox/labels.jsonl").open("a") as file:
        unknown = {"id": "hand", "source": "me", **verdict("1/nobody/0/1")}
        file.write(json.dumps(unknown) + "\n")
    damaged = next(
        file for file in (run / "checkpoints/iteration-000004").rglob("*") if file.is_file()
    )
    damaged.write_bytes(b"x")
    run_campaign(make_config(tmp_path, run={"iterations": 6, "checkpoint_every": 1}))
    by_iteration = {line["iteration"]: line.get("pairs/human", 0) for line in metrics_of(config)}
    assert [by_iteration[number] for number in (4, 5, 6)] == [0, 1, 0]


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
