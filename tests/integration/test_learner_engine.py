"""Real DeepSpeed on CPU: sharding changes no result, and published weights are the trained ones."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import (
    VOCABULARY,
    Ranks,
    SquaredError,
    WeightedLogp,
    advance,
    make_examples,
    relative,
    start,
    train,
    weights,
)

from rayhf.config.schema import LoraConfig, ReferenceConfig
from rayhf.errors import ConfigError, NumericalError
from rayhf.losses.base import Totals
from rayhf.types import Example, Row, token_array


def without_counts(run: Any) -> list[dict[str, float]]:
    """Return a run's metrics without the tokens that were fed, which depend on the batches."""
    return [{k: v for k, v in step.items() if k != "learner/tokens_fed"} for step in run[0]]


def check_equal(runs: dict[str, Any], expected: Any, tolerance: float = 1e-5) -> None:
    for name, run in runs.items():
        for actual, wanted in zip(without_counts(run), without_counts(expected), strict=True):
            assert actual == pytest.approx(wanted, rel=tolerance, abs=1e-6), name
        assert relative(run, expected) < tolerance, (name, relative(run, expected))


@pytest.mark.parametrize("head", ["policy", "value", "score"])
def test_ranks_packing_micro_batches_and_stages_do_not_matter(
    one: Ranks, two: Ranks, tied_llama: Path, head: str
) -> None:
    padded = {"zero_stage": 0, "packing": "off"}
    expected = one.call(train, tied_llama, 4096, head, padded)[0]
    runs = {
        "one micro-batch": one.call(train, tied_llama, 4096, head, {"zero_stage": 0})[0],
        "many micro-batches": one.call(train, tied_llama, 60, head, {"zero_stage": 0})[0],
        "whole rows": one.call(train, tied_llama, 60, head, {"zero_stage": 0, "packing": "rows"})[
            0
        ],
        "padded": one.call(train, tied_llama, 60, head, padded)[0],
    }
    for stage in (0, 1, 2, 3):
        runs[f"two ranks, stage {stage}"] = two.call(
            train, tied_llama, 100, head, {"zero_stage": stage}
        )[0]
    for stage in (1, 2, 3):
        runs[f"one rank, stage {stage}"] = one.call(
            train, tied_llama, 100, head, {"zero_stage": stage}
        )[0]
    # A value head starts at zero: Adam makes full steps out of the body's first, tiny gradients.
    check_equal(runs, expected, tolerance=4e-5 if head == "value" else 1e-5)
    fed = {name: run[0][0]["learner/tokens_fed"] for name, run in runs.items()}
    assert fed["one micro-batch"] < fed["whole rows"] < fed["padded"]


def test_adapters_on_packed_rows(one: Ranks, two: Ranks, untied: Path) -> None:
    lora = {"lora": LoraConfig(rank=2, alpha=4)}
    expected = one.call(train, untied, 4096, "policy", {"zero_stage": 0, "packing": "off", **lora})[
        0
    ]
    runs = {
        f"two ranks, stage {stage}": two.call(
            train, untied, 100, "policy", {"zero_stage": stage, **lora}
        )[0]
        for stage in (0, 3)
    }
    check_equal(runs, expected)


def train_in_pieces(keywords: dict[str, Any], model: Path, stage: int) -> Any:
    """Train with the head in pieces and, under ZeRO-3, with every parameter sharded."""
    import rayhf.learner.engine
    import rayhf.models.forward

    def sharded(*args: Any, **more: Any) -> Any:
        settings = plain(*args, **more)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    plain = rayhf.learner.engine.deepspeed_config
    limit = rayhf.models.forward.LOGITS_LIMIT
    rayhf.learner.engine.deepspeed_config = sharded
    rayhf.models.forward.LOGITS_LIMIT = 7 * VOCABULARY
    try:
        engine = start(keywords, model, zero_stage=stage)
        before = weights(engine)
        metrics = advance(engine, range(2), 60, WeightedLogp())
        rows = [row for example in make_examples(6) for row in example.rows]
        engine.outputs(rows[: 3 if engine.rank else 9], 0.7)
        return metrics, before, weights(engine)
    finally:
        rayhf.learner.engine.deepspeed_config = plain
        rayhf.models.forward.LOGITS_LIMIT = limit


def test_all_ranks_run_the_head_equally_often(one: Ranks, two: Ranks, tied_llama: Path) -> None:
    """Else ZeRO-3 waits for ever: each call of the head gathers its weights from all ranks."""
    expected = one.call(train_in_pieces, tied_llama, 0)[0]
    check_equal({"two ranks": two.call(train_in_pieces, tied_llama, 3)[0]}, expected)


