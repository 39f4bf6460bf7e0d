"""One rank of the learner: a DeepSpeed engine that knows no algorithm and no Ray.

In: micro-batches of Examples that `packing.plan` gave this rank, the counts of the whole step, a
loss. Out: metrics of the whole step. All ranks call every method together; within `step` they meet
in each micro-batch's backward (ZeRO), in the gradient norm, and once more to add up metrics. A wait
in any of them ends after learner.collective_timeout_s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.errors import ConfigError, NumericalError
from rayhf.learner import checkpoint
from rayhf.learner.build import (
    Head,
    deepspeed_config,
    effective_stage,
    join,
    load_model,
    start_engine,
)
from rayhf.learner.forward import Inputs, base_model, build_inputs, build_micro, token_batches
from rayhf.learner.offload import Offloader
from rayhf.losses.base import Loss, Totals
from rayhf.types import Example, FloatArray, Probe, Row, WeightBucket, derive_seed
from rayhf.weights.export import Weight, buckets_of, export_model, gathered, trained_of, weights_of

PROBE_TOKENS = 64


class LearnerEngine:
    """A policy, a critic or a scorer on one rank of `world`.

    `head_size` is the number of outputs of a "score" head, whose rows are made by
    forward.scored_row. `lr` is the schedule's peak and `total_steps` its length in optimizer steps.
    `device` is "cpu" or "cuda[:index]". Raises ConfigError for a model or a setting that cannot be
    trained.
    """

    def __init__(
        self,
        model: Path,
        config: LearnerConfig,
        *,
        head: Head = "policy",
        head_size: int = 1,
        lr: float,
        total_steps: int,
        lora: LoraConfig | None = None,
        rank: int = 0,
        world: int = 1,
        master: tuple[str, int],
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.source, self.config, self.head, self.rank, self.world = (
            model,
            config,
            head,
            rank,
            world,
        )
        self.device = torch.device(device)
        self.stage = effective_stage(config)
        self.lora = lora is not None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        join(
            rank=rank,
            world=world,
            master=master,
            device=self.device,
            timeout_s=config.collective_timeout_s,
        )
        settings = deepspeed_config(config, device=self.device)
        torch.manual_seed(derive_seed(seed, "learner", head))
        loaded = load_model(model, config, head=head, head_size=head_size, lora=lora, zero=settings)
        self.engine = start_engine(
            loaded, config, settings=settings, lr=lr, total_steps=total_steps
        )
        self.model = loaded.model
        self._residence = Offloader(self.engine)
        self.steps = 0
        torch.manual_seed(derive_seed(seed, "learner", head, rank))

    # ------------------------------------------------------------------------------------------------ training

    def step(
        self, micros: Sequence[Sequence[Example]], totals: Totals, loss: Loss, temperature: float
    ) -> dict[str, float]:
        """One optimizer step over all micro-batches of all ranks; every rank brings the same number
        of them.

        Returns the loss's metrics over the whole step, and learner/loss, learner/grad_norm (before
        clipping), learner/lr. Raises NumericalError on every rank where a loss or the gradient is
        not finite; the weights are then unchanged.
        """
        if not micros:
            raise ConfigError("a learner step without micro-batches; expected at least one example")
        self.engine.train()
        lr = self.engine.get_lr()[0]
        parts: list[dict[str, Tensor]] = []
        for number, examples in enumerate(micros, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micros))
            value, metrics = self._forward(examples, totals, loss, temperature)
            # DeepSpeed averages over ranks; losses are shares of a sum. A loss that is not finite
            # poisons its gradient, and so the reduced norm of every rank: all of them see it,
            # without one more collective.
            poison = torch.where(value.detach().isfinite(), 1.0, torch.nan)
            self.engine.backward(value * (poison * self.world))
            parts.append({**metrics, "learner/loss": value.detach()})
        norm = self._update()
        result = self._reduce(parts)
        if not (math.isfinite(norm) and math.isfinite(result["learner/loss"])):
            raise NumericalError(
                f"{self.head}: learner/loss is {result['learner/loss']}, the gradient norm is {norm} at optimizer step "
                f"{self.steps}; expected finite values, the weights were not changed"
            )
        self.steps += 1
        return {**result, "learner/grad_norm": norm, "learner/lr": lr}

    def _forward(
        self, examples: Sequence[Example], totals: Totals, loss: Loss, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the loss, and its metrics. An empty one runs the model for
        the collectives' sake."""
        if not examples:
            output_T, _ = self.engine(build_inputs([], self.device), temperature)
            return output_T.sum() * 0.0, {}
        inputs, micro = build_micro(examples, totals, self.device)
        output_T, entropy_T = self.engine(inputs, temperature, loss.entropy)
        if entropy_T is not None:
            micro = replace(micro, entropy_T=entropy_T)
        result = loss(output_T, micro)
        return result.loss, dict(result.metrics)

    def _update(self) -> float:
        """Clip and step unless the gradient norm is not finite; the norm before clipping, the same
        on every rank."""
        if self.stage == 0:
            trainable = [
                parameter
                for parameter in self.engine.module.parameters()
                if parameter.requires_grad
            ]
            limit = self.config.grad_clip or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(trainable, limit, foreach=True))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm
            self.engine.step()
            return norm
        self.engine.step()  # DeepSpeed drops the step where the norm is not finite
        return (
            math.nan
            if self.engine.optimizer.overflow
            else float(self.engine.get_global_grad_norm())
        )

    def _reduce(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Add metrics up over micro-batches and ranks; `_max` takes the maximum. Ranks may lack
        what others have."""
        names = [(name, value.detach().float()) for part in parts for name, value in part.items()]
        values = torch.stack([value for _, value in names]).tolist()  # one transfer from the device
        entries = [(name, value) for (name, _), value in zip(names, values, strict=True)]
        everyone: list[list[tuple[str, float]]] = [entries]
        if self.world > 1:
            everyone = [[] for _ in range(self.world)]
            torch.distributed.all_gather_object(everyone, entries)
        total: dict[str, float] = {}
        for name, value in (entry for rank in everyone for entry in rank):
            if name.endswith("_max"):
                total[name] = max(total.get(name, -math.inf), value)
            else:
                total[name] = total.get(name, 0.0) + value
        return total

    # --------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def outputs(self, rows: Sequence[Row], temperature: float) -> list[FloatArray]:
        """For each of this rank's rows a float32 array (len(response_ids),): log-probs in nats, or
        values for a critic; (1, d) for a scorer.

        Under ZeRO-3 all ranks must call it together; their numbers of rows may differ (also 0).
        """
        batches = token_batches([len(row) for row in rows], self.config.token_budget)
        most = self._most_batches(
            len(batches)
        )  # before the first forward pass, so that collectives meet in order
        results: list[FloatArray | None] = [None] * len(rows)
        for batch in batches:
            output_T = self._evaluate(
                build_inputs([rows[i] for i in batch], self.device), temperature
            )
            parts = torch.split(output_T.cpu(), [len(rows[i].response_ids) for i in batch])
            for i, part in zip(batch, parts, strict=True):
                results[i] = part.numpy().copy()
        for _ in range(most - len(batches)):
            self._evaluate(build_inputs([], self.device), temperature)
        return [result for result in results if result is not None]

    def _most_batches(self, mine: int) -> int:
        """The largest number of batches of any rank: under ZeRO-3 every forward pass is a
        collective."""
        if self.stage < 3 or self.world == 1:
            return mine
        count = torch.tensor(mine, device=self.device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
        return int(count)

    def _evaluate(self, inputs: Inputs, temperature: float) -> Tensor:
        self.engine.eval()
        output_T: Tensor = self.engine(inputs, temperature)[0]
        return output_T

    @torch.no_grad()
    def probe(self) -> Probe:
        """Log-probs of a fixed token sequence at temperature 1. All ranks take part.

        Computed by the training model itself (LoRA unmerged), independently of how weights are
        packed and sent, so that an engine that agrees has received the policy that is being
        trained.
        """
        vocabulary = base_model(self.model).config.get_text_config().vocab_size
        ids = tuple((7919 * i + 104729) % vocabulary for i in range(PROBE_TOKENS))
        row = Row(prompt_id="probe", sample=0, prompt_ids=ids[:1], response_ids=ids[1:])
        logprobs = tuple(self._evaluate(build_inputs([row], self.device), 1.0).tolist())
        if not all(map(math.isfinite, logprobs)):
            raise NumericalError(
                f"the policy's weights after optimizer step {self.steps} give log-probs that are not finite"
            )
        return Probe(token_ids=ids, logprobs=logprobs)

    # ------------------------------------------------------------------------------------------------ weights

    def plan(
        self, dtype: str, bucket_bytes: int, *, whole: bool = False
    ) -> tuple[list[list[Weight]], torch.dtype]:
        """What travels, cut into buckets, and its dtype; known without gathering anything.

        All weights in `dtype`. With LoRA, unless `whole`, only what is trained, as it is: merging
        comes before rounding.
        """
        adapters = self.lora and not whole
        target: torch.dtype = getattr(torch, self.config.dtype if adapters else dtype)
        weights = trained_of(self.model) if adapters else weights_of(self.model)
        return buckets_of(weights, limit_bytes=bucket_bytes, itemsize=target.itemsize), target

    def buckets(
        self, dtype: str, bucket_bytes: int, *, whole: bool = False
    ) -> Iterator[WeightBucket]:
        """The plan, packed, one bucket after the other (rank 0; other ranks take part and yield
        nothing)."""
        from rayhf.weights.buckets import pack_bucket

        plan, target = self.plan(dtype, bucket_bytes, whole=whole)
        for tensors in gathered(plan, sharded=self.stage == 3, rank=self.rank):
            if tensors:
                yield pack_bucket(tensors, target)

    def publish(
        self, version: int, dtype: str, bucket_bytes: int, *, whole: bool = False
    ) -> tuple[list[WeightBucket], Probe]:
        """The weights as version `version` of the policy: buckets (empty but on rank 0) and a probe
        to check them by.

        `whole`: LoRA merged, for those who do not have the base.

        Raises NumericalError where the policy does not give finite log-probs.
        """
        probe = self.probe()
        return list(self.buckets(dtype, bucket_bytes, whole=whole)), probe

    def export(self, directory: Path) -> None:
        """A Hugging Face model directory in the learner's dtype, LoRA merged. All ranks take part;
        rank 0 writes."""
        export_model(
            self.model, directory, source=self.source, sharded=self.stage == 3, rank=self.rank
        )
        self._barrier()

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self, directory: Path) -> None:
        """Masters, optimizer, schedule and random states, so that training continues bit by bit.
        All ranks write."""
        checkpoint.save(self.engine, directory, self._kind(), steps=self.steps)

    def load(self, directory: Path) -> None:
        """Continue from `save`, also with other ranks or another ZeRO stage; then to float32's
        rounding. All ranks take part.

        Raises CheckpointError where there is no checkpoint, or another kind of learner wrote it;
        nothing is changed then.
        """
        self.steps = checkpoint.load(self.engine, directory, self._kind())

    def sleep(self) -> None:
        """Leave the device to somebody else until `wake`; this rank's tensors wait in host
        memory."""
        self._residence.leave()

    def wake(self) -> None:
        """Continue as if nothing had been; nothing where it is awake."""
        self._residence.come_back()

    def _kind(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit, besides the names and shapes of the trained
        parameters."""
        return {"head": self.head, "lora": self.lora}

    def _barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group."""
        self.engine.destroy()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
