"""From a model directory and LearnerConfig to a DeepSpeed engine on this rank. Imported only where
a learner runs.

join the process group (waits for all ranks, at most collective_timeout_s) -> load the model
(ZeRO-3: already sharded) -> LoRA, dropout off -> AdamW, schedule -> deepspeed.initialize.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.errors import ConfigError
from rayhf.learner.forward import PolicyHead, ScoreHead, ValueHead, base_model, prepare_config
from rayhf.learner.schedule import lr_factor
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA

Head = Literal["policy", "value", "score"]
AnyHead = PolicyHead | ValueHead | ScoreHead


def join(
    *, rank: int, world: int, master: tuple[str, int], device: torch.device, timeout_s: float
) -> None:
    """Join the group of learner ranks; every later collective fails after `timeout_s` seconds. Once
    per process."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    local_rank = device.index or 0
    host, port = master
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    import deepspeed
    import torch.distributed.distributed_c10d as c10d
    import transformers

    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSpeed still calls names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if torch.distributed.is_initialized():
        return
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # else a C++ build of half a minute
        )
    else:
        torch.cuda.set_device(local_rank)  # it refuses "cuda" without an index
    # DeepSpeed hands its own timeout only to the world group; sub-groups take torch's default.
    timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def effective_stage(config: LearnerConfig) -> int:
    """DeepSpeed's stage 0 sums bfloat16 gradients in bfloat16; stage 1 is the least that sums them
    in float32."""
    return max(1, config.zero_stage) if config.dtype == "bfloat16" else config.zero_stage


def deepspeed_config(config: LearnerConfig, *, device: torch.device) -> dict[str, Any]:
    """The engine's settings. Micro-batches vary in number, so accumulation boundaries are set by
    hand and this says 1."""
    stage = effective_stage(config)
    if config.offload and (device.type == "cpu" or stage == 0):
        raise ConfigError(
            f"learner.offload moves optimizer states from the GPU and needs ZeRO: got device {device.type}, zero_stage "
            f"{stage}; set learner.offload=false, or cluster.device=gpu and learner.zero_stage=2"
        )
    gpu = device.type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": gpu, "contiguous_gradients": gpu}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without ZeRO the engine clips by itself: DeepSpeed neither reports nor checks the norm
        # there.
        "gradient_clipping": config.grad_clip if stage else 0.0,
        "steps_per_print": 1 << 62,
    }
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def load_model(
    path: Path,
    config: LearnerConfig,
    *,
    head: Head,
    head_size: int = 1,
    lora: LoraConfig | None,
    zero: Mapping[str, Any],
) -> AnyHead:
    """The trainable model; `head_size` is a score head's number of outputs.

    A value head starts at zero, so that the first values are 0 for every token. A score head is
    kept where `path` is a scorer already, and random otherwise.
    """
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
    from transformers.integrations import HfDeepSpeedConfig

    # Alive while loading: from_pretrained then shards each parameter as it comes (ZeRO-3).
    sharding = HfDeepSpeedConfig(dict(zero)) if zero["zero_optimization"]["stage"] == 3 else None
    model_config = AutoConfig.from_pretrained(str(path), **AS_DATA)
    prepare_config(model_config, attention=config.attention)
    kwargs: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        **WEIGHTS_AS_DATA,
        "attn_implementation": config.attention,
    }
    if head == "value":
        model_config.num_labels, model_config.classifier_dropout = 1, 0.0
        model = AutoModelForTokenClassification.from_pretrained(
            str(path), config=model_config, **kwargs
        )
        with deepspeed.zero.GatheredParameters(
            list(model.score.parameters()), modifier_rank=0, enabled=sharding is not None
        ):
            for parameter in model.score.parameters():
                nn.init.zeros_(parameter)
    elif head == "score":
        model = _load_scorer(
            path, model_config, head_size=head_size, sharded=sharding is not None, **kwargs
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(str(path), config=model_config, **kwargs)
    if sharding is not None:
        _rebuild_rotary(model)
    del sharding
    if lora is not None:
        model = _with_lora(model, lora)
    if config.activation_checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    heads: dict[Head, type[AnyHead]] = {
        "policy": PolicyHead,
        "value": ValueHead,
        "score": ScoreHead,
    }
    return heads[head](model)


def _load_scorer(
    path: Path, model_config: Any, *, head_size: int, sharded: bool, **kwargs: Any
) -> Any:
    """A sequence classifier of `head_size` outputs. Raises ConfigError where the model has another
    head than that."""
    import deepspeed
    from transformers import AutoModelForSequenceClassification

    fresh = not any(
        name.endswith("ForSequenceClassification") for name in model_config.architectures or ()
    )
    if not fresh and model_config.num_labels != head_size:
        raise ConfigError(
            f"model: {path} is a scorer with {model_config.num_labels} outputs, the objective needs {head_size}; "
            "start from a language model"
        )
    model_config.num_labels = head_size
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(path), config=model_config, **kwargs
    )
    if not hasattr(model, "score"):
        raise ConfigError(
            f"model: {type(model).__name__} does not read a linear `score` at the last token; expected a decoder such as "
            "qwen2, qwen3, llama or mistral"
        )
    if fresh:
        with deepspeed.zero.GatheredParameters(
            [model.score.weight], modifier_rank=0, enabled=sharded
        ):
            # Ours. A single output starts near 0, where no answer and no place is preferred. A
            # product of embeddings would have no gradient there: several outputs start with unit
            # variance (for hidden states as a final norm leaves them).
            scale = 0.1 if head_size == 1 else 1.0
            nn.init.normal_(model.score.weight, std=scale / math.sqrt(model.score.weight.shape[-1]))
    return model


def _rebuild_rotary(model: nn.Module) -> None:
    """Sharded loading makes every float tensor in the training dtype; rotary frequencies must be
    float32 to be right."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            fresh = type(module)(config=module.config)
            module._buffers.update(fresh._buffers)


def _with_lora(model: nn.Module, lora: LoraConfig) -> nn.Module:
    import peft

    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=["score"],
    )
    # Adapters in the model's own dtype: ZeRO-3 shards one dtype only, and DeepSpeed keeps float32
    # masters anyway.
    wrapped: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    score = getattr(model, "score", None)
    if score is not None:
        score.requires_grad_(
            True
        )  # a value or score head has nothing to adapt: it is trained as it is
    return wrapped


def start_engine(
    model: AnyHead,
    config: LearnerConfig,
    *,
    settings: Mapping[str, Any],
    lr: float,
    total_steps: int,
) -> Any:
    """Optimizer, schedule and DeepSpeed engine around the model."""
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups: Any = trainable
    if config.weight_decay:
        decays: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [
            group for group in decays if group["params"]
        ]  # adapters have no vectors, and DeepSpeed drops an empty group
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    factor = partial(
        lr_factor,
        total_steps=total_steps,
        warmup=config.warmup,
        kind=config.schedule,
        min_lr=config.min_lr,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in trainable)
    settings = dict(settings)
    settings["zero_optimization"] = {
        **settings["zero_optimization"],
        "reduce_bucket_size": min(numel, 500_000_000),
    }
    # bfloat16 mode casts every buffer too, and rotary frequencies in bfloat16 are wrong positions.
    buffers = {
        name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # DeepSpeed's bfloat16 optimizer prints its memory
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=settings,
            dist_init_required=False,
        )
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        engine.module.get_submodule(owner)._buffers[last] = buffer.to(engine.device)
    return engine
