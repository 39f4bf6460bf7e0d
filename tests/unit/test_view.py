"""Pages about runs: what is read, the report's size and safety, the dashboard's doors."""

import base64
import gzip
import html
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import trustme
from starlette.testclient import TestClient
from typer.testing import CliRunner
from view_runs import write_run

from launch.cli import app
from rayhf.errors import CheckpointError, ConfigError
from rayhf.view import evaluations, report
from rayhf.view.dashboard import build_app
from rayhf.view.groups import cycles, read_groups
from rayhf.view.heldout import heldout_answers, heldout_prompts
from rayhf.view.overview import config_differences, run_overview, timeline
from rayhf.view.report import write_report
from rayhf.view.run import Run, find_runs
from rayhf.view.samples import (
    PAGE,
    Query,
    cut,
    list_examples,
    list_prompts,
    list_samples,
    reference_answer,
)

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "vllm", "deepspeed", "transformers", "datasets", "grpc", "wandb", "openai")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def run(path):
    return Run(path, "run")


def data_of(file):
    """The data that a report holds."""
    found = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', file.read_text())
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def found(run, **filters):
    return list_samples(run, replace(Query(), **filters)).rows


@pytest.mark.parametrize("module", ["report", "dashboard"])
def test_pages_need_no_heavy_package(module):
    code = (
        f"import sys, launch.pages, rayhf.view.{module}, uvicorn, tokenizers\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [name for name in HEAVY if f"'{name}'" in result.stdout] == []


# ------------------------------------------------------------------------------------------ lists


def test_newest_samples_come_first_and_pages_join(run):
    first = list_samples(run, Query())
    assert len(first.rows) == PAGE and first.rows[0]["iteration"] == 4
    iteration, row = first.next
    rest = list_samples(run, Query(iteration=iteration, row=row))
    keys = [(r["iteration"], r["prompt_id"], r["sample"]) for r in [*first.rows, *rest.rows]]
    assert len(keys) == len(set(keys)) == first.total and rest.next is None


@pytest.mark.parametrize(
    ("filters", "check"),
    [
        ({"first": 2, "last": 3}, lambda row: row["iteration"] in (2, 3)),
        ({"outcome": "Failed"}, lambda row: row["reason"] == "the judge did not answer"),
        ({"outcome": "none"}, lambda row: row["score"] is None and row["outcome"] is None),
        ({"minimum": 1.0, "maximum": 2.0}, lambda row: 1.0 <= row["score"] <= 2.0),
        ({"truncated": True}, lambda row: row["truncated"]),
        ({"kind": "step"}, lambda row: row["kind"] == "step"),
        ({"replied": True}, lambda row: row["kind"] == "answer" and row["outcome"] == "Scored"),
        ({"source": "words"}, lambda row: row["source"] == "words"),
        ({"text": "NUMBER 3"}, lambda row: "number 3" in row["prompt"]),
        ({"text": "step 2"}, lambda row: "step 2" in row["text"]),
    ],
)
def test_filters_keep_exactly_what_matches(run, filters, check):
    rows = found(run, **filters)
    assert rows and all(check(row) for row in rows)
    cursor = list_samples(run, Query()).next
    everything = [
        *list_samples(run, Query()).rows,
        *list_samples(run, Query(iteration=cursor[0], row=cursor[1])).rows,
    ]
    if "text" not in filters:  # lists cut texts
        matching = [row for row in everything if _safely(check, row)]
        assert len(rows) == min(PAGE, len(matching))


def _safely(check, row):
    try:
        return check(row)
    except TypeError:  # no score
        return False


def test_samples_that_people_labeled(run):
    rows = found(run, labeled=True)
    assert [(row["sample"], row["labeled"]) for row in rows] == [(0, "worse"), (1, "better")]


def test_a_source_that_does_not_exist_has_no_samples(run):
    assert found(run, source="other") == []


def test_prompts_with_trees_and_with_win_rates(run):
    trees = list_prompts(run, Query(has="tree")).rows
    wins = list_prompts(run, Query(has="wins")).rows
    assert {row["prompt_id"][-1] for row in trees} == {"2"}
    assert {row["prompt_id"][-1] for row in wins} == {"1"} and wins[0]["samples"] == 3


def test_pairs_have_their_texts(run):
    pair = list_examples(run, Query()).rows[0]
    group = read_groups(run, pair["iteration"], [pair["prompt_id"]])[0]
    texts = [group["samples"][row["sample"]]["text"] for row in pair["rows"]]
    assert [row["text"] for row in pair["rows"]] == texts
    assert pair["margin"] == 1.0 and pair["origin"] == "rule a:b"


def test_words_of_judges_are_beside_samples_and_pairs(run):
    listed = {(row["prompt_id"], row["sample"]): row for row in found(run, replied=True, first=4)}
    assert listed["prompt-4-3", 1]["replies"][0]["text"].startswith("Seen: ")
    [group] = read_groups(run, 4, ["prompt-4-1"])
    told = [[(r["text"], r["left_out"]) for r in s["replies"]] for s in group["samples"]]
    assert told == [[("0 before 1", False)], [("1 before 2", False)], [("2 before 0", True)]]
    # A pair shows what was said about its two samples only.
    chosen, rejected = group["examples"][0]["rows"]
    assert (chosen["sample"], chosen["replies"]) == (1, [])
    assert [reply["text"] for reply in rejected["replies"]] == ["0 before 1"]
    [judged] = list_samples(run, Query(first=4, text="number 1", replied=True)).rows[:1]
    assert judged["replies"][0]["against"] == 1


def test_a_run_without_words_of_judges_is_shown(tmp_path):
    path = write_run(tmp_path, iterations=1)
    for folder in ("samples", "heldout"):
        for file in (path / folder).glob("*.parquet"):
            pq.write_table(pq.read_table(file).drop_columns("replies"), file)
    old = Run(path, "run")
    assert found(old, replied=True) == [] and len(found(old)) > 0
    assert all(s["replies"] == [] for s in read_groups(old, 1, ["prompt-1-0"])[0]["samples"])
    assert all(row["replies"] is None for row in heldout_answers(old, "heldout-0"))
    assert write_report([path], tmp_path / "report.html").total == 4


def test_reference_answers_are_beside_their_prompts(run):
    rows = [*found(run), *heldout_prompts(run)]
    assert rows and all(row["reference_answer"] == f"about {row['prompt']}" for row in rows)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ('{"answer": 7.0}', "7"),
        ('{"answer": "' + "7" * 500 + '"}', "7" * 400 + " …"),
        ('{"topic": "t"}', ""),
        ('{"answer": [', ""),
        (None, ""),
    ],
)
def test_reference_answer_of_a_row(row, answer):
    assert cut(reference_answer(row)) == answer


