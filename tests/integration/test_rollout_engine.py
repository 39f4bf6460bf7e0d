"""RolloutEngine over real vLLM on CPU, against transformers on the same weights."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayhf.rollout.env import engine_env

os.environ.update(engine_env("cpu", 1))

from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rayhf.config.schema import RolloutConfig
from rayhf.errors import ActorLostError, ConfigError, RayhfError, StaleWeightsError, WeightSyncError
from rayhf.experience import Completion, GenerateRequest, Probe, Sampling, WeightBucket, WeightSnapshot
from rayhf.rollout.channel import Sender
from rayhf.rollout.engine import RolloutEngine, UpdateReport
from rayhf.rollout.weights import pack_bucket, snapshot_checksum

WORDS = ["<pad>", "<end>", "<turn>", *"abcdefghijklmnopqrstuvwxyz"]
END, TURN = 1, 2
LONG = tuple(3 + i * 7 % 26 for i in range(141))
"""Longer than a KV block of 128 tokens, so that a second request finds it in the prefix cache."""
MAX_LENGTH = 256


def make_model(directory: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=END,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    # As chat models have it: the tokenizer names one end, the generation config a second one.
    model.generation_config = GenerationConfig(eos_token_id=[END, TURN])
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"additional_special_tokens": ["<turn>"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", **special).save_pretrained(
        directory
    )
    return model


def perturb(model: Qwen2ForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logprobs_of(model: Qwen2ForCausalLM, token_ids: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of every next token, shape (len(token_ids) - 1, vocabulary)."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1)


def snapshot_of(model: Qwen2ForCausalLM, version: int, *, buckets: int = 3) -> WeightSnapshot:
    named = list(model.named_parameters())
    size = -(-len(named) // buckets)
    packed = tuple(pack_bucket(named[i : i + size], model.dtype) for i in range(0, len(named), size))
    ids = LONG[:40]
    chosen = logprobs_of(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    probe = Probe(token_ids=ids, logprobs=tuple(chosen.tolist()))
    return WeightSnapshot(version=version, buckets=packed, checksum=snapshot_checksum(packed), probe=probe)


def payloads_of(snapshot: WeightSnapshot) -> list[np.ndarray]:
    """As a transport delivers them: arrays that nobody may write to."""
    payloads = [bucket.payload.copy() for bucket in snapshot.buckets]
    for payload in payloads:
        payload.flags.writeable = False
    return payloads


def ask(
    token_ids: tuple[int, ...] = (5, 6, 7), *, seeds: tuple[int, ...] = (1, 2, 3, 4), number: int = 0, **sampling: object
) -> GenerateRequest:
    settings = Sampling(**({"max_tokens": 24} | sampling))  # type: ignore[arg-type]
    return GenerateRequest(prompt_id="p", number=number, token_ids=token_ids, sampling=settings, seeds=seeds)


def mean_gap(model: Qwen2ForCausalLM, request: GenerateRequest, completions: tuple[Completion, ...]) -> float:
    gaps = []
    for completion in completions:
        logp = logprobs_of(model, request.token_ids + completion.token_ids, request.sampling.temperature)
        logp = logp[len(request.token_ids) - 1 :].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        gaps += (logp - torch.tensor(completion.logprobs)).abs().tolist()
    return float(np.mean(gaps))


Start = Callable[..., tuple[RolloutEngine, Qwen2ForCausalLM]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    engines: list[RolloutEngine] = []

    def build(*, tied: bool = False, dtype: str = "float32") -> tuple[RolloutEngine, Qwen2ForCausalLM]:
        directory = tmp_path_factory.mktemp("model")
        model = make_model(directory, tied=tied, dtype=getattr(torch, dtype))
        config = RolloutConfig(max_num_seqs=192, kv_cache_gib=0.05, mismatch_limit=0.2)
        engine = RolloutEngine(directory, config, dtype=dtype, max_length=MAX_LENGTH, seed=0, device="cpu")  # type: ignore[arg-type]
        engines.append(engine)
        return engine, model

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def shared(start: Start) -> tuple[RolloutEngine, Qwen2ForCausalLM]:
    """An engine that keeps version 0 throughout."""
    return start()


@pytest.fixture
def engine(shared: tuple[RolloutEngine, Qwen2ForCausalLM]) -> RolloutEngine:
    return shared[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logprobs_are_the_learners_before_and_after_updates(start: Start, tied: bool) -> None:
    engine, model = start(tied=tied)
    short, long = ask(), ask(LONG)
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
            for request, completions in zip((short, long), engine.generate([short, long], version=version), strict=True):
                assert {completion.policy_version for completion in completions} == {version}
                assert mean_gap(model, request, completions) <= 1e-4
    assert engine.check(snapshot.probe).mean < 1e-4


def test_bfloat16_engine_takes_weights(start: Start) -> None:
    engine, model = start(tied=True, dtype="bfloat16")
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    assert engine.update(snapshot, payloads_of(snapshot)).gap.mean < 0.1
    (completions,) = engine.generate([ask(LONG)], version=1)
    assert mean_gap(model, ask(LONG), completions) < 0.1


def test_logprobs_follow_temperature(shared: tuple[RolloutEngine, Qwen2ForCausalLM]) -> None:
    engine, model = shared
    request = ask(temperature=0.6, seeds=tuple(range(8)))
    (completions,) = engine.generate([request], version=0)
    assert mean_gap(model, request, completions) <= 1e-4
    assert mean_gap(model, replace(request, sampling=Sampling(max_tokens=24)), completions) > 0.1


@pytest.mark.parametrize("limits", [{"top_k": 5}, {"top_p": 0.5}])
def test_logprobs_are_renormalised_over_what_may_be_sampled(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM], limits: dict[str, Any]
) -> None:
    engine, model = shared
    request = ask(seeds=tuple(range(8)), **limits)
    (completions,) = engine.generate([request], version=0)
    for completion in completions:
        rows = logprobs_of(model, request.token_ids + completion.token_ids)[len(request.token_ids) - 1 :]
        for row, token, logprob in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            ordered, tokens = row.exp().sort(descending=True)
            # Top-p keeps the smallest set whose probability reaches it.
            kept = tokens[: limits.get("top_k") or int((ordered.cumsum(0) < limits["top_p"]).sum()) + 1]
            assert token in kept
            assert logprob == pytest.approx(float(row[token] - row[kept].logsumexp(0)), abs=1e-3)


def test_greedy_takes_the_best_token(shared: tuple[RolloutEngine, Qwen2ForCausalLM]) -> None:
    engine, model = shared
    ((completion,),) = engine.generate([ask(seeds=(1,), temperature=0.0)], version=0)
    best = logprobs_of(model, (5, 6, 7, *completion.token_ids))[2:].argmax(-1)
    assert tuple(best.tolist()) == completion.token_ids


def test_finish_reason_comes_from_the_engine(engine: RolloutEngine) -> None:
    (completions,) = engine.generate([ask(seeds=tuple(range(64)))], version=0)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    ends = set()
    for completion in completions:
        if completion.finish_reason == "stop":
            ends.add(completion.token_ids[-1])
            assert not {END, TURN} & set(completion.token_ids[:-1])
        else:
            assert len(completion.token_ids) == 24
            assert not {END, TURN} & set(completion.token_ids)
        assert completion.text == "".join(WORDS[token] for token in completion.token_ids if token > TURN)
        assert len(completion.logprobs) == len(completion.token_ids)
    assert ends == {END, TURN}


def test_stop_string_is_part_of_the_completion(engine: RolloutEngine) -> None:
    (completions,) = engine.generate([ask(seeds=tuple(range(32)), stop=("q", "zz"))], version=0)
    stopped = [completion for completion in completions if "q" in completion.text]
    assert stopped
    for completion in stopped:
        assert completion.finish_reason == "stop"
        assert completion.text.index("q") == len(completion.text) - 1
        assert WORDS[completion.token_ids[-1]] == "q"
        assert len(completion.logprobs) == len(completion.token_ids)


def test_equal_waves_are_equal_and_neighbours_do_not_matter(engine: RolloutEngine) -> None:
    wave = [ask((5 + i, 6, 7), number=i, seeds=(i, 100 + i)) for i in range(12)]
    first = engine.generate(wave, version=0)
    assert engine.generate(wave, version=0) == first
    crowd = [ask((9, 9, 9 + i), seeds=(i, 50 + i)) for i in range(10)]
    crowded = engine.generate([*crowd, *wave], version=0)[len(crowd) :]
    for alone, among in zip(first, crowded, strict=True):
        for a, b in zip(alone, among, strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({completion.token_ids for row in first for completion in row}) > 20


def test_a_wave_may_exceed_one_prefill_step(engine: RolloutEngine) -> None:
    """vLLM 0.32 on CPU dies when a seeded request's prompt is prefilled in parts."""
    wave = [ask((3 + i % 26, 4 + i // 26, *LONG), number=i, seeds=(i,), max_tokens=2) for i in range(130)]
    assert sum(len(request.token_ids) for request in wave) > 16384
    assert len(engine.generate(wave, version=0)) == 130


def test_waves_run_side_by_side(engine: RolloutEngine) -> None:
    steps = engine.stats().steps
    order: list[str] = []
    long = engine.submit([ask(seeds=tuple(range(40)), max_tokens=200)], version=0)
    long.add_done_callback(lambda _: order.append("long"))
    short = [engine.submit([ask(seeds=(i,), max_tokens=4)], version=0) for i in range(5)]
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
        results[i] = engine.generate([ask((5 + i, 6), seeds=(i,))], version=0)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {i: row[0][0].seed for i, row in results.items()} == {i: i for i in range(8)}


def test_stale_version_is_refused(engine: RolloutEngine) -> None:
    with pytest.raises(StaleWeightsError, match="weights 3, this engine holds weights 0"):
        engine.generate([ask()], version=3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(LONG, max_tokens=200), "141 tokens and max_tokens 200 do not fit policy.max_length 256"),
        (ask(()), "0 tokens"),
        (ask((5, 999)), "token 999 is not in 0..28"),
        (ask(temperature=0.001), "temperature 0.001"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(engine: RolloutEngine, request_: GenerateRequest, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit([request_], version=0)


def test_abort_leaves_the_engine_usable(engine: RolloutEngine) -> None:
    running = engine.submit([ask(seeds=tuple(range(64)), max_tokens=250)], version=0)
    engine.abort("the user stopped the run")
    with pytest.raises(RayhfError, match="the user stopped the run"):
        running.result(timeout=60)
    assert len(engine.generate([ask()], version=0)[0]) == 4


def test_an_update_waits_for_running_waves(start: Start) -> None:
    engine, model = start()
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    running = engine.submit([ask(seeds=tuple(range(8)), max_tokens=100)], version=0)
    engine.update(snapshot, payloads_of(snapshot))
    assert running.done()
    assert {completion.policy_version for completion in running.result()[0]} == {0}
    with pytest.raises(StaleWeightsError, match="weights 0, this engine holds weights 1"):
        engine.generate([ask()], version=0)


def corrupted(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    payloads = [bucket.payload.copy() for bucket in snapshot.buckets]
    payloads[1][100] ^= 1
    return snapshot, payloads


def rebuilt(buckets: tuple[WeightBucket, ...], snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    changed = replace(snapshot, buckets=buckets, checksum=snapshot_checksum(buckets))
    return changed, payloads_of(changed)


def without_one(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    first, *others = snapshot.buckets
    return rebuilt((replace(first, tensors=first.tensors[1:]), *others), snapshot)


def with_one_more(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    return rebuilt((*snapshot.buckets, pack_bucket([("value_head.weight", torch.ones(3))], torch.float32)), snapshot)


def reordered(snapshot: WeightSnapshot) -> tuple[WeightSnapshot, list[np.ndarray]]:
    return replace(snapshot, buckets=snapshot.buckets[::-1]), payloads_of(snapshot)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupted, r"weight bucket .*: received checksum \w+, the learner sent \w+"),
        (without_one, ".* missing model.embed_tokens.weight; unexpected none"),
        (with_one_more, ".* missing none; unexpected value_head.weight"),
        (reordered, r"the buckets have checksum \w+, the snapshot says"),
    ],
)
def test_bad_snapshots_are_refused_before_the_engine_is_touched(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM],
    damage: Callable[[WeightSnapshot], tuple[WeightSnapshot, list[np.ndarray]]],
    message: str,
) -> None:
    engine, model = shared
    before = engine.generate([ask()], version=0)
    with pytest.raises(WeightSyncError, match="weights 7 refused, weights 0 stay in place: " + message):
        engine.update(*damage(snapshot_of(model, 7)))
    assert engine.weight_version == 0
    assert engine.generate([ask()], version=0) == before


def test_weights_that_are_not_the_learners_make_the_engine_unusable(start: Start) -> None:
    engine, model = start()
    snapshot = snapshot_of(model, 1)
    perturb(model, 1)
    sabotaged = replace(snapshot_of(model, 1), probe=snapshot.probe)
    with pytest.raises(WeightSyncError, match=r"differ by [\d.]+ nats on average \(limit 0.001\)"):
        engine.update(sabotaged, payloads_of(sabotaged))
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([ask()], version=1)
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.update(snapshot, payloads_of(snapshot))


def test_the_worker_itself_notices_an_incomplete_update(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = start()
    monkeypatch.setattr("rayhf.rollout.engine.check_complete", lambda *_: None)
    with pytest.raises(WeightSyncError, match=r"failed: WeightSyncError: .* 1 parameters, model.embed_tokens.weight"):
        engine.update(*without_one(snapshot_of(model, 1)))
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([ask()], version=0)


def announced(snapshot: WeightSnapshot) -> WeightSnapshot:
    buckets = tuple(replace(bucket, payload=None, checksum="") for bucket in snapshot.buckets)
    return replace(snapshot, buckets=buckets, checksum="", transport="broadcast")


def broadcast(
    engine: RolloutEngine, model: Qwen2ForCausalLM, *, version: int = 1, sender: type[Sender] = Sender, buckets: int = 3
) -> tuple[str, Future[UpdateReport]]:
    """Join, announce three buckets, send so many: their checksum, and what the engine says."""
    one = sender("127.0.0.1", members=2, timeout_s=20.0, device=torch.device("cpu"))
    snapshot, parameters = snapshot_of(model, version), dict(model.named_parameters())
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(engine.join_broadcast, one.meeting, 1)
        one.join()
        joined.result(20)
        report = pool.submit(engine.update, announced(snapshot))
        for bucket in snapshot.buckets[:buckets]:
            one.send(version, bucket.tensors, (parameters[spec.name] for spec in bucket.tensors))
        checksum = snapshot_checksum(one.finish())
        one.close()
    return checksum, report


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_by_broadcast_are_the_learners(start: Start, tied: bool) -> None:
    engine, model = start(tied=tied)
    for version in (1, 2):
        perturb(model, version)
        checksum, report = broadcast(engine, model, version=version)
        assert report.result().version == version and report.result().checksum == checksum
        assert report.result().gap.mean < 1e-4 and engine.fingerprint() == (version, checksum)
        (completions,) = engine.generate([ask(LONG)], version=version)
        assert mean_gap(model, ask(LONG), completions) <= 1e-4


class Damaging(Sender):
    def _launch(self, flat: torch.Tensor) -> Any:
        flat[100] ^= len(self._sealed) == 2
        return super()._launch(flat)


def test_a_damaged_broadcast_makes_the_engine_unusable(start: Start) -> None:
    engine, model = start()
    _, report = broadcast(engine, model, sender=Damaging)
    with pytest.raises(WeightSyncError, match=r"failed: WeightSyncError: weight bucket 2 of 3 of weights 1: received checksum"):
        report.result()
    with pytest.raises(WeightSyncError, match="holds no usable weights"):
        engine.generate([ask()], version=0)


def test_a_broadcast_that_breaks_off_is_nobodys_bad_weights(start: Start) -> None:
    engine, model = start()
    _, report = broadcast(engine, model, buckets=2)
    with pytest.raises(ActorLostError, match="weights by broadcast, receiving: "):
        report.result()
    with pytest.raises(WeightSyncError, match="the update from weights 0 to 1 did not finish"):
        engine.generate([ask()], version=0)


def test_closed_engine_says_so(start: Start) -> None:
    engine, _ = start()
    running = engine.submit([ask(seeds=tuple(range(64)), max_tokens=250)], version=0)
    engine.close()
    with pytest.raises(RayhfError, match="closed"):
        running.result(timeout=10)
    with pytest.raises(RayhfError, match="closed"):
        engine.generate([ask()], version=0)
    engine.close()


def test_an_engine_that_slept_writes_what_it_wrote(start: Start) -> None:
    """vLLM's CPU worker keeps its memory, but the scheduler, the tags and the order of calls are the real ones."""
    engine, model = start()
    before = engine.generate([ask()], version=0)
    engine.sleep(keep_weights=True)
    engine.sleep(keep_weights=True)
    with pytest.raises(WeightSyncError, match="asleep; wake it first"):
        engine.generate([ask()], version=0)
    engine.wake()
    engine.wake()
    assert engine.generate([ask()], version=0) == before
    engine.sleep(keep_weights=False)
    with pytest.raises(WeightSyncError, match="gave its weights up"):
        engine.wake()
    perturb(model, 1)
    snapshot = snapshot_of(model, 1)
    damaged = replace(snapshot, checksum="no")
    with pytest.raises(WeightSyncError, match="the snapshot says no"):
        engine.update(damaged, payloads_of(damaged))
    assert engine.update(snapshot, payloads_of(snapshot)).gap.mean < 1e-4  # the probe ran: it is awake
    (completions,) = engine.generate([ask()], version=1)
    assert mean_gap(model, ask(), completions) <= 1e-4