NOTHING_PERSISTS = {
    "zero_stage": 3,
    "deepspeed": {
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 1000,
        }
    },
}
"""Every parameter is gathered when it is used, as those of a large model are."""


def persistent(keywords: dict[str, Any], model: Path, config: dict[str, Any]) -> int:
    """Return the number of parameters that stay whole; refuse what DeepSpeed does not know."""
    unknown = {"zero_optimization": {"stage3_prefetch_size": 1}}
    with pytest.raises(ConfigError, match=r"zero_optimization.stage3_prefetch_size: DeepSpeed"):
        start(keywords, model, zero_stage=3, deepspeed=unknown)
    engine = start(keywords, model, **config)
    return sum(parameter.ds_persist for parameter in engine.engine.module.parameters())


def test_deepspeed_settings_reach_it_and_change_no_result(
    one: Ranks, two: Ranks, tied_llama: Path
) -> None:
    assert two.call(persistent, tied_llama, NOTHING_PERSISTS) == [0, 0]
    assert min(two.call(persistent, tied_llama, {"zero_stage": 3})) > 0
    expected = one.call(train, tied_llama, 4096, "policy", {"zero_stage": 0})[0]
    gathered = two.call(train, tied_llama, 100, "policy", NOTHING_PERSISTS)[0]
    assert relative(gathered, expected) < 1e-5


def overflowing_ranks(keywords: dict[str, Any], model: Path) -> list[dict[str, float]]:
    """Train on one example with two ranks: the second rank has no work."""
    engine = start(keywords, model, zero_stage=2)
    example = make_examples(1)[0]
    totals = Totals(tokens=sum(len(r.response_ids) for r in example.rows), rows=2, examples=1)
    micros = [[example]] if engine.rank == 0 else [[]]
    return [engine.step(micros, totals, WeightedLogp(), 1.0) for _ in range(2)]


def test_rank_without_work_takes_part(one: Ranks, two: Ranks, tied: Path) -> None:
    first, second = two.call(overflowing_ranks, tied)
    assert first == second
    for actual, wanted in zip(first, one.call(overflowing_ranks, tied)[0], strict=True):
        assert actual == pytest.approx(wanted, rel=1e-5)


def poison(keywords: dict[str, Any], model: Path, stage: int, dtype: str) -> None:
    engine = start(keywords, model, zero_stage=stage, dtype=dtype)
    advance(engine, range(1), 60, WeightedLogp())
    before = weights(engine)
    example = make_examples(1)[0]
    row = example.rows[0].with_tokens(
        advantage=np.full(len(example.rows[0].response_ids), np.nan, np.float32)
    )
    totals = Totals(tokens=10, rows=2, examples=2)
    bad, good = Example(rows=(row,)), Example(rows=(example.rows[1],))
    micros = [[good], [bad] if engine.rank == engine.world - 1 else [good]]
    with pytest.raises(NumericalError, match="optimizer step 1"):
        engine.step(micros, totals, WeightedLogp(), 1.0)
    after = weights(engine)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    finite = advance(engine, range(1, 2), 60, WeightedLogp())
    clean = start(keywords, model, zero_stage=stage, dtype=dtype)
    assert advance(clean, range(2), 60, WeightedLogp())[1] == finite[0]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "float32")],
)
def test_nan_of_one_rank_stops_all_and_changes_nothing(
    two: Ranks, tied: Path, stage: int, dtype: str
) -> None:
    two.call(poison, tied, stage, dtype)


