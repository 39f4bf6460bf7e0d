"""Mixing of sources: shares, epochs, and batches that depend on seed and iteration only."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, FakeRollout

from rayhf.data.mixing import Schedule, iteration_batch
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.run_dir.state import read_state
from rayhf.run_dir.store import RunDir
from rayhf.types import Prompt


def prompts(n: int, source: str = "") -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{source}{i:04d}",
            messages=({"role": "user", "content": str(i)},),
            token_ids=(1, i + 2),
            source=source,
            row={"level": i, "größe": None},
        )
        for i in range(n)
    ]


def mixed(sizes: dict[str, int], weights: dict[str, float]) -> PromptSet:
    together = tuple(p for name, size in sizes.items() for p in prompts(size, name))
    return PromptSet(prompts=together, duplicates=0, label="test", weights=weights)


def batch(items: list[Prompt], size: int, iteration: int, seed: int = 3) -> list[Prompt]:
    return iteration_batch(items, batch=size, iteration=iteration, seed=seed)


def test_every_prompt_once_per_epoch_and_iteration() -> None:
    items = prompts(10)
    batches = [batch(items, 5, iteration) for iteration in range(1, 5)]
    for first in (0, 2):
        assert sorted(p.prompt_id for b in batches[first : first + 2] for p in b) == [
            p.prompt_id for p in items
        ]
    seen = [{p.prompt_id for p in batch(items, 7, iteration)} for iteration in range(1, 40)]
    assert {len(ids) for ids in seen} == {7}
    assert set[str]().union(*seen) == {p.prompt_id for p in items}


def test_batches_depend_on_seed_and_iteration_only() -> None:
    items = prompts(20)
    assert batch(items, 4, 3, seed=1) == batch(items, 4, 3, seed=1)
    assert batch(items, 4, 3, seed=1) != batch(items, 4, 3, seed=2)


def test_one_source_is_dealt_as_before_there_were_several() -> None:
    alone = PromptSet(prompts=tuple(prompts(23)), duplicates=0, label="test")
    for iteration in range(1, 12):
        assert alone.batch(batch=5, iteration=iteration, seed=3) == batch(prompts(23), 5, iteration)


WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}


def test_shares_are_exact_over_time_and_even_in_every_iteration() -> None:
    schedule = Schedule(WEIGHTS, {"a": 50, "b": 50, "c": 50}, batch=8)
    total = Counter[str]()
    for iteration in range(1, 41):
        slots, _ = schedule.of(iteration)
        assert len(slots) == 8
        total.update(slots)
        for name, weight in WEIGHTS.items():
            assert abs(total[name] - weight * 8 * iteration) <= 1
    assert total == {"a": 224, "b": 64, "c": 32}


def test_each_source_has_its_own_epochs() -> None:
    data = mixed({"a": 30, "b": 7, "c": 4}, WEIGHTS)
    dealt = [data.batch(batch=10, iteration=i, seed=5) for i in range(1, 31)]
    for one in dealt:
        assert len({p.prompt_id for p in one}) == 10
        assert Counter(p.source for p in one) == {"a": 7, "b": 2, "c": 1}
    by_source: dict[str, list[str]] = {}
    for prompt in (p for one in dealt for p in one):
        by_source.setdefault(prompt.source, []).append(prompt.prompt_id)
    assert len(set(by_source["c"][:4])) == len(set(by_source["c"][4:8])) == 4
    assert len(set(by_source["b"][:6])) == 6 and len(set(by_source["b"])) == 7
    # Any iteration alone, in another process, is the same.
    again = mixed({"a": 30, "b": 7, "c": 4}, WEIGHTS)
    assert again.batch(batch=10, iteration=17, seed=5) == dealt[16]
    assert again.batch(batch=10, iteration=17, seed=6) != dealt[16]


def test_source_that_is_too_small_for_its_weight_is_refused() -> None:
    data = mixed({"a": 3, "b": 90}, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"^k: a has 3 different .* 10 takes 5 of them; lower"):
        data.check_batches(batch=10, iterations=5, key="k")
    data.check_batches(batch=6, iterations=5, key="k")
    alone = PromptSet(prompts=tuple(prompts(3)), duplicates=0, label="x.jsonl")
    with pytest.raises(ConfigError, match=r"prompts\.batch is 4, but x\.jsonl has only 3"):
        alone.check_batches(batch=4, iterations=1, key="k")


def test_fingerprint_covers_every_source_and_the_weights() -> None:
    sizes = {"a": 3, "b": 4}
    same = mixed(sizes, {"a": 1, "b": 1}).fingerprint
    assert same == mixed(sizes, {"a": 1, "b": 1}).fingerprint
    others = [
        mixed(sizes, {"a": 2, "b": 1}),
        mixed({"a": 3, "b": 5}, {"a": 1, "b": 1}),
        mixed({"b": 4, "a": 3}, {"b": 1, "a": 1}),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 4


def test_first_prompts_are_shared_out_by_weight() -> None:
    data = mixed({"a": 10, "b": 2}, {"a": 1, "b": 1})
    assert Counter(p.source for p in data.first(6)) == {"a": 4, "b": 2}
    assert data.first(None) == data.first(99) == data.prompts
    assert data.summary == "10 prompts of a (50%), 2 prompts of b (50%)"


def test_campaign_of_three_sources_resumes_exactly_and_measures_each(tmp_path) -> None:
    data = mixed({"a": 20, "b": 6, "c": 5}, WEIGHTS)
    heldout = (*prompts(2, "a"), *prompts(2, "b"))

    def config(name: str):
        return make_config(
            tmp_path / name,
            run={"iterations": 6},
            prompts={"train": "t", "batch": 4, "task": "toy"},
        )

    given = {"prompts": data, "heldout": heldout}
    run_campaign(config("whole"), **given)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config("broken"), learner=FakeLearner(fail_at=4), **given)
    rollout = FakeRollout()
    run_campaign(config("broken"), rollout=rollout, **given)
    assert metrics_of(config("broken")) == metrics_of(config("whole"))
    samples = pq.read_table(config("whole").run.dir / "samples/iteration-000001.parquet")
    for sample in samples.to_pylist():
        number = int(sample["prompt_id"][1:])
        assert sample["source"] == sample["prompt_id"][0]
        assert json.loads(sample["row"]) == {"level": number, "größe": None}
    lines = metrics_of(config("whole"))
    shares = [sum(line.get(f"source/{n}/share", 0) for line in lines[1:]) for n in WEIGHTS]
    assert shares == pytest.approx([17 / 4, 5 / 4, 2 / 4])
    assert {"source/a/reward", "source/a/length", "source/a/kept"} <= set(lines[1])
    each = [lines[0][f"eval/toy/{name}/sampled"] for name in ("a", "b")]
    assert sum(each) / 2 == pytest.approx(lines[0]["eval/toy/sampled"])
    assert {f"eval/toy/b/{m}" for m in ("greedy", "length", "truncated")} <= set(lines[0])


def test_commits_of_hub_data_sets_are_recorded(tmp_path) -> None:
    config = make_config(tmp_path)
    for commits in ({"org/data": "0" * 40}, {"org/other@v1": "1" * 40}):
        store = RunDir(config)
        store.record_datasets(commits)
        store.close()
    state = read_state(config.run.dir)
    assert state is not None
    assert state.datasets == {"org/data": "0" * 40, "org/other@v1": "1" * 40}