def test_held_out_prompt_over_iterations(run):
    prompts = heldout_prompts(run)
    answers = heldout_answers(run, prompts[0]["prompt_id"])
    assert len(prompts) == 6 and answers[0]["replies"][0]["part"] == "judge"
    assert [row["iteration"] for row in answers] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_run_without_samples_has_empty_lists(tmp_path):
    path = write_run(tmp_path, iterations=1, prompts=0)
    empty = Run(path, "run")
    assert list_samples(empty, Query()).rows == list_examples(empty, Query()).rows == []
    assert write_report([path], tmp_path / "report.html").total == 0


# ----------------------------------------------------------------------------------------- groups


def test_group_has_tokens_with_what_training_added(run):
    group = read_groups(run, 4, ["prompt-4-3"])[0]
    tokens = group["samples"][0]["tokens"]
    assert "".join(tokens["text"]) == group["samples"][0]["text"]
    assert tokens["reference"][1] == pytest.approx(tokens["logp"][1] - 0.5)
    assert tokens["advantage"][1] == pytest.approx(tokens["logp"][1] + 1.0)
    assert "advantage" not in group["samples"][2]["tokens"]  # not trained on
    answer = f"about {group['messages'][-1]['content']}"
    assert group["row"] == {"topic": "t", "answer": answer}
    assert group["reference_answer"] == answer


def test_group_without_a_tokenizer_has_texts(path, tmp_path):
    (tmp_path / "run").symlink_to(path)
    other = Run(tmp_path / "run", "run")
    other.tokens._file = tmp_path / "missing.json"
    sample = read_groups(other, 1, ["prompt-1-3"])[0]["samples"][0]
    assert sample["tokens"] is None and sample["text"]


def test_cycles_are_found():
    assert cycles([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]]) == [[0, 1, 2]]
    assert cycles([[0.5, 0.9, 0.9], [0.1, 0.5, 0.8], [0.1, 0.2, 0.5]]) == []


# --------------------------------------------------------------------------------------- overview


