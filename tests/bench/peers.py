"""The timed systems, each in a process of its own.

    python -m tests.bench.peers SYSTEM     the Spec comes on stdin

Synchronization: a peer does one training step, writes one JSON line about it, and waits for "go"
before the next; an empty line or the end of stdin ends it. speed.py measures the time between "go"
and the line, so every peer's whole step is timed alike while the others wait. Between steps no peer
has anything in flight (rayhf with max_staleness 1 included: weight sync at an iteration's end waits
for the next iteration's completions).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.workload import Spec, reward

LR = 1e-6
"""So small that completions keep the lengths that the model was built for."""
KL = 0.01
SEARCH = {
    "type": "mcts_dpo",
    "expansion": "leaf",
    "iterations": 12,
    "depth": 3,
    "width": [4, 3, 2],
    "parallel": 4,
    "step_tokens": 16,
    "max_steps": 4,
    "outcome": {"threshold": None},
}
"""A tree of steps of 16 tokens; a graded reward."""


class DoneError(Exception):
    """Raised when speed.py requests no more steps."""


class Turns:
    """The connection to speed.py; everything else that writes to stdout is sent to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.spec = Spec.load(sys.stdin.readline())

    def done(self, **report: Any) -> None:
        """Report a step and wait for the next turn. Raises DoneError when there is none."""
        self.send(**report)
        if sys.stdin.readline().strip() != "go":
            raise DoneError

    def send(self, **report: Any) -> None:
        self._out.write(json.dumps(report) + "\n")


# -------------------------------------------------------------------------------------------- rayhf


