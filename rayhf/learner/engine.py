"""One rank of the learner: a DeepSpeed engine that knows neither algorithms nor Ray.

In: the micro-batches of Examples that `packing.plan_micro_batches` gave this rank, the counts of
the whole step, a loss. Out: metrics of the whole step, outputs per token, weights, checkpoints.

Synchronization: all ranks call every method together. Within `step` they synchronize in each
micro-batch's backward (ZeRO), in the gradient norm, and once more to sum up metrics. Each of these
waits ends after learner.collective_timeout_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.errors import ConfigError, NumericalError
from rayhf.learner import checkpoint
from rayhf.learner.build import (
    HeadName,
    deepspeed_config,
    effective_stage,
    join_process_group,
    load_model,
    start_engine,
)
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.learner.offload import Offloader
from rayhf.learner.outgoing import OutgoingWeights
from rayhf.learner.rank import RankEngine
from rayhf.losses.base import Loss, Totals
from rayhf.models.peft import base_model
from rayhf.types import Example, Probe, WeightBucket, derive_seed, given_row
from rayhf.weights.buckets import Buffers, Payload, pack_buckets
from rayhf.weights.deepspeed_internals import step_was_skipped
from rayhf.weights.export import (
    Weight,
    all_weights,
    export_model,
    split_into_buckets,
    trained_weights,
)

PROBE_TOKENS = 64


class LearnerEngine(RankEngine):
    """A policy, a critic or a scorer on one rank of `world`.

    Args:
        model: Hugging Face model directory to start from.
        config: settings of the section `learner`.
        head: what the model returns; "score" is for rows of models.forward.scored_row.
        head_size: outputs of a "score" head.
        lr: peak of the learning-rate schedule.
        total_steps: length of the schedule in optimizer steps.
        lora: train adapters instead of the whole model.
        rank, world, master: this rank, the number of ranks, host and port of rank 0.
        device: "cpu" or "cuda[:index]".
        seed: the campaign's.

    Raises ConfigError for a model or a setting that cannot be trained.
    """

    def __init__(
        self,
        model: Path,
        config: LearnerConfig,
        *,
        head: HeadName = "policy",
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
        self.source = model
        self.config = config
        self.token_budget = config.token_budget
        self.head = head
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.stage = effective_stage(config)
        self.lora = lora is not None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        join_process_group(
            rank=rank,
            world=world,
            master=master,
            device=self.device,
            timeout_s=config.collective_timeout_s,
        )
        settings = deepspeed_config(config, device=self.device)
        torch.manual_seed(derive_seed(seed, "learner", head))
        loaded = load_model(
            model, config, head=head, head_size=head_size, lora=lora, settings=settings
        )
        self.engine = start_engine(
            loaded, config, settings=settings, lr=lr, total_steps=total_steps
        )
        self.model = loaded.model
        self.packing = loaded.packing
        self.steps = 0
        self._offloader = Offloader(self.engine)
        self._bucket_buffers = Buffers()
        self.outgoing = OutgoingWeights(
            loaded.model,
            config,
            seed=seed,
            sharded=self.stage == 3,
            is_measured=head == "policy" and not self.lora,
        )
        torch.manual_seed(derive_seed(seed, "learner", head, rank))

    # ----------------------------------------------------------------------------------- training

    def step(
        self, micros: Sequence[Sequence[Example]], totals: Totals, loss: Loss, temperature: float
    ) -> dict[str, float]:
        """Take one optimizer step over all micro-batches of all ranks.

        Every rank brings the same number of micro-batches. Returns the loss's metrics over the
        whole step, and learner/loss, learner/grad_norm (before clipping), learner/lr,
        learner/tokens_fed. Raises NumericalError on every rank where a loss or the gradient is not
        finite; the weights are then unchanged.
        """
        if not micros:
            raise ConfigError("a learner step without micro-batches; expected at least one example")
        self.engine.train()
        lr = self.engine.get_lr()[0]
        parts: list[dict[str, Tensor]] = []
        most = self._most([_response_tokens(examples) for examples in micros])
        for number, examples in enumerate(micros, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micros))
            value, metrics = self._forward(examples, totals, loss, temperature, most[number - 1])
            # DeepSpeed averages over ranks; losses are shares of a sum, hence `world`. A loss that
            # is not finite makes its gradient NaN, and so the reduced norm of every rank: all of
            # them notice without one more collective.
            poison = torch.where(value.detach().isfinite(), 1.0, torch.nan)
            self.engine.backward(value * (poison * self.world))
            parts.append({**metrics, "learner/loss": value.detach()})
        norm = self._update()
        result = self._reduce(parts)
        if not (math.isfinite(norm) and math.isfinite(result["learner/loss"])):
            raise NumericalError(
                f"{self.head}: learner/loss is {result['learner/loss']}, the gradient norm is "
                f"{norm} at optimizer step {self.steps}; expected finite values, the weights were "
                "not changed"
            )
        self.steps += 1
        return {**result, "learner/grad_norm": norm, "learner/lr": lr}

    def _forward(
        self,
        examples: Sequence[Example],
        totals: Totals,
        loss: Loss,
        temperature: float,
        most: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the loss, and its metrics.

        An empty micro-batch runs the model too, because its collectives need every rank. `most`:
        largest number of response tokens of any rank.
        """
        rows = [row for example in examples for row in example.rows]
        inputs = self._inputs(rows, most)
        if not examples:
            output_T, _ = self.engine(inputs, temperature)
            return output_T.sum() * 0.0, {}
        micro = build_micro_batch(examples, totals, self.device)
        output_T, entropy_T = self.engine(inputs, temperature, loss.entropy)
        if entropy_T is not None:
            micro = replace(micro, entropy_T=entropy_T)
        if inputs.top_TK is not None:
            micro = replace(micro, top_TK=output_T[:, 1:])
            output_T = output_T[:, 0]
        result = loss(output_T, micro)
        fed = torch.tensor(float(inputs.fed), device=self.device)
        return result.loss, {**result.metrics, "learner/tokens_fed": fed}

    def _update(self) -> float:
        """Clip and step, unless the gradient norm is not finite.

        Returns the norm before clipping, the same on every rank.
        """
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
        self.engine.step()
        if step_was_skipped(self.engine):
            return math.nan
        norm_before_clipping = self.engine.get_global_grad_norm()
        assert norm_before_clipping is not None
        return float(norm_before_clipping)

    def _reduce(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Sum metrics over micro-batches and ranks; those ending in `_max` take the maximum.

        A rank may lack metrics that others have.
        """
        names = [(name, value.detach().float()) for part in parts for name, value in part.items()]
        values = torch.stack([value for _, value in names]).tolist()  # one transfer from the device
        entries = [(name, value) for (name, _), value in zip(names, values, strict=True)]
        by_rank: list[list[tuple[str, float]]] = [entries]
        if self.world > 1:
            by_rank = [[] for _ in range(self.world)]
            torch.distributed.all_gather_object(by_rank, entries)
        total: dict[str, float] = {}
        for name, value in (entry for rank_entries in by_rank for entry in rank_entries):
            if name.endswith("_max"):
                total[name] = max(total.get(name, -math.inf), value)
            else:
                total[name] = total.get(name, 0.0) + value
        return total

    # --------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def probe(self) -> Probe:
        """Return the log-probs of a fixed token sequence at temperature 1. All ranks take part.

        Computed by the training model itself (LoRA unmerged), independently of how weights are
        packed and sent, so that an engine that agrees has received the policy in training.
        """
        vocabulary = base_model(self.model).config.get_text_config().vocab_size
        ids = tuple((7919 * i + 104729) % vocabulary for i in range(PROBE_TOKENS))
        row = given_row("probe", ids[:1], ids[1:])
        logprobs = tuple(self._evaluate(self._inputs([row]), 1.0).tolist())
        if not all(map(math.isfinite, logprobs)):
            raise NumericalError(
                f"the policy's weights after optimizer step {self.steps} give log-probs that are "
                "not finite"
            )
        return Probe(token_ids=ids, logprobs=logprobs)

    # ------------------------------------------------------------------------------------ weights

    def plan_buckets(
        self, dtype: str, bucket_bytes: int, *, whole: bool = False
    ) -> tuple[list[list[Weight]], torch.dtype]:
        """Return the weights to send, split into buckets, and their dtype; gathers nothing.

        All weights in `dtype`. With LoRA, unless `whole`, only the trained tensors in the learner's
        dtype: the receiver merges them before it rounds.
        """
        adapters_only = self.lora and not whole
        target: torch.dtype = getattr(torch, self.config.dtype if adapters_only else dtype)
        weights = trained_weights(self.model) if adapters_only else all_weights(self.model)
        buckets = split_into_buckets(weights, limit_bytes=bucket_bytes, itemsize=target.itemsize)
        return buckets, target

    def buckets(
        self,
        dtype: str,
        bucket_bytes: int,
        *,
        whole: bool = False,
        version: int = 0,
        store: Callable[[Payload], Any] = np.copy,
    ) -> Iterator[WeightBucket]:
        """Yield the planned buckets, packed. All ranks take part, only rank 0 yields.

        `store` returns a bucket's payload for its bytes, which are valid during the call only.
        """
        plan, target = self.plan_buckets(dtype, bucket_bytes, whole=whole)
        gathered = self.outgoing.gather(plan, target, version=version, rank=self.rank)
        return pack_buckets(
            filter(None, gathered), target, store=store, buffers=self._bucket_buffers
        )

    def publish(
        self, dtype: str, bucket_bytes: int, *, whole: bool = False, version: int = 0
    ) -> tuple[list[WeightBucket], Probe]:
        """Return the policy's weights as buckets (on rank 0 only), and a probe to check them by.

        `whole`: LoRA merged, for receivers that lack the base model. Raises NumericalError where
        the policy's log-probs are not finite.
        """
        probe = self.probe()
        return list(self.buckets(dtype, bucket_bytes, whole=whole, version=version)), probe

    def export(self, directory: Path) -> None:
        """Write a Hugging Face model directory in the learner's dtype, LoRA merged.

        All ranks take part; rank 0 writes.
        """
        export_model(
            self.model, directory, source=self.source, sharded=self.stage == 3, rank=self.rank
        )
        self._barrier()

    # -------------------------------------------------------------------------------- checkpoints

    def save(self, directory: Path) -> None:
        """Save masters, optimizer, schedule and random states. All ranks write.

        Training continues bit by bit from them.
        """
        checkpoint.save(self.engine, directory, self.identity(), steps=self.steps)

    def load(self, directory: Path) -> None:
        """Continue from `save`. All ranks take part.

        With another number of ranks or another ZeRO stage the continuation is equal up to float32
        rounding. Raises CheckpointError where there is no checkpoint, or another kind of learner
        wrote it; nothing is changed then.
        """
        self.steps = checkpoint.load(self.engine, directory, self.identity())

    def identity(self) -> checkpoint.Identity:
        """Return what must be equal for a checkpoint to fit, besides the trained parameters."""
        return {"head": self.head, "lora": self.lora}

    # ------------------------------------------------------------------------------------- device

    def sleep(self) -> None:
        """Free the device's memory until `wake`; this rank's tensors move to host memory."""
        self._offloader.offload()

    def wake(self) -> None:
        """Move the tensors back to the device; does nothing where they are there."""
        self._offloader.reload()

    def _barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group."""
        self.engine.destroy()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _response_tokens(examples: Sequence[Example]) -> int:
    return sum(len(row.response_ids) for example in examples for row in example.rows)