def test_overview_has_facts_curves_and_alarms(run):
    view = run_overview(run)
    facts = dict(view["facts"])
    assert view["state"] == "done" and view["advice"].endswith("run/policy")
    assert facts["time"] == "30 s of iterations, without start-ups"
    assert facts["algorithm"] == "online_dpo, loss sigmoid" and "torch 2.13.0" in facts["versions"]
    assert view["curves"]["reference/kl"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [(a["kind"], a["guard"]) for a in view["alarms"]] == [("fault", ""), ("warn", "kl")]
    assert {alarm["iteration"] for alarm in view["alarms"]} == {2}


def test_every_evaluated_figure_has_a_band(run, path):
    bands = run_overview(run)["intervals"]
    assert set(bands) == {
        "eval/toy/sampled",
        "eval/toy/greedy",
        "eval/pairs/pair_accuracy",
        "eval/wins/win_rate_length_controlled",
    }
    for name, rows in bands.items():
        metrics = [line[name] for line in run.metrics()]
        assert [iteration for iteration, *_ in rows] == [0, 1, 2, 3, 4]
        assert all(low < x < high for x, (_, low, high) in zip(metrics, rows, strict=True))
    assert bands["eval/wins/win_rate_length_controlled"][0] == (0, 0.4, 0.6)


def test_bands_of_a_long_run_are_thinned_out(run, monkeypatch):
    monkeypatch.setattr(evaluations, "MAX_BANDS", 3)
    assert [i for i, *_ in evaluations.intervals(run)["eval/toy/sampled"]] == [0, 2, 4]


def test_changes_are_paired(run):
    by_name = {row["metric"]: row for row in run_overview(run)["changes"]}
    kinds = [name.rpartition("/")[2] for name in by_name]
    assert kinds[:2] == ["sampled", "greedy"]  # what is trained for comes first
    sampled = by_name["eval/toy/sampled"]
    assert sampled["meaning"] == "mean score at temperature 1"
    assert by_name["eval/pairs/pair_accuracy"]["meaning"].endswith("ranks (share)")
    assert sampled["prompts"] == 6 and sampled["iterations"] == (0, 4)
    # Every prompt gained the same: no doubt about the difference, though much about the means.
    assert sampled["difference"] == pytest.approx([0.4, 0.4, 0.4])
    assert sampled["before"][2] - sampled["before"][1] > 0.5
    controlled = by_name["eval/wins/win_rate_length_controlled"]
    assert controlled["after"] == pytest.approx([0.9, 0.8, 1.0])
    assert controlled["difference"] is None  # its values by prompt are not known


def test_damaged_values_are_left_out(tmp_path):
    path = write_run(tmp_path, iterations=2)
    (path / "evaluations/iteration-000002.parquet").write_bytes(b"PAR1 and no more")
    (change, *_) = evaluations.changes(Run(path, "run"))
    assert change.iterations == (0, 1)


def test_config_differences_name_the_keys(run, tmp_path):
    other = Run(write_run(tmp_path, iterations=1, learner={"lr": 0.5}), "other")
    keys = {row["key"]: row["values"] for row in config_differences([run, other])}
    assert keys["learner.lr"][1] == "0.5" and keys["run.iterations"] == ["4", "1"]
    assert "run.dir" not in keys and "seed" not in keys


def test_timeline_has_phases_waits_and_checkpoints(run):
    view = timeline(run)
    assert [phase["name"] for phase in view["phases"][:2]] == ["explore", "reference"]
    assert all(phase["start"] <= phase["end"] for phase in view["phases"])
    waits = {row["what"].split(" ")[0]: row["seconds"] for row in view["waits"]}
    assert waits["learner"] == 4.0 and waits["tables,"] == pytest.approx(10.0)
    assert waits["all"] == 30.0
    assert view["checkpoints"][0]["name"] == view["committed"] == "iteration-000004"


def test_a_torn_line_of_metrics_is_left_out(tmp_path):
    path = write_run(tmp_path, iterations=1)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "scorer/rew')
    assert run_overview(Run(path, "run"))["x"] == [0, 1]


# ----------------------------------------------------------------------------------------- report


def test_report_holds_every_prompt_of_a_small_run(path, tmp_path):
    written = write_report([path], tmp_path / "report.html")
    data = data_of(written.file)
    assert (written.shown, written.total) == (
        16,
        16,
    ) and written.size == written.file.stat().st_size
    assert len(data["groups"]) == 16 and data["sampled"]["samples"]["run"] == 60
    assert [run["id"] for run in data["overview"]["runs"]] == ["run"]


def test_larger_run_is_sampled_from_all_iterations_problems_first(path, tmp_path, monkeypatch):
    whole = write_report([path], tmp_path / "whole.html")
    plain = len(json.dumps(data_of(whole.file), ensure_ascii=False))
    monkeypatch.setattr(report, "PLAIN_BYTES", int(0.8 * plain))
    written = write_report([path], tmp_path / "report.html")
    groups = data_of(written.file)["groups"]
    assert (whole.shown, whole.total) == (16, 16)
    assert 4 <= written.shown == len(groups) < written.total == 16
    assert {group["iteration"] for group in groups} == {1, 2, 3, 4}
    assert [g["prompt_id"][-1] for g in groups].count("0") == 4  # the prompt with failed scores
    assert written.size < whole.size


def test_report_fills_its_limit(tmp_path, monkeypatch):
    """Also where the first estimate of a prompt's size is far too large."""
    path = write_run(tmp_path, iterations=3, prompts=40, words=200)
    whole = write_report([path], tmp_path / "whole.html")
    limit = 120_000
    monkeypatch.setattr(report, "DATA_BYTES", limit)
    monkeypatch.setattr(report, "_group_bytes", lambda run, prompts: 100_000)
    written = write_report([path], tmp_path / "report.html")
    size = len(base64.b64decode(re.search(r'id="data">([^<]*)<', written.file.read_text())[1]))
    assert written.shown < whole.total and 0.9 * limit < size < 1.5 * limit
    counts = Counter(group["iteration"] for group in data_of(written.file)["groups"])
    assert max(counts.values()) - min(counts.values()) <= 1


def test_hostile_text_is_only_in_the_data(tmp_path):
    text = "</script><script>alert(1)</script><!-- \u2028"
    path = write_run(tmp_path, iterations=1, texts=[text] * 4)
    file = write_report([path], tmp_path / "report.html").file
    assert "alert(1)" not in file.read_text()
    samples = [s for g in data_of(file)["groups"] for s in g["samples"]]
    assert text in {sample["text"] for sample in samples}


def test_report_allows_no_network_and_no_other_script(path, tmp_path):
    page = write_report([path], tmp_path / "report.html").file.read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    scripts = re.search(r"script-src ([^;]*);", policy)[1]
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy
    assert "unsafe" not in scripts and scripts.count("sha256-") == page.count("<script>")


def test_several_runs_have_different_names(tmp_path):
    paths = [write_run(tmp_path / name, iterations=1) for name in ("a", "b")]
    data = data_of(write_report(paths, tmp_path / "report.html").file)
    assert [run["id"] for run in data["overview"]["runs"]] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="given twice"):
        write_report([paths[0], paths[0]], tmp_path / "report.html")