def new_storages(known: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors of this process that can be emptied, except known ones.

    Found by the garbage collector, independently of where DeepSpeed keeps them.
    """
    gc.collect()
    old = {storage._cdata for storage in known}
    found = {}
    for value in gc.get_objects():
        # Not isinstance, which calls what libraries put into __class__.
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            if storage.nbytes() and storage.resizable() and storage._cdata not in old:
                found[storage._cdata] = storage
    return list(found.values())


def sleep(
    keywords: dict[str, Any], model: Path, config: dict[str, Any], lora: LoraConfig | None
) -> float:
    """Train with and without sleeping between steps, with the buckets that a GPU has.

    Returns the largest share of the learner's bytes that stayed on the device.
    """
    from rayhf.learner import engine as module

    original = module.deepspeed_config

    def on_gpu(*args: Any, **more: Any) -> Any:
        settings = original(*args, **more)
        settings["zero_optimization"]["contiguous_gradients"] = True
        return settings

    module.deepspeed_config = on_gpu
    try:
        straight = start(keywords, model, lora=lora, **config)
        losses = advance(straight, range(4), 100, WeightedLogp())
        known = new_storages([])
        paused = start(keywords, model, lora=lora, **config)
    finally:
        module.deepspeed_config = original
    shares = []
    for step in range(4):
        paused.wake()  # already awake
        assert (
            advance(paused, range(step, step + 1), 100, WeightedLogp()) == losses[step : step + 1]
        )
        before = sum(storage.nbytes() for storage in new_storages(known))
        paused.sleep()
        paused.sleep()
        # At stage 0 on CPU the weights are in a mapped file, which cannot be emptied.
        if config["zero_stage"]:
            assert not paused.model.lm_head.weight.untyped_storage().nbytes()
        blocks = [block for _, _, blocks in paused._offloader._offloaded for block in blocks]
        # The sample of a weight sync's meter is in host memory, also on a GPU.
        meter = paused.outgoing._meter
        sampled = [*meter._initial.values(), *meter._sent.values()] if meter else []
        left = new_storages([*known, *(t.untyped_storage() for t in [*blocks, *sampled])])
        shares.append(sum(storage.nbytes() for storage in left) / before)
        paused.wake()
    a = weights(straight)
    b = weights(paused)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    return max(shares)


LORA = LoraConfig(rank=2, alpha=4, dropout=0.3)


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [
        (0, "float32", None),
        (1, "bfloat16", None),
        (2, "bfloat16", None),
        (3, "bfloat16", None),
        (3, "float32", LORA),
    ],
)
def test_learner_that_slept_continues_with_the_same_bits(
    two: Ranks, untied: Path, stage: int, dtype: str, lora: LoraConfig | None
) -> None:
    assert max(two.call(sleep, untied, {"zero_stage": stage, "dtype": dtype}, lora)) < 0.02


def evaluate(keywords: dict[str, Any], model: Path, stage: int) -> None:
    """Evaluate different numbers of rows per rank; gradients do not change a bit of log-probs."""
    engine = start(keywords, model, zero_stage=stage, token_budget=60)
    rows = [row for example in make_examples(4) for row in example.rows][
        : 8 if engine.rank == 0 else 3
    ]
    outputs = engine.outputs(rows, 0.7)
    assert [len(o) for o in outputs] == [len(r.response_ids) for r in rows]
    inputs = engine._inputs(rows[:3])
    engine.engine.train()
    with_gradient = engine.engine(inputs, 0.7)[0].detach()
    assert torch.equal(with_gradient, engine._evaluate(inputs, 0.7).detach())
    np.testing.assert_allclose(
        np.concatenate(outputs[:3]), with_gradient.numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_outputs(two: Ranks, tied: Path, stage: int) -> None:
    two.call(evaluate, tied, stage)


def publish(
    keywords: dict[str, Any],
    model: Path,
    directory: Path,
    config: dict[str, Any],
    lora: LoraConfig | None,
    kind: str,
) -> Any:
    engine = start(keywords, model, lora=lora, **config)
    advance(engine, range(3), 100, WeightedLogp())
    before = weights(engine)
    engine.export(directory)
    buckets, probe = engine.publish("float32", 20_000, whole=True)
    adapters, _ = engine.publish("float32", 20_000)
    assert all(np.array_equal(before[n], v) for n, v in weights(engine).items()), (
        "publishing changed the training weights"
    )
    if engine.rank != 0:
        assert buckets == adapters == []
        return None
    if lora is not None:
        check_adapted(adapters, buckets, model)
        check_adapter_directory(directory, model)
    return check_published(buckets, probe, model, directory, tied=kind == "tied")


def check_adapted(adapters: Any, buckets: Any, model: Path) -> None:
    """Check that adapters merged with the initial directory are bit by bit the whole weights."""
    from rayhf.weights.buckets import unpack_bucket
    from rayhf.weights.lora import merge_with_directory

    whole, factors = (
        dict(pair for b in bs for pair in unpack_bucket(b, b.payload)) for bs in (buckets, adapters)
    )
    assert (
        len(factors) == 2 * 2 * 7
        and sum(b.payload.nbytes for b in adapters) < sum(b.payload.nbytes for b in buckets) / 2
    )
    merged = dict(merge_with_directory(model, whole.keys(), factors, device=torch.device("cpu")))
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def check_adapter_directory(directory: Path, model: Path) -> None:
    """Check that the adapter, loaded with PEFT, computes what the merged model does."""
    import peft
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    initial = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, directory / "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    assert (adapted - initial).abs().max() > 1e-3


def check_published(buckets: Any, probe: Any, model: Path, directory: Path, *, tied: bool) -> float:
    """Return how far a reference with the published weights is from the probe.

    It starts from the *initial* model and takes the buckets; the exported directory must agree with
    it, the initial model must not.
    """
    from rayhf.reference.engine import ReferenceEngine

    assert len(buckets) > 1
    names = [spec.name for bucket in buckets for spec in bucket.tensors]
    assert ("lm_head.weight" in names) == (not tied)
    row = Row(
        prompt_id="probe",
        sample=0,
        prompt_ids=token_array(probe.token_ids[:1]),
        response_ids=token_array(probe.token_ids[1:]),
    )
    reference = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    initial = reference.logprobs([row], 1.0)[0]
    reference.update([(bucket, bucket.payload) for bucket in buckets], 1.0)
    published = reference.logprobs([row], 1.0)[0]
    exported = ReferenceEngine(directory, ReferenceConfig(), dtype="float32").logprobs([row], 1.0)[
        0
    ]
    assert np.abs(initial - probe.logprobs).max() > 1e-2, (
        "training moved nothing: the check below would prove nothing"
    )
    np.testing.assert_array_equal(published, exported)
    assert (directory / "tokenizer_config.json").is_file()
    return float(np.abs(published - probe.logprobs).max())


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(
    ("stage", "lora"), [(2, None), (3, None), (3, LoraConfig(rank=4, alpha=16))]
)
def test_published_weights_are_the_trained_ones(
    two: Ranks,
    tied: Path,
    untied: Path,
    tmp_path: Path,
    stage: int,
    lora: LoraConfig | None,
    kind: str,
) -> None:
    model = tied if kind == "tied" else untied
    gap = two.call(publish, model, tmp_path, {"zero_stage": stage, "lr": 1e-2}, lora, kind)[0]
    assert gap < 2e-5


def bfloat16(keywords: dict[str, Any], model: Path) -> list[float]:
    """Rotary frequencies stay float32; float32 masters keep small updates."""
    losses = []
    for stage in (1, 2, 3):
        engine = start(keywords, model, zero_stage=stage, dtype="bfloat16")
        frequencies = engine.model.model.rotary_emb.inv_freq
        exact = 1.0 / engine.model.config.rope_parameters["rope_theta"] ** (
            torch.arange(0, 8, 2) / 8
        )
        assert frequencies.dtype == torch.float32
        torch.testing.assert_close(frequencies, exact)
        losses.append(advance(engine, range(4), 100, WeightedLogp())[-1]["learner/loss"])
    return losses


def test_bfloat16_trains_like_float32(one: Ranks, tied: Path) -> None:
    exact = one.call(train_four, tied)[0]
    for loss in one.call(bfloat16, tied)[0]:
        assert loss == pytest.approx(exact, abs=0.02)


def train_four(keywords: dict[str, Any], model: Path) -> float:
    return advance(start(keywords, model, zero_stage=0), range(4), 100, WeightedLogp())[-1][
        "learner/loss"
    ]


def test_activation_checkpointing_does_not_change_results(one: Ranks, tied: Path) -> None:
    expected = one.call(train, tied, 4096, "policy", {"zero_stage": 0})[0]
    result = one.call(
        train, tied, 4096, "policy", {"zero_stage": 0, "activation_checkpointing": True}
    )[0]
    assert relative(result, expected) < 1e-6


def value_lora(keywords: dict[str, Any], model: Path) -> tuple[float, float, float]:
    """Train a critic with LoRA: it starts at exactly zero, and its whole head is trained."""
    engine = start(keywords, model, head="value", lora=LoraConfig(rank=2, alpha=4), zero_stage=2)
    rows = [row for example in make_examples(2) for row in example.rows]
    first = max(float(np.abs(values).max()) for values in engine.outputs(rows, 1.0))
    metrics = advance(engine, range(10), 100, SquaredError())
    return first, metrics[0]["learner/loss"], float(np.abs(weights(engine)["score.weight"]).max())


def test_value_head_starts_at_zero_and_learns(one: Ranks, untied: Path) -> None:
    first, _, score = one.call(value_lora, untied)[0]
    assert first == 0.0
    assert score > 0.0
