"""Trackers with the real libraries, in their own processes, offline."""

import asyncio
import importlib
import json
import sqlite3

import pytest
from campaigns import make_config
from fakes import FakeRollout, make_prompts
from test_trackers import Listener

from rayhf.config.load import load_config
from rayhf.errors import ConfigError
from rayhf.monitoring.tracking import check_trackers, tracked
from rayhf.run_dir.store import RunDir
from rayhf.types import GenerateRequest, Group, Sample, Sampling, Scored

METRICS = [
    {"iteration": 0.0, "eval/toy/sampled": 0.25},
    {"iteration": 1.0, "scorer/reward_mean": 0.5, "eval/toy/sampled": 0.75},
]
pytestmark = pytest.mark.timeout(120)


def campaign(tmp_path, tracker):
    config = make_config(tmp_path, trackers=[{**tracker, "samples": 2, "samples_every": 1}])
    store = RunDir(config)
    requests = [
        GenerateRequest(
            prompt_id=prompt.prompt_id,
            number=0,
            token_ids=prompt.token_ids,
            sampling=Sampling(max_tokens=4),
            seeds=(seed,),
        )
        for seed, prompt in enumerate(make_prompts(3))
    ]
    completions = asyncio.run(FakeRollout().generate(requests, version=0))
    groups = [
        Group(prompt=p, samples=(Sample(completion=c, outcome=Scored(value=0.5)),))
        for p, (c,) in zip(make_prompts(3), completions, strict=True)
    ]

    async def write():
        store.write_samples(1, groups)
        await store.tables_written()

    asyncio.run(write())
    store.close()
    return config, [completion.text for (completion,) in completions]


def sent(tmp_path, **tracker):
    """Send two iterations; return the run directory, the texts, and the events."""
    pytest.importorskip(tracker["type"], reason="the tracker's library is not installed")
    config, texts = campaign(tmp_path, tracker)
    listener = Listener()
    with tracked(listener, config, logs=tmp_path) as observer:
        for metrics in METRICS:
            observer.metrics(metrics)
    log = (tmp_path / f"{tracker['type']}.log").read_text()
    assert listener.events == [], log
    return config.run.dir, texts


def test_tensorboard(tmp_path):
    run, texts = sent(tmp_path, type="tensorboard")
    accumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    points = [(e.step, e.value) for e in accumulator.Scalars("eval/toy/sampled")]
    assert points == [(0, 0.25), (1, 0.75)]
    (event,) = accumulator.Tensors("samples/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert texts[0] in table and texts[1] in table and texts[2] not in table


def test_mlflow(tmp_path, monkeypatch):
    run, texts = sent(tmp_path, type="mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = importlib.import_module("mlflow").MlflowClient((run / "mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("rayhf").experiment_id])
    history = client.get_metric_history(found.info.run_id, "eval/toy/sampled")
    assert [(m.step, m.value) for m in history] == [(0, 0.25), (1, 0.75)]
    assert found.info.status == "FINISHED" and found.info.run_name == run.name
    (file,) = (run / "mlflow").rglob("iteration-000001.json")
    assert [row[2] for row in json.loads(file.read_text())["data"]] == texts[:2]


def test_trackio(tmp_path):
    run, texts = sent(tmp_path, type="trackio", project="words")
    (file,) = (run / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    logged = [(step, json.loads(text)) for step, text in rows]
    values = [(s, m["eval/toy/sampled"]) for s, m in logged if "eval/toy/sampled" in m]
    assert values == [(0, 0.25), (1, 0.75)]
    assert any(texts[0] in json.dumps(m.get("samples")) for _, m in logged)


def test_wandb_samples(tmp_path):
    run, texts = sent(tmp_path, type="wandb", mode="offline")
    (file,) = (run / "wandb").rglob("*.table.json")
    assert [row[2] for row in json.loads(file.read_text())["data"]] == texts[:2]


def test_missing_library_names_the_extra(monkeypatch):
    config = load_config(
        {
            "run": {"dir": "r", "iterations": 1},
            "policy": {"model": "m"},
            "prompts": {"train": "t"},
            "algorithm": {"type": "online_dpo"},
            "trackers": ["wandb", "mlflow"],
        }
    )
    monkeypatch.setattr("rayhf.monitoring.tracking.find_spec", lambda name: name == "wandb" or None)
    with pytest.raises(ConfigError, match=r'trackers\[1\]: mlflow .* install "rayhf\[mlflow\]"'):
        check_trackers(config.trackers)