def test_command_says_where_the_report_is(path):
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.output.startswith(f"report: {path}/report.html (") and result.exit_code == 0
    assert len(result.output.splitlines()) == 1
    (path / "report.html").unlink()


def test_command_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)


# -------------------------------------------------------------------------------------- dashboard

TOKEN = "0123456789abcdef"


@pytest.fixture
def client(path):
    application = build_app(path.parent, token=None, hosts=frozenset({"localhost"}))
    return TestClient(application, base_url="http://localhost:1234")


def test_runs_are_found_below_a_directory(path, tmp_path):
    write_run(tmp_path / "deep" / "er", iterations=1)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / ".hidden").mkdir()
    assert list(find_runs(tmp_path)) == ["deep/er/run"]
    assert list(find_runs(path)) == ["run"]


def test_server_answers_what_the_pages_ask(client):
    assert [run["id"] for run in client.get("/api/runs").json()] == ["run"]
    assert client.get("/api/overview?run=run").json()["runs"][0]["iteration"] == 4
    rows = client.get("/api/samples?run=run&outcome=Invalid&first=3&last=&truncated=").json()[
        "rows"
    ]
    assert {row["iteration"] for row in rows} == {3, 4}
    group = client.get("/api/group?run=run&iteration=4&prompt=prompt-4-1").json()
    assert group["cycles"] == [[0, 1, 2]]
    assert len(client.get("/api/heldout?run=run").json()) == 6
    assert client.get("/api/timeline?run=run").json()["best"] == 4
    assert "text/javascript" in client.get("/static/app.js").headers["content-type"]
    assert "Content-Security-Policy" in client.get("/").headers


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("overview?run=../../etc", "there is no run"),
        ("samples?run=other", "there is no run"),
        ("samples?run=run&first=x", "invalid literal"),
        ("timeline", "missing parameter 'run'"),
        ("group?run=run&iteration=4&prompt=nothing", "has no prompt nothing"),
    ],
)
def test_server_refuses_in_one_line(client, query, said):
    answer = client.get(f"/api/{query}")
    assert answer.status_code == 400 and said in answer.json()["error"]


