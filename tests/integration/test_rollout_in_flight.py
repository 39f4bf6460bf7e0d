"""New weights between two steps of a real vLLM engine, while completions are unfinished."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    LONG,
    Start,
    logprobs_of,
    make_request,
    mean_gap,
    payloads_of,
    perturb,
    snapshot_of,
)
from transformers import Qwen2ForCausalLM

from rayhf.errors import RayhfError, StaleWeightsError, WeightSyncError
from rayhf.rollout.engine import RolloutEngine
from rayhf.rollout.partials import Growth, KnownPartials
from rayhf.types import Completion, GenerateRequest

STEPS = 8
REQUEST = make_request(LONG, seeds=tuple(range(96)), max_tokens=100)
"""A token ends a completion with a probability of about 1/14."""
Completions = tuple[Completion, ...]


def between_steps(
    engine: RolloutEngine,
    request: GenerateRequest,
    function: Callable[[], Any],
    **submitted: Any,
) -> tuple[Future[Any], Future[Any]]:
    """Call a method of the engine when the request has taken STEPS steps.

    Return the futures of the request's completions and of the method's result.
    """
    driver = engine._driver
    original = driver.step
    reached = threading.Event()
    queued = threading.Event()
    left = STEPS

    def step() -> Any:
        nonlocal left
        finished = original()
        left -= 1
        if not left:
            reached.set()
            queued.wait(60)
        return finished

    driver.step = step  # type: ignore[method-assign]
    running = engine.submit([request], version=engine.weight_version, **submitted)
    assert reached.wait(60)
    with ThreadPoolExecutor() as pool:
        called = pool.submit(function)
        while not engine._loop._queue and not called.done():
            time.sleep(0.001)
        queued.set()
    driver.step = original  # type: ignore[method-assign]
    return running, called


def update_in_flight(
    engine: RolloutEngine, model: Qwen2ForCausalLM, version: int
) -> tuple[Qwen2ForCausalLM, Completions]:
    """Return the old model, and completions that get new weights after STEPS tokens."""
    old = copy.deepcopy(model)
    perturb(model, version)
    snapshot = snapshot_of(model, version)
    payloads = payloads_of(snapshot)
    running, updated = between_steps(engine, REQUEST, lambda: engine.update(snapshot, payloads))
    assert updated.result().version == version and updated.result().seconds > 0
    (completions,) = running.result(60)
    return old, completions


def gaps(model: Qwen2ForCausalLM, completion: Completion) -> np.ndarray[Any, Any]:
    """Return |log-prob of the engine - log-prob of the model| of every token."""
    start = len(REQUEST.token_ids)
    logp = logprobs_of(model, (*REQUEST.token_ids, *completion.token_ids.tolist()))[start - 1 :]
    chosen = logp.gather(1, torch.tensor(completion.token_ids.tolist())[:, None])[:, 0]
    return np.abs(chosen.numpy() - completion.logprobs)


def mixed(completions: Completions) -> list[Completion]:
    return [c for c in completions if c.token_versions is not None]


def test_tokens_after_an_update_are_of_the_new_weights_with_their_own_kv(start: Start) -> None:
    engine, model = start(in_flight_updates=True)
    old, completions = update_in_flight(engine, model, 1)
    assert {len(c.token_ids) <= STEPS for c in completions} == {True, False}
    for completion in completions:
        length = len(completion.token_ids)
        assert completion.policy_version == 0
        assert (completion.token_versions is None) == (length <= STEPS)
        if completion.token_versions is None:
            assert gaps(old, completion).mean() < 1e-4
            continue
        assert completion.token_versions.tolist() == [0] * STEPS + [1] * (length - STEPS)
        assert gaps(old, completion)[:STEPS].mean() < 1e-4
        assert gaps(model, completion)[STEPS:].mean() < 1e-4
        assert gaps(old, completion)[STEPS:].max() > 1e-3
    # The prefix cache has no keys and values of the old weights, and older requests may come.
    (again,) = engine.generate([REQUEST], version=0)
    assert {c.policy_version for c in again} == {1} and not mixed(again)
    assert mean_gap(model, REQUEST, again) < 1e-4
    with pytest.raises(StaleWeightsError, match="need weights 2, this engine holds weights 1"):
        engine.generate([REQUEST], version=2)
    _lost_engine_continues(engine, old, model, version=1)
    _failed_update_ends_running_requests(engine, model)


def _lost_engine_continues(
    engine: RolloutEngine, old: Qwen2ForCausalLM, model: Qwen2ForCausalLM, *, version: int
) -> None:
    """What was reported of a call, here as if by an engine with older weights, is continued."""
    known = KnownPartials()
    known.open(7, {})
    running, report = between_steps(engine, REQUEST, engine.report, call=7)
    grown: list[Growth] = report.result()
    known.add(grown)
    (whole,) = running.result(60)
    parts = {
        slot: replace(part, versions=np.zeros_like(part.versions))
        for slot, part in known.close(7).items()
    }
    assert len(parts) == len(REQUEST.seeds)
    (completions,) = engine.submit([REQUEST], version=0, call=7, partials=parts).result(60)
    for (_, index), part in parts.items():
        completion = completions[index]
        count = len(part)
        assert completion.token_ids[:count].tolist() == part.token_ids.tolist()
        assert np.array_equal(completion.logprobs[:count], part.logprobs)
        assert gaps(model, completion).mean() < 1e-4
        if part.finish_reason is None:
            assert completion.token_versions is not None
            rest = len(completion.token_ids) - count
            assert completion.token_versions.tolist() == [0] * count + [version] * rest
        else:
            assert completion == replace(whole[index], policy_version=0)
    assert any(part.finish_reason for part in parts.values())
    stops = replace(REQUEST, sampling=replace(REQUEST.sampling, stop=("abc",)))
    _, report = between_steps(engine, stops, engine.report, call=8)
    assert all(growth.added.finish_reason for growth in report.result())


def _failed_update_ends_running_requests(engine: RolloutEngine, model: Qwen2ForCausalLM) -> None:
    snapshot = snapshot_of(model, 2)
    perturb(model, 2)
    wrong = replace(snapshot_of(model, 2), probe=snapshot.probe)
    payloads = payloads_of(wrong)
    running, updated = between_steps(engine, REQUEST, lambda: engine.update(wrong, payloads))
    with pytest.raises(WeightSyncError, match="nats on average"):
        updated.result()
    with pytest.raises(RayhfError, match="no usable weights: weights 2 do not compute"):
        running.result(60)


def test_kept_kv_is_not_found_by_later_prompts(start: Start) -> None:
    """Kept keys and values make log-probs deviate; those of new prompts do not."""
    engine, model = start(in_flight_updates=True, in_flight_kv="keep")
    old, completions = update_in_flight(engine, model, 1)
    for completion in mixed(completions):
        assert gaps(old, completion)[:STEPS].mean() < 1e-4
    after = [gaps(model, completion)[STEPS:].mean() for completion in mixed(completions)]
    assert np.mean(after) > 1e-3  # else they were computed again
    (again,) = engine.generate([REQUEST], version=1)
    assert mean_gap(model, REQUEST, again) < 1e-4
