"""RolloutEngine over real vLLM on CPU, against transformers on the same weights."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from engines import (
    END,
    LONG,
    TURN,
    WORDS,
    Start,
    logprobs_of,
    make_request,
    mean_gap,
    payloads_of,
    perturb,
    snapshot_of,
)
from transformers import Qwen2ForCausalLM

from rayhf.errors import ConfigError, RayhfError, StaleWeightsError, WeightSyncError
from rayhf.rollout.engine import RolloutEngine
from rayhf.types import Completion, GenerateRequest, Sampling


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logprobs_are_the_learners_before_and_after_updates(start: Start, tied: bool) -> None:
    engine, model = start(tied=tied)
    short = make_request()
    long = make_request(LONG)
    for version in range(4):
        if version:
            perturb(model, version)
            snapshot = snapshot_of(model, version)
            report = engine.update(snapshot, payloads_of(snapshot))
            assert (report.version, report.checksum) == (version, snapshot.checksum)
            assert report.gap.mean < 1e-4
            assert engine.fingerprint() == (version, snapshot.checksum)
        # The second pass finds the long prompt in the prefix cache.
        for _ in range(2):
            for request, completions in zip(
                (short, long), engine.generate([short, long], version=version), strict=True
            ):
                assert {completion.policy_version for completion in completions} == {version}
                assert mean_gap(model, request, completions) <= 1e-4
    assert engine.check(snapshot.probe).mean < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_16_bit_engine_takes_weights(start: Start, dtype: str, limit: float) -> None:
    engine, model = start(tied=True, dtype=dtype)
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    assert engine.update(snapshot, payloads_of(snapshot)).gap.mean < limit
    (completions,) = engine.generate([make_request(LONG)], version=1)
    assert mean_gap(model, make_request(LONG), completions) < limit


@pytest.fixture(scope="module")
def scaled(start: Start) -> tuple[RolloutEngine, Qwen2ForCausalLM]:
    return start(tied=True, scaled_logprobs=True, isolates_waves=True)


def test_isolated_wave_does_not_depend_on_earlier_ones(
    scaled: tuple[RolloutEngine, Qwen2ForCausalLM],
) -> None:
    engine, _ = scaled
    wave = [make_request(LONG, seeds=tuple(range(8)))]
    first = engine.generate(wave, version=0)
    # Were its keys and values of the first prefill found here, the last bits would differ.
    for _ in range(2):
        for one, other in zip(first[0], engine.generate(wave, version=0)[0], strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_scaled_logprobs_follow_temperature(
    scaled: tuple[RolloutEngine, Qwen2ForCausalLM],
) -> None:
    engine, model = scaled
    request = make_request(temperature=0.6, seeds=tuple(range(8)))
    (completions,) = engine.generate([request], version=0)
    assert mean_gap(model, request, completions) <= 1e-4
    assert mean_gap(model, replace(request, sampling=Sampling(max_tokens=24)), completions) > 0.1


@pytest.mark.parametrize(
    "limits", [{"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.6, "top_p": 0.9}]
)
def test_logprobs_are_of_the_whole_vocabulary(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM], limits: dict[str, Any]
) -> None:
    engine, model = shared
    request = make_request(seeds=tuple(range(8)), **limits)
    (completions,) = engine.generate([request], version=0)
    temperature = limits.get("temperature", 1.0)
    for completion in completions:
        rows = logprobs_of(model, (*request.token_ids, *completion.token_ids))[
            len(request.token_ids) - 1 :
        ]
        for row, token, logprob in zip(
            rows, completion.token_ids, completion.logprobs, strict=True
        ):
            ordered, tokens = (row / temperature).softmax(0).sort(descending=True)
            # Top-p keeps the smallest set whose probability reaches it.
            kept = tokens[
                : limits.get("top_k") or int((ordered.cumsum(0) < limits["top_p"]).sum()) + 1
            ]
            assert token in kept
            assert logprob == pytest.approx(float(row[token]), abs=1e-3)


def test_greedy_takes_the_best_token(shared: tuple[RolloutEngine, Qwen2ForCausalLM]) -> None:
    engine, model = shared
    ((completion,),) = engine.generate([make_request(seeds=(1,), temperature=0.0)], version=0)
    best = logprobs_of(model, (5, 6, 7, *completion.token_ids))[2:].argmax(-1)
    assert best.tolist() == completion.token_ids.tolist()


def test_finish_reason_comes_from_the_engine(engine: RolloutEngine) -> None:
    (completions,) = engine.generate([make_request(seeds=tuple(range(64)))], version=0)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    ends = set()
    for completion in completions:
        if completion.finish_reason == "stop":
            ends.add(completion.token_ids[-1])
            assert not {END, TURN} & set(completion.token_ids[:-1])
        else:
            assert len(completion.token_ids) == 24
            assert not {END, TURN} & set(completion.token_ids)
        assert completion.text == "".join(
            WORDS[token] for token in completion.token_ids if token > TURN
        )
        assert len(completion.logprobs) == len(completion.token_ids)
    assert ends == {END, TURN}


def test_stop_string_is_part_of_the_completion(engine: RolloutEngine) -> None:
    (completions,) = engine.generate(
        [make_request(seeds=tuple(range(32)), stop=("q", "zz"))], version=0
    )
    stopped = [completion for completion in completions if "q" in completion.text]
    assert stopped
    for completion in stopped:
        assert completion.finish_reason == "stop"
        assert completion.text.index("q") == len(completion.text) - 1
        assert WORDS[completion.token_ids[-1]] == "q"
        assert len(completion.logprobs) == len(completion.token_ids)


def test_equal_waves_are_equal_and_other_waves_do_not_matter(engine: RolloutEngine) -> None:
    wave = [make_request((5 + i, 6, 7), number=i, seeds=(i, 100 + i)) for i in range(12)]
    first = engine.generate(wave, version=0)
    assert engine.generate(wave, version=0) == first
    crowd = [make_request((9, 9, 9 + i), seeds=(i, 50 + i)) for i in range(10)]
    crowded = engine.generate([*crowd, *wave], version=0)[len(crowd) :]
    for alone, among in zip(first, crowded, strict=True):
        for a, b in zip(alone, among, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({completion.token_ids.tobytes() for row in first for completion in row}) > 20


def test_wave_may_exceed_one_prefill_step(engine: RolloutEngine) -> None:
    """On CPU vLLM 0.32 crashes when a seeded request's prompt is prefilled in parts."""
    wave = [
        make_request((3 + i % 26, 4 + i // 26, *LONG), number=i, seeds=(i,), max_tokens=2)
        for i in range(130)
    ]
    assert sum(len(request.token_ids) for request in wave) > 16384
    assert len(engine.generate(wave, version=0)) == 130


def test_waves_run_side_by_side(engine: RolloutEngine) -> None:
    steps = engine.stats().steps
    order: list[str] = []
    long = engine.submit([make_request(seeds=tuple(range(40)), max_tokens=200)], version=0)
    long.add_done_callback(lambda _: order.append("long"))
    short = [engine.submit([make_request(seeds=(i,), max_tokens=4)], version=0) for i in range(5)]
    for future in short:
        future.add_done_callback(lambda _: order.append("short"))
    results = [future.result(timeout=60) for future in (long, *short)]
    assert [len(result[0]) for result in results] == [40, 1, 1, 1, 1, 1]
    assert order == ["short"] * 5 + ["long"]
    stats = engine.stats()
    assert stats.steps - steps < 215
    assert stats.in_flight == 0
    assert stats.busy_s > 0
    assert stats.peak_rss_bytes > 2**28


def test_callers_on_many_threads(engine: RolloutEngine) -> None:
    results: dict[int, list[tuple[Completion, ...]]] = {}

    def call(i: int) -> None:
        results[i] = engine.generate([make_request((5 + i, 6), seeds=(i,))], version=0)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {i: row[0][0].seed for i, row in results.items()} == {i: i for i in range(8)}


def test_stale_version_is_refused(engine: RolloutEngine) -> None:
    with pytest.raises(StaleWeightsError, match="weights 3, this engine holds weights 0"):
        engine.generate([make_request()], version=3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            make_request(LONG, max_tokens=200),
            "141 tokens and max_tokens 200 do not fit policy.max_length 256",
        ),
        (make_request(()), "0 tokens"),
        (make_request((5, 999)), "token 999 is not in 0..28"),
        (make_request(temperature=0.001), "temperature 0.001"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    engine: RolloutEngine, request_: GenerateRequest, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit([request_], version=0)


def test_abort_leaves_the_engine_usable(engine: RolloutEngine) -> None:
    running = engine.submit([make_request(seeds=tuple(range(64)), max_tokens=250)], version=0)
    engine.abort("the user stopped the run")
    with pytest.raises(RayhfError, match="the user stopped the run"):
        running.result(timeout=60)
    assert len(engine.generate([make_request()], version=0)[0]) == 4


def test_closed_engine_is_reported(start: Start) -> None:
    engine, _ = start()
    running = engine.submit([make_request(seeds=tuple(range(64)), max_tokens=250)], version=0)
    engine.close()
    with pytest.raises(RayhfError, match="closed"):
        running.result(timeout=10)
    with pytest.raises(RayhfError, match="closed"):
        engine.generate([make_request()], version=0)
    engine.close()


def test_engine_that_slept_generates_the_same(start: Start) -> None:
    """The CPU worker keeps its memory; scheduler, tags and order of calls are the real ones."""
    engine, model = start()
    before = engine.generate([make_request()], version=0)
    engine.sleep(keep_weights=True)
    engine.sleep(keep_weights=True)
    with pytest.raises(WeightSyncError, match="asleep; wake it first"):
        engine.generate([make_request()], version=0)
    engine.wake()
    engine.wake()
    assert engine.generate([make_request()], version=0) == before
    engine.sleep(keep_weights=False)
    with pytest.raises(WeightSyncError, match="discarded its weights"):
        engine.wake()
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    damaged = replace(snapshot, checksum="no")
    with pytest.raises(WeightSyncError, match="the snapshot says no"):
        engine.update(damaged, payloads_of(damaged))
    report = engine.update(snapshot, payloads_of(snapshot))
    assert report.gap.mean < 1e-4  # the probe ran: it is awake
    (completions,) = engine.generate([make_request()], version=1)
    assert mean_gap(model, make_request(), completions) <= 1e-4
