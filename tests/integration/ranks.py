"""A learner's ranks: processes that many tests share, because importing DeepSpeed is slow."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rayhf.config.fit import BradleyTerryConfig
from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.learner.packing import plan_micro_batches
from rayhf.losses.base import LossOutput, MicroBatch, Totals
from rayhf.losses.reward import BradleyTerryLoss
from rayhf.models.forward import scored_row
from rayhf.types import Example, Row, token_array

VOCABULARY = 97
LR = 1e-3


@dataclass(frozen=True)
class WeightedLogp:
    """-sum(advantage * log p) / tokens, minus 0.01 of the entropy."""

    entropy: Literal["off", "metric", "loss"] = "loss"

    def __call__(self, output_T: torch.Tensor, micro: MicroBatch) -> LossOutput:
        loss = -(output_T * micro.tokens["advantage"]).sum() / micro.totals.tokens
        if micro.entropy_T is not None:
            loss = loss - 0.01 * micro.entropy_T.sum() / micro.totals.tokens
        return LossOutput(
            loss=loss,
            metrics={
                "test/rows": micro.length_R.new_tensor(len(micro.length_R)),
                "test/logp_max": output_T.detach().max(),
            },
        )


@dataclass(frozen=True)
class SquaredError:
    entropy: Literal["off", "metric", "loss"] = "off"

    def __call__(self, output_T: torch.Tensor, micro: MicroBatch) -> LossOutput:
        return LossOutput(
            loss=(output_T - micro.tokens["advantage"]).square().sum() / micro.totals.tokens,
            metrics={},
        )


def make_model(directory: Path, *, tied: bool, kind: Literal["qwen2", "llama"] = "qwen2") -> Path:
    import transformers

    torch.manual_seed(0)
    names = {
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
    }[kind]
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
    """Return pairs; two examples have the same prompt, the next two another one."""
    rng = np.random.default_rng(seed)
    prompts = [token_array(rng.integers(0, VOCABULARY, rng.integers(1, 9))) for _ in range(count)]

    def row(number: int) -> Row:
        response = rng.integers(1, 17)
        prompt = number // 4
        return Row(
            prompt_id=f"p{prompt}",
            sample=number,
            prompt_ids=prompts[prompt],
            response_ids=token_array(rng.integers(0, VOCABULARY, response)),
            tokens={"advantage": rng.normal(size=response).astype(np.float32)},
        )

    return [Example(rows=(row(2 * i), row(2 * i + 1))) for i in range(count)]


# -------------------------------------------------------------------------------------------- ranks


class Ranks:
    """`world` processes; `call` runs one function on all of them."""

    def __init__(self, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.master = ("127.0.0.1", probe.getsockname()[1])
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(world):
            parent, child = context.Pipe()
            process = context.Process(
                target=serve, args=(child, rank, world, self.master), daemon=True
            )
            process.start()
            self.pipes.append(parent)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results by rank."""
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


# ----------------------------------------------------------------- functions that run on every rank


def start(
    keywords: dict[str, Any],
    model: Path,
    *,
    head: str = "policy",
    lora: LoraConfig | None = None,
    **config: Any,
) -> Any:
    from rayhf.learner.engine import LearnerEngine

    settings = LearnerConfig(
        **{"lr": LR, "dtype": "float32", "token_budget": 4096, "collective_timeout_s": 60, **config}
    )
    return LearnerEngine(model, settings, head=head, lr=LR, total_steps=10, lora=lora, **keywords)  # type: ignore[arg-type]


def whole_text(row: Row) -> Row:
    return scored_row(
        (*row.prompt_ids, *row.response_ids), prompt_id=row.prompt_id, sample=row.sample
    )


def advance(
    engine: Any, steps: range, budget: int, loss: Any, temperature: float = 0.7
) -> list[dict[str, float]]:
    results = []
    for step in steps:
        examples = make_examples(9, seed=step)
        if isinstance(loss, BradleyTerryLoss):
            examples = [
                Example(rows=tuple(whole_text(row) for row in example.rows)) for example in examples
            ]
        rows = [row for example in examples for row in example.rows]
        totals = Totals(
            tokens=sum(len(r.response_ids) for r in rows), rows=len(rows), examples=len(examples)
        )
        plans = plan_micro_batches(
            [e.rows for e in examples], packing=engine.packing, ranks=engine.world, budget=budget
        )
        results.append(
            engine.step(
                [[examples[i] for i in m] for m in plans[engine.rank]], totals, loss, temperature
            )
        )
    return results


def weights(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    from rayhf.weights.export import all_weights, gather_buckets, split_into_buckets

    plan = split_into_buckets(all_weights(engine.model), limit_bytes=1 << 20, itemsize=4)
    parts = gather_buckets(plan, sharded=engine.stage == 3, rank=engine.rank)
    return {name: tensor.float().numpy().copy() for part in parts for name, tensor in part}


def train(
    keywords: dict[str, Any], model: Path, budget: int, head: str, config: dict[str, Any]
) -> Any:
    engine = start(keywords, model, head=head, **config)
    before = weights(engine)
    losses = {
        "policy": WeightedLogp(),
        "value": SquaredError(),
        "score": BradleyTerryLoss(BradleyTerryConfig()),
    }
    metrics = advance(engine, range(3), budget, losses[head])
    return metrics, before, weights(engine)


def relative(result: Any, expected: Any) -> float:
    """Return the distance of two runs' weights, relative to how far training moved them."""
    moved = np.sqrt(sum(np.square(expected[2][n] - expected[1][n]).sum() for n in expected[1]))
    distance = np.sqrt(sum(np.square(expected[2][n] - result[2][n]).sum() for n in expected[1]))
    return float(distance / moved)
