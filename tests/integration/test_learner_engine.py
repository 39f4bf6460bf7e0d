"""Real DeepSpeed on CPU: sharding does not change the result, resume is exact and fits any number of ranks, what is published
is what was trained.

Ranks are processes that live for the whole file and are handed functions: importing DeepSpeed is most of their time.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from rayhf.config.schema import LearnerConfig, LoraConfig, ReferenceConfig
from rayhf.errors import CheckpointError, NumericalError
from rayhf.experience import Example, Row
from rayhf.learner.forward import scored_row
from rayhf.learner.packing import plan
from rayhf.losses.base import LossOutput, MicroBatch, Totals
from rayhf.losses.reward import BradleyTerryLoss

VOCABULARY = 97
LR = 1e-3


@dataclass(frozen=True)
class WeightedLogp:
    """-sum(advantage * log p) / tokens, minus a little entropy."""

    entropy: Literal["off", "metric", "loss"] = "loss"

    def __call__(self, output_T: torch.Tensor, micro: MicroBatch) -> LossOutput:
        loss = -(output_T * micro.tokens["advantage"]).sum() / micro.totals.tokens
        if micro.entropy_T is not None:
            loss = loss - 0.01 * micro.entropy_T.sum() / micro.totals.tokens
        return LossOutput(
            loss=loss,
            metrics={"test/rows": micro.length_R.new_tensor(len(micro.length_R)), "test/logp_max": output_T.detach().max()},
        )


@dataclass(frozen=True)
class SquaredError:
    entropy: Literal["off", "metric", "loss"] = "off"

    def __call__(self, output_T: torch.Tensor, micro: MicroBatch) -> LossOutput:
        return LossOutput(loss=(output_T - micro.tokens["advantage"]).square().sum() / micro.totals.tokens, metrics={})


def make_model(directory: Path, *, tied: bool, kind: Literal["qwen2", "llama"] = "qwen2") -> Path:
    import transformers

    torch.manual_seed(0)
    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[kind]
    config = getattr(transformers, names[0])(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        attention_dropout=0.1,
    )
    getattr(transformers, names[1])(config).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def make_examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def row(number: int) -> Row:
        prompt, response = rng.integers(1, 9), rng.integers(1, 17)
        return Row(
            prompt_id=f"p{number}",
            sample=0,
            prompt_ids=tuple(rng.integers(0, VOCABULARY, prompt).tolist()),
            response_ids=tuple(rng.integers(0, VOCABULARY, response).tolist()),
            tokens={"advantage": rng.normal(size=response).astype(np.float32)},
        )

    return [Example(rows=(row(2 * i), row(2 * i + 1))) for i in range(count)]


# ------------------------------------------------------------------------- ranks


class Ranks:
    """`world` processes; `call` runs one function on all of them and returns their results by rank."""

    def __init__(self, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.master = ("127.0.0.1", probe.getsockname()[1])
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, world, self.master), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for pipe in self.pipes:
            assert pipe.poll(120), f"{function.__name__} did not return"
            results.append(pipe.recv())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def serve(pipe: Any, rank: int, world: int, master: tuple[str, int]) -> None:
    torch.set_num_threads(1)
    keywords = {"rank": rank, "world": world, "master": master}
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send(function(keywords, *args))
        except Exception as error:  # noqa: BLE001 (handed to the test, which raises it)
            pipe.send(error)


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), tied=False, kind="llama")


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without biases: a key bias has (almost) no gradient, and Adam makes full steps out of its rounding errors."""
    return make_model(tmp_path_factory.mktemp("tied_llama"), tied=True, kind="llama")


# --------------------------------------------------------------------- functions that run on every rank