def campaign(spec: Spec, directory: Path) -> dict[str, Any]:
    """Return the config of a rayhf campaign with a case's workload."""
    algorithm: dict[str, Any] = {"type": "online_dpo", "samples": spec.samples}
    if spec.algorithm == "grpo":
        kl = {"coef": KL, "estimator": "k3", "where": "loss"}
        loss = {"aggregate": "token_mean"}  # as TRL's default
        algorithm = {"type": "grpo", "samples": spec.samples, "kl": kl, "loss": loss}
    if spec.algorithm == "mcts_dpo":
        algorithm = SEARCH
    run = {"dir": str(directory), "iterations": 10_000, "eval_every": 0, "checkpoint_every": 0}
    budget = spec.micro * spec.row_tokens
    return {
        "run": {**run, "max_staleness": spec.max_staleness},
        "policy": {"model": spec.model, "dtype": spec.dtype, "max_length": 512},
        "prompts": {"train": spec.train, "batch": spec.prompts},
        "algorithm": algorithm,
        "rollout": {
            "max_tokens": spec.max_tokens,
            "max_num_seqs": spec.completions,
            # By default half of them; the other systems have all of them.
            "threads": max(1, spec.threads // (1 + (spec.max_staleness > 0))),
        },
        "reference": {"token_budget": budget},
        "scorer": {"train": [{"type": "rule", "function": "tests.bench.workload:reward"}]},
        "learner": {
            "lr": LR,
            "dtype": spec.dtype,
            "zero_stage": 0,
            "token_budget": budget,
            "packing": spec.packing,
        },
    }


class Stepper:
    """An observer for which an iteration's metrics end a turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def phase(self, iteration: int, name: str, done: int = 0, total: int = 0) -> None: ...

    def event(self, kind: str, message: str) -> None: ...

    def metrics(self, metrics: Mapping[str, float]) -> None:
        if metrics["iteration"] > 0:
            self._turns.done(
                length=metrics["rollout/length_mean"],
                phases=_phases(metrics),
                metrics=dict(metrics),
            )


async def _assemble(prepared: Any, store: Any, observer: Stepper) -> Any:
    from launch.assemble import ActorSet

    return await ActorSet(prepared, store, observer, base=Path.cwd()).assemble()


def rayhf(turns: Turns) -> None:
    """Run the real controller and actors."""
    from launch.local import ray_cluster
    from rayhf.campaign.controller import Controller
    from rayhf.config.load import load_config
    from rayhf.planning.preflight import prepare
    from rayhf.run_dir.store import RunDir

    config = load_config(campaign(turns.spec, Path(f"run-{os.getpid()}")))
    prepared = prepare(config, base=Path.cwd())
    store = RunDir(config)
    observer = Stepper(turns)

    async def run() -> None:
        controller = Controller(
            config,
            algorithm=prepared.algorithm,
            roles=await _assemble(prepared, store, observer),
            data=prepared.data,
            store=store,
            observer=observer,
        )
        await controller.run()

    with ray_cluster("local", cpus=4):
        asyncio.run(run())


def _phases(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        k.removeprefix("time/").removesuffix("_s"): v
        for k, v in metrics.items()
        if k.startswith("time/")
    }


def agreement(turns: Turns) -> None:
    """Report |engine's log-prob - learner's| of sampled tokens after three steps and syncs, in
    nats."""
    import numpy as np

    from launch.local import ray_cluster
    from rayhf.config.load import load_config
    from rayhf.planning.preflight import prepare
    from rayhf.run_dir.store import RunDir
    from rayhf.types import (
        Batch,
        Example,
        GenerateRequest,
        Group,
        Sample,
        Sampling,
        Scored,
        make_row,
    )

    spec = turns.spec
    data = campaign(spec, Path(f"run-{os.getpid()}"))
    data["learner"] |= {"lr": 1e-3, "dtype": "float32"}  # steps that move the weights visibly
    config = load_config(data)
    prepared = prepare(config, base=Path.cwd())
    store = RunDir(config)

    async def sample(roles: Any, version: int) -> list[Any]:
        sampling = Sampling(max_tokens=spec.max_tokens)
        prompts = prepared.data.prompts.prompts[: spec.completions]
        requests = [
            GenerateRequest(
                prompt_id=p.prompt_id,
                number=0,
                token_ids=p.token_ids,
                sampling=sampling,
                seeds=(version,),
            )
            for p in prompts
        ]
        generated = await roles.rollouts["policy"].generate(requests, version=version)
        groups = [
            Group(
                prompt=p,
                samples=tuple(Sample(completion=c, outcome=Scored(value=0.0)) for c in completions),
            )
            for p, completions in zip(prompts, generated, strict=True)
        ]
        return [make_row(group, 0, score=0.0) for group in groups]

    async def run() -> None:
        roles = await _assemble(prepared, store, Stepper(turns))
        learner = roles.learners["policy"]
        loss = prepared.algorithm.loss()
        for version in range(3):
            rows = await sample(roles, version)
            references = await roles.reference.logprobs(rows, temperature=1.0)
            advantages = [
                np.full(len(r.response_ids), 1.0 if i % 2 else -1.0, np.float32)
                for i, r in enumerate(rows)
            ]
            rows = [
                r.with_tokens(advantage=a, ref_logp=f)
                for r, a, f in zip(rows, advantages, references, strict=True)
            ]
            batch = Batch(examples=tuple(Example(rows=(row,)) for row in rows))
            await learner.step(batch, loss)
            await roles.rollouts["policy"].update(await learner.publish(version + 1))
        rows = await sample(roles, 3)
        learned = np.concatenate(await learner.outputs(rows, temperature=1.0))
        initial = np.concatenate(await roles.reference.logprobs(rows, temperature=1.0))
        gaps = np.abs(np.concatenate([r.tokens["behavior_logp"] for r in rows]) - learned)
        moved = initial - learned
        turns.done(
            mean=float(gaps.mean()),
            max=float(gaps.max()),
            tokens=len(gaps),
            moved=float(np.abs(moved).mean()),
        )

    with ray_cluster("local", cpus=4):
        asyncio.run(run())


# ---------------------------------------------------------------------------------------------- TRL


def trl(turns: Turns) -> None:
    """Run TRL's synchronous trainers with transformers' generate.

    Its vLLM modes do not run on CPU.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    spec = turns.spec
    torch.set_num_threads(spec.threads)
    lengths: list[int] = []

    class StepCallback(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.done(length=sum(lengths[-spec.completions :]) / spec.completions)

    def score(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        # Online DPO passes the padding, too.
        lengths.extend(sum(i != pad for i in ids) for ids in completion_ids)
        return [
            reward(text, prompt="", reference_answer=None, finish_reason="stop") for text in texts
        ]

    prompts = [
        json.loads(line)["prompt"]
        for line in Path(spec.train).read_text(encoding="utf-8").splitlines()
    ]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    )
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    pad = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": "trl",
        "max_steps": 10_000,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "temperature": 1.0,
        "disable_dropout": True,
    }
    rest: dict[str, Any] = {
        "processing_class": tokenizer,
        "train_dataset": data,
        "callbacks": [StepCallback()],
    }
    trainer: Any
    if spec.algorithm == "grpo":
        grpo = GRPOConfig(
            per_device_train_batch_size=spec.micro,
            gradient_accumulation_steps=spec.completions // spec.micro,
            num_generations=spec.samples,
            max_completion_length=spec.max_tokens,
            beta=KL,
            **common,
        )
        trainer = GRPOTrainer(model=model, reward_funcs=score, args=grpo, **rest)
    else:
        # Its batch is counted in prompts of two completions. It generates per micro-batch, so a
        # single micro-batch is fastest.
        dpo = OnlineDPOConfig(
            per_device_train_batch_size=spec.prompts,
            max_new_tokens=spec.max_tokens,
            max_length=512,
            beta=0.1,
            **common,
        )
        trainer = OnlineDPOTrainer(model=model, reward_funcs=score, args=dpo, **rest)
    trainer.train()


# ------------------------------------------------------------------------------------- bare engines


def vllm(turns: Turns) -> None:
    """Run vLLM alone, with the settings of rayhf's rollout."""
    from rayhf.rollout.env import engine_env

    os.environ.update(engine_env("cpu", turns.spec.threads))
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from rayhf.data.files import FileSource, FileSourceConfig
    from rayhf.data.prompts import PromptReader, iteration_batch

    spec = turns.spec
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    train = FileSourceConfig(path=Path(spec.train))
    reader = PromptReader(tokenizer=tokenizer, max_prompt_tokens=spec.prompt_tokens)
    source = FileSource(train, base=Path())
    prompts, _ = reader.read(source, train, name="train", key="prompts.train")
    llm = LLM(
        spec.model,
        dtype=spec.dtype,
        max_model_len=512,
        max_num_seqs=spec.completions,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enable_chunked_prefill=False,
        max_num_batched_tokens=16384,
        disable_log_stats=True,
    )
    number = 0
    while True:
        number += 1
        dealt = iteration_batch(prompts, batch=spec.prompts, iteration=number, seed=0)
        inputs = [
            {"prompt_token_ids": list(p.token_ids)} for p in dealt for _ in range(spec.samples)
        ]
        params = [
            SamplingParams(
                max_tokens=spec.max_tokens,
                seed=number * spec.completions + i,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i in range(spec.completions)
        ]
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        mean = sum(len(o.outputs[0].token_ids) for o in outputs) / spec.completions
        turns.done(length=mean, phases={"rollout": seconds})


def deepspeed(turns: Turns) -> None:
    """Run DeepSpeed alone: reference pass, forward, backward and step over as many tokens."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    import deepspeed as ds
    import torch
    from transformers import AutoModelForCausalLM

    spec = turns.spec
    torch.set_num_threads(spec.threads)
    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ build takes half a minute
    ds.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model, reference = (
        AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32) for _ in range(2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    pieces = spec.completions // spec.micro
    settings = {
        "train_micro_batch_size_per_gpu": spec.micro,
        "gradient_accumulation_steps": pieces,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 62,
    }
    engine, *_ = ds.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )

    def logprobs(module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return those of the tokens after the prompt, shape (rows, max_tokens)."""
        logits = (
            module(input_ids=ids, use_cache=False, logits_to_keep=spec.max_tokens + 1)
            .logits[:, :-1]
            .float()
        )
        return (
            torch.log_softmax(logits, -1).gather(-1, ids[:, spec.prompt_tokens :, None]).squeeze(-1)
        )

    while True:
        ids: Any = torch.randint(4, model.config.vocab_size, (spec.completions, spec.row_tokens))
        started = time.perf_counter()
        with torch.no_grad():
            before = [logprobs(reference, part) for part in ids.split(spec.micro)]
        middle = time.perf_counter()
        for part, old in zip(ids.split(spec.micro), before, strict=True):
            new = logprobs(engine, part)
            ratio = torch.exp(new - new.detach())
            engine.backward((-ratio + KL * (torch.exp(old - new) - 1 + new - old)).mean())
            engine.step()
        phases = {"reference": middle - started, "learner": time.perf_counter() - middle}
        turns.done(length=spec.max_tokens, phases=phases)


PEERS = {"rayhf": rayhf, "agreement": agreement, "trl": trl, "vllm": vllm, "deepspeed": deepspeed}


def main() -> None:
    turns = Turns()
    try:
        PEERS[sys.argv[1]](turns)
    except DoneError:
        return


if __name__ == "__main__":
    main()