@pytest.mark.parametrize("name", ["../page.py", "%2e%2e%2fpage.py", "page.py", "nothing.js"])
def test_only_its_own_static_files_are_served(client, name):
    assert client.get(f"/static/{name}").status_code == 404


def test_server_is_read_only_and_knows_its_name(client):
    assert client.post("/api/runs").status_code == 405
    assert client.get("/api/runs", headers={"Host": "evil.example:1234"}).status_code == 421


def test_token_is_a_bearer_token_or_a_password(path):
    client = TestClient(build_app(path.parent, token=TOKEN, hosts=None))
    assert client.get("/").status_code == 401
    assert client.get("/", auth=("anyone", TOKEN)).status_code == 200
    assert client.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    for value in (f"Bearer {TOKEN}x", "Basic !", f"Digest {TOKEN}", "Basic w6Q6w6Q="):
        assert client.get("/api/runs", headers={"Authorization": value}).status_code == 401


def test_damaged_run_is_named_and_the_others_are_shown(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, iterations=1)
    (tmp_path / "a/run/config.yaml").unlink()
    client = TestClient(build_app(tmp_path, token=None, hosts=None))
    first, second = client.get("/api/overview?run=a/run&run=b/run").json()["runs"]
    assert "config.yaml is missing" in first["error"] and second["state"] == "done"
    assert [row.get("state") for row in client.get("/api/runs").json()] == [None, "done"]
    with pytest.raises(CheckpointError, match=r"config\.yaml is missing"):
        write_report([tmp_path / "a/run"], tmp_path / "report.html")


def test_event_that_is_not_valid_unicode_is_served(tmp_path):
    path = write_run(tmp_path, iterations=1)
    with (path / "logs/attempt-0001/events.jsonl").open("a") as file:
        line = {"time": "2026-01-01T00:00:00+00:00", "epoch": 1, "kind": "warn"}
        file.write(json.dumps({**line, "message": "\udcff"}) + "\n")
    client = TestClient(build_app(tmp_path, token=None, hosts=None))
    assert client.get("/api/timeline?run=run").json()["events"][-1]["message"] == "\udcff"
    assert write_report([path], tmp_path / "report.html").shown == 4


def test_reading_changes_no_file(path, client):
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*")}
    for what in ("runs", "overview?run=run", "samples?run=run", "timeline?run=run"):
        assert client.get(f"/api/{what}").status_code == 200
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*")} == before


def test_command_serves_over_tls_with_a_token_until_ctrl_c(path, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "token").write_text(TOKEN)
    for secret in ("key.pem", "token"):
        (tmp_path / secret).chmod(0o600)
    (tmp_path / "service.yaml").write_text(
        "tls: {certificate: cert.pem, key: key.pem}\ntoken_file: token\n"
    )
    command = [sys.executable, "-u", "-m", "launch.main", "dashboard", str(path.parent)]
    command += ["--service", "service.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        url = next(w for w in server.stdout.readline().split() if w.startswith("https://"))
        context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url, context=context)
        asked = urllib.request.Request(f"{url}api/runs")
        asked.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(asked, context=context) as answer:
            assert [run["id"] for run in json.load(answer)] == ["run"]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host: 0.0.0.0", "reachable from other machines"),
        ("token_file: missing", "cannot be read"),
        ("prot: 1", "unknown key prot"),
    ],
)
def test_command_refuses_a_service_that_is_not_safe(path, tmp_path, text, said):
    (tmp_path / "service.yaml").write_text(text)
    arguments = ["dashboard", str(path.parent), "--service", str(tmp_path / "service.yaml")]
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_command_refuses_a_port_in_use(path):
    with socket.create_server(("127.0.0.1", 0)) as used:
        arguments = ["dashboard", str(path.parent), "--port", str(used.getsockname()[1])]
        with pytest.raises(ConfigError, match="cannot listen"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