def start(keywords: dict[str, Any], model: Path, *, head: str = "policy", lora: LoraConfig | None = None, **config: Any) -> Any:
    from rayhf.learner.engine import LearnerEngine

    settings = LearnerConfig(**{"lr": LR, "dtype": "float32", "token_budget": 4096, "collective_timeout_s": 60, **config})
    return LearnerEngine(model, settings, head=head, lr=LR, total_steps=10, lora=lora, **keywords)  # type: ignore[arg-type]


def whole_text(row: Row) -> Row:
    return scored_row((*row.prompt_ids, *row.response_ids), prompt_id=row.prompt_id, sample=row.sample)


def advance(engine: Any, steps: range, budget: int, loss: Any, temperature: float = 0.7) -> list[dict[str, float]]:
    results = []
    for step in steps:
        examples = make_examples(9, seed=step)
        if isinstance(loss, BradleyTerryLoss):
            examples = [Example(rows=tuple(whole_text(row) for row in example.rows)) for example in examples]
        rows = [row for example in examples for row in example.rows]
        totals = Totals(tokens=sum(len(r.response_ids) for r in rows), rows=len(rows), examples=len(examples))
        plans = plan([[len(r) for r in e.rows] for e in examples], ranks=engine.world, budget=budget)
        results.append(engine.step([[examples[i] for i in m] for m in plans[engine.rank]], totals, loss, temperature))
    return results


def weights(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    from rayhf.learner.weights import buckets_of, gathered, weights_of

    plan = buckets_of(weights_of(engine.model), limit_bytes=1 << 20, itemsize=4)
    parts = gathered(plan, sharded=engine.stage == 3, rank=engine.rank)
    return {name: tensor.float().numpy().copy() for part in parts for name, tensor in part}


def train(keywords: dict[str, Any], model: Path, budget: int, head: str, config: dict[str, Any]) -> Any:
    engine = start(keywords, model, head=head, **config)
    before = weights(engine)
    losses = {"policy": WeightedLogp(), "value": SquaredError(), "score": BradleyTerryLoss()}
    metrics = advance(engine, range(3), budget, losses[head])
    return metrics, before, weights(engine)


def relative(result: Any, expected: Any) -> float:
    """Largest difference between two runs' weights, relative to how far training moved them."""
    moved = np.sqrt(sum(np.square(expected[2][n] - expected[1][n]).sum() for n in expected[1]))
    apart = np.sqrt(sum(np.square(expected[2][n] - result[2][n]).sum() for n in expected[1]))
    return float(apart / moved)


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("head", ["policy", "value", "score"])
def test_ranks_and_micro_batches_and_stages_do_not_change_the_result(one: Ranks, two: Ranks, tied_llama: Path, head: str) -> None:
    expected = one.call(train, tied_llama, 4096, head, {"zero_stage": 0})[0]
    runs = {"one rank, many micro-batches": one.call(train, tied_llama, 60, head, {"zero_stage": 0})[0]}
    for stage in (0, 1, 2, 3):
        runs[f"two ranks, stage {stage}"] = two.call(train, tied_llama, 100, head, {"zero_stage": stage})[0]
    for stage in (1, 2, 3):
        runs[f"one rank, stage {stage}"] = one.call(train, tied_llama, 100, head, {"zero_stage": stage})[0]
    for name, run in runs.items():
        for mine, theirs in zip(run[0], expected[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
        assert relative(run, expected) < 1e-5, (name, relative(run, expected))


def overflowing_ranks(keywords: dict[str, Any], model: Path) -> list[dict[str, float]]:
    """One example for two ranks: the second rank has nothing to do."""
    engine = start(keywords, model, zero_stage=2)
    example = make_examples(1)[0]
    totals = Totals(tokens=sum(len(r.response_ids) for r in example.rows), rows=2, examples=1)
    micros = [[example]] if engine.rank == 0 else [[]]
    return [engine.step(micros, totals, WeightedLogp(), 1.0) for _ in range(2)]


def test_a_rank_without_work_takes_part(one: Ranks, two: Ranks, tied: Path) -> None:
    first, second = two.call(overflowing_ranks, tied)
    assert first == second
    for mine, theirs in zip(first, one.call(overflowing_ranks, tied)[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def resume(keywords: dict[str, Any], model: Path, directory: Path, config: dict[str, Any], lora: LoraConfig | None) -> bool:
    whole = start(keywords, model, lora=lora, **config)
    losses = advance(whole, range(10), 100, WeightedLogp())
    first = start(keywords, model, lora=lora, **config)
    advance(first, range(5), 100, WeightedLogp())
    first.save(directory)
    torch.rand(3)
    second = start(keywords, model, lora=lora, **config)
    second.load(directory)
    assert second.steps == 5
    assert advance(second, range(5, 10), 100, WeightedLogp()) == losses[5:]
    a, b = weights(whole), weights(second)
    return all(np.array_equal(a[name], b[name]) for name in a)


DROPOUT = LoraConfig(rank=2, alpha=4, dropout=0.3)


@pytest.mark.parametrize(("stage", "lora"), [(0, None), (2, None), (3, None), (2, DROPOUT)])
def test_resume_is_bit_identical(one: Ranks, untied: Path, tmp_path: Path, stage: int, lora: LoraConfig | None) -> None:
    config = {"zero_stage": stage, "schedule": "cosine", "warmup": 0.3}
    assert one.call(resume, untied, tmp_path, config, lora) == [True]


@pytest.mark.parametrize(("stage", "dtype", "lora"), [(3, "bfloat16", None), (2, "bfloat16", None), (2, "float32", DROPOUT)])
def test_resume_on_two_ranks(two: Ranks, tied: Path, tmp_path: Path, stage: int, dtype: str, lora: LoraConfig | None) -> None:
    assert two.call(resume, tied, tmp_path, {"zero_stage": stage, "dtype": dtype}, lora)[0]


def write(keywords: dict[str, Any], model: Path, directory: Path, head: str, lora: LoraConfig | None, config: Any) -> Any:
    """Three steps, a checkpoint in many small files, two more steps: these steps' metrics, the weights before and after all, and
    the state at the checkpoint."""
    from rayhf.learner import checkpoint

    engine = start(keywords, model, head=head, lora=lora, **config)
    before, loss = weights(engine), WeightedLogp() if head == "policy" else SquaredError()
    advance(engine, range(3), 100, loss)
    checkpoint.save(engine.engine, directory, engine._kind(), steps=engine.steps, share_bytes=8_000)
    state = masters(engine)
    return advance(engine, range(3, 5), 100, loss), before, weights(engine), state


def masters(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Masters and moments as torch's optimiser or DeepSpeed's own helpers show them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    result = {}
    for name, parameter in engine.engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.stage == 0:
            result[name] = parameter.detach()
            result.update({f"{name}.{key}": engine.engine.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")})
        else:
            result[name] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                result[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
    return {name: tensor.detach().numpy().copy() for name, tensor in result.items()}


def read(
    keywords: dict[str, Any], model: Path, directory: Path, again: Path, head: str, lora: LoraConfig | None, config: Any
) -> Any:
    """What `write` did after its checkpoint, in a learner that starts from it (and first saves it again)."""
    engine = start(keywords, model, head=head, lora=lora, **config)
    before = weights(engine)
    engine.load(directory)
    assert engine.steps == 3
    engine.save(again)
    return advance(engine, range(3, 5), 100, WeightedLogp() if head == "policy" else SquaredError()), before, weights(engine)


def saved(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Everything trained that a checkpoint holds."""
    from safetensors.numpy import load_file

    files = [*directory.glob("weights-*"), *directory.glob("optimizer-*")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


FLOAT32, DECAYED, BFLOAT16 = {"dtype": "float32"}, {"weight_decay": 0.1}, {"dtype": "bfloat16"}
ADAPTED = LoraConfig(rank=2, alpha=4)


@pytest.mark.parametrize(
    ("head", "lora", "before", "after"),
    [
        *(("policy", None, (i, s, FLOAT32), (j, s, FLOAT32)) for s in (0, 2, 3) for i, j in ((2, 2), (2, 1), (1, 2))),
        ("policy", None, (2, 3, FLOAT32), (1, 0, FLOAT32)),
        ("policy", None, (1, 0, DECAYED), (2, 2, DECAYED)),
        ("policy", None, (2, 3, DECAYED), (2, 1, DECAYED)),
        ("value", ADAPTED, (2, 2, FLOAT32), (1, 3, FLOAT32)),
        ("policy", None, (2, 2, BFLOAT16), (1, 2, BFLOAT16)),
        ("policy", None, (2, 1, BFLOAT16), (2, 3, BFLOAT16)),
        ("policy", None, (2, 3, BFLOAT16), (1, 0, FLOAT32)),
    ],
    ids=lambda value: f"{value[0]}x-zero{value[1]}-{'-'.join(map(str, value[2].values()))}" if isinstance(value, tuple) else None,
)
def test_a_checkpoint_fits_any_ranks_and_stage(
    one: Ranks, two: Ranks, tied_llama: Path, tmp_path: Path, head: str, lora: LoraConfig | None, before: Any, after: Any
) -> None:
    ranks = {1: one, 2: two}
    settings = [{"zero_stage": stage, "schedule": "cosine", "warmup": 0.3, **more} for _, stage, more in (before, after)]
    *expected, state = ranks[before[0]].call(write, tied_llama, tmp_path / "a", head, lora, settings[0])[0]
    result = ranks[after[0]].call(read, tied_llama, tmp_path / "a", tmp_path / "b", head, lora, settings[1])[0]
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("weights-*"))) > len(list((tmp_path / "b").glob("weights-*"))) == after[0]
    assert first.keys() == second.keys() == state.keys() and any(name.endswith("exp_avg_sq") for name in first)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, state[name], err_msg=name)
        assert tensor.dtype == np.float32 and tensor.tobytes() == second[name].tobytes(), name
    if before == after:
        assert result[0] == expected[0]
        assert all(np.array_equal(result[2][name], expected[2][name]) for name in expected[2])
    else:
        tolerance = 1e-5 if before[2] == after[2] != BFLOAT16 else 2e-2
        for mine, theirs in zip(result[0], expected[0], strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
        assert relative(result, expected) < (1e-5 if tolerance == 1e-5 else 0.2)


def refuse(keywords: dict[str, Any], model: Path, other: Path, directory: Path) -> None:
    start(keywords, model, zero_stage=0).save(directory)
    index, file = directory / "learner.json", directory / "weights-00000.safetensors"
    found = sorted(path.name for path in directory.parent.rglob("*") if path.is_file())
    assert found == ["learner.json", "optimizer-00000.safetensors", "random-00000.safetensors", "weights-00000.safetensors"]
    with pytest.raises(CheckpointError, match="head=policy, this learner has head=value"):
        start(keywords, model, head="value").load(directory)
    with pytest.raises(CheckpointError, match="lora=False, this learner has lora=True"):
        start(keywords, model, lora=ADAPTED).load(directory)
    with pytest.raises(
        CheckpointError, match=r"another model: it has model\.lm_head\.weight with shape None, this learner \(97, 32\)"
    ):
        start(keywords, other).load(directory)
    engine = start(keywords, model, zero_stage=2)
    advance(engine, range(1), 100, WeightedLogp())
    before = weights(engine)
    content, tensors = index.read_text(), file.read_bytes()
    changed = json.loads(content)
    name = next(iter(changed["parameters"]))
    changed["parameters"][name]["shape"] = [96, 32]
    index.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=rf"{name} with shape \(96, 32\), this learner \(97, 32\)"):
        engine.load(directory)
    index.write_text(content)
    file.write_bytes(tensors.replace(b"[97,32]", b"[32,97]"))
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors does not hold what learner\.json says"):
        engine.load(directory)
    file.write_bytes(tensors[:-4])
    with pytest.raises(CheckpointError, match=r"cannot read .*weights-00000"):
        engine.load(directory)
    file.write_bytes(tensors)
    (directory / "optimizer-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*optimizer-00000"):
        engine.load(directory)
    with pytest.raises(CheckpointError, match="no learner checkpoint"):
        engine.load(directory / "nowhere")
    after = weights(engine)
    assert engine.steps == 1 and all(np.array_equal(before[name], after[name]) for name in before)


def test_another_learners_or_a_damaged_checkpoint_is_refused_and_changes_nothing(
    one: Ranks, tied_llama: Path, untied: Path, tmp_path: Path
) -> None:
    one.call(refuse, tied_llama, untied, tmp_path / "state")


def poison(keywords: dict[str, Any], model: Path, stage: int, dtype: str) -> None:
    engine = start(keywords, model, zero_stage=stage, dtype=dtype)
    advance(engine, range(1), 60, WeightedLogp())
    before = weights(engine)
    example = make_examples(1)[0]
    row = example.rows[0].with_tokens(advantage=np.full(len(example.rows[0].response_ids), np.nan, np.float32))
    totals = Totals(tokens=10, rows=2, examples=2)
    bad, good = Example(rows=(row,)), Example(rows=(example.rows[1],))
    micros = [[good], [bad] if engine.rank == engine.world - 1 else [good]]
    with pytest.raises(NumericalError, match="optimiser step 1"):
        engine.step(micros, totals, WeightedLogp(), 1.0)
    after = weights(engine)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    finite = advance(engine, range(1, 2), 60, WeightedLogp())
    clean = start(keywords, model, zero_stage=stage, dtype=dtype)
    assert advance(clean, range(2), 60, WeightedLogp())[1] == finite[0]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "float32")])
def test_one_ranks_nan_stops_every_rank_and_leaves_no_trace(two: Ranks, tied: Path, stage: int, dtype: str) -> None:
    two.call(poison, tied, stage, dtype)


def evaluate(keywords: dict[str, Any], model: Path, stage: int) -> None:
    """Ranks bring different numbers of rows; log-probs with and without gradient are the same bits."""
    engine = start(keywords, model, zero_stage=stage, token_budget=60)
    rows = [row for example in make_examples(4) for row in example.rows][: 8 if engine.rank == 0 else 3]
    outputs = engine.outputs(rows, 0.7)
    assert [len(o) for o in outputs] == [len(r.response_ids) for r in rows]
    from rayhf.learner.forward import build_inputs

    inputs = build_inputs(rows[:3], "cpu")
    engine.engine.train()
    with_gradient = engine.engine(inputs, 0.7)[0].detach()
    assert torch.equal(with_gradient, engine._evaluate(inputs, 0.7).detach())
    np.testing.assert_allclose(np.concatenate(outputs[:3]), with_gradient.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_outputs(two: Ranks, tied: Path, stage: int) -> None:
    two.call(evaluate, tied, stage)


def publish(
    keywords: dict[str, Any], model: Path, directory: Path, config: dict[str, Any], lora: LoraConfig | None, kind: str
) -> Any:
    engine = start(keywords, model, lora=lora, **config)
    advance(engine, range(3), 100, WeightedLogp())
    before = weights(engine)
    engine.export(directory)
    buckets, probe = engine.publish(3, "float32", 20_000)
    assert all(np.array_equal(before[n], v) for n, v in weights(engine).items()), "publishing changed the training weights"
    if engine.rank != 0:
        assert buckets == []
        return None
    return check_published(buckets, probe, model, directory, tied=kind == "tied")


def check_published(buckets: Any, probe: Any, model: Path, directory: Path, *, tied: bool) -> float:
    """A reference that starts from the *initial* model and takes the buckets must agree with the probe, and so must the
    exported directory. Returns the distance between the two, and checks the initial model is elsewhere."""
    from rayhf.reference.engine import ReferenceEngine

    assert len(buckets) > 1
    names = [spec.name for bucket in buckets for spec in bucket.tensors]
    assert ("lm_head.weight" in names) == (not tied)
    row = Row(prompt_id="probe", sample=0, prompt_ids=probe.token_ids[:1], response_ids=probe.token_ids[1:])
    reference = ReferenceEngine(model, ReferenceConfig(), dtype="float32")
    initial = reference.logprobs([row], 1.0)[0]
    reference.update([(bucket, bucket.payload) for bucket in buckets], 1.0)
    published = reference.logprobs([row], 1.0)[0]
    exported = ReferenceEngine(directory, ReferenceConfig(), dtype="float32").logprobs([row], 1.0)[0]
    assert np.abs(initial - probe.logprobs).max() > 1e-2, "training moved nothing: the check below would prove nothing"
    np.testing.assert_array_equal(published, exported)
    assert (directory / "tokenizer_config.json").is_file()
    return float(np.abs(published - probe.logprobs).max())


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("stage", "lora"), [(2, None), (3, None), (3, LoraConfig(rank=4, alpha=16))])
def test_published_weights_are_the_trained_ones(
    two: Ranks, tied: Path, untied: Path, tmp_path: Path, stage: int, lora: LoraConfig | None, kind: str
) -> None:
    model = tied if kind == "tied" else untied
    gap = two.call(publish, model, tmp_path, {"zero_stage": stage, "lr": 1e-2}, lora, kind)[0]
    assert gap < 2e-5


def bfloat16(keywords: dict[str, Any], model: Path) -> list[float]:
    """Rotary frequencies stay float32, whatever DeepSpeed casts; small updates survive in the float32 masters."""
    losses = []
    for stage in (1, 2, 3):
        engine = start(keywords, model, zero_stage=stage, dtype="bfloat16")
        frequencies = engine.model.model.rotary_emb.inv_freq
        exact = 1.0 / engine.model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
        assert frequencies.dtype == torch.float32
        torch.testing.assert_close(frequencies, exact)
        losses.append(advance(engine, range(4), 100, WeightedLogp())[-1]["learner/loss"])
    return losses


def test_bfloat16_trains_like_float32(one: Ranks, tied: Path) -> None:
    exact = one.call(train_four, tied)[0]
    for loss in one.call(bfloat16, tied)[0]:
        assert loss == pytest.approx(exact, abs=0.02)


def train_four(keywords: dict[str, Any], model: Path) -> float:
    return advance(start(keywords, model, zero_stage=0), range(4), 100, WeightedLogp())[-1]["learner/loss"]


def test_activation_checkpointing_changes_nothing(one: Ranks, tied: Path) -> None:
    expected = one.call(train, tied, 4096, "policy", {"zero_stage": 0})[0]
    result = one.call(train, tied, 4096, "policy", {"zero_stage": 0, "activation_checkpointing": True})[0]
    assert relative(result, expected) < 1e-6


def value_lora(keywords: dict[str, Any], model: Path) -> tuple[float, float, float]:
    """A critic starts at exactly zero, learns, and with LoRA trains its whole head."""
    engine = start(keywords, model, head="value", lora=LoraConfig(rank=2, alpha=4), zero_stage=2)
    rows = [row for example in make_examples(2) for row in example.rows]
    first = max(float(np.abs(values).max()) for values in engine.outputs(rows, 1.0))
    metrics = advance(engine, range(10), 100, SquaredError())
    return first, metrics[0]["learner/loss"], float(np.abs(weights(engine)["score.weight"]).max())


def test_value_head_starts_at_zero_and_learns(one: Ranks, untied: Path) -> None:
    first, _, score = one.call(value_lora, untied)[0]
    assert first == 0.0
    assert score > 0.0
