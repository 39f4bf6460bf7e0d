"""A model directory and a LearnerConfig to a DeepSpeed engine on this rank.

join the process group -> load the model (ZeRO-3: already sharded) -> LoRA, dropout off -> AdamW,
schedule -> deepspeed.initialize. Imported only where a learner runs.

Synchronization: joining waits for all ranks, at most collective_timeout_s.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from rayhf.config.schema import LearnerConfig, LoraConfig
from rayhf.errors import ConfigError, clean_line
from rayhf.learner.schedule import lr_factor
from rayhf.models.architectures import packing_of
from rayhf.models.forward import Head, PolicyHead, ScoreHead, ValueHead, prepare_config
from rayhf.models.peft import base_model, lora_targets
from rayhf.models.quantized import quantization_settings, use_exact_kernels
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA
from rayhf.weights.deepspeed_internals import (
    DeepSpeedEngine,
    set_default_timeout,
    skip_shm_build,
    whole_shape,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HeadName = Literal["policy", "value", "score"]
HEADS: dict[HeadName, type[Head]] = {"policy": PolicyHead, "value": ValueHead, "score": ScoreHead}
Settings = dict[str, Any]
"""A DeepSpeed configuration, or arguments of from_pretrained."""


def join_process_group(
    *, rank: int, world: int, master: tuple[str, int], device: torch.device, timeout_s: float
) -> None:
    """Join the other ranks, once per process; later collectives fail after `timeout_s`."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    local_rank = device.index or 0
    host, port = master
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    import deepspeed
    import transformers

    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSpeed still calls names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if torch.distributed.is_initialized():
        return
    if device.type == "cpu":
        skip_shm_build()
    else:
        torch.cuda.set_device(local_rank)  # it refuses "cuda" without an index
    set_default_timeout(timeout_s)
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def effective_stage(config: LearnerConfig) -> int:
    """Return the ZeRO stage that is used: at least 1 for bfloat16.

    DeepSpeed's stage 0 sums bfloat16 gradients in bfloat16; stage 1 is the lowest that sums them in
    float32.
    """
    return max(1, config.zero_stage) if config.dtype == "bfloat16" else config.zero_stage


def deepspeed_config(config: LearnerConfig, *, device: torch.device) -> Settings:
    """Return the engine's DeepSpeed configuration.

    gradient_accumulation_steps is 1 because the number of micro-batches varies: the engine marks
    the accumulation boundary itself.
    """
    stage = effective_stage(config)
    if config.offload and (device.type == "cpu" or stage == 0):
        raise ConfigError(
            "learner.offload moves optimizer states from the GPU and needs ZeRO: got device "
            f"{device.type}, zero_stage {stage}; set learner.offload=false, or cluster.device=gpu "
            "and learner.zero_stage=2"
        )
    gpu = device.type == "cuda"
    zero: Settings = {"stage": stage, "overlap_comm": gpu, "contiguous_gradients": gpu}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings: Settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without ZeRO the learner clips: DeepSpeed neither reports nor checks the norm there.
        "gradient_clipping": config.grad_clip if stage else 0.0,
        "steps_per_print": 1 << 62,
    }
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings | _passed_settings(config, zero)


def _passed_settings(config: LearnerConfig, zero: Settings) -> Settings:
    """Return the config's own DeepSpeed settings, those of ZeRO with ours.

    Raises ConfigError for a name or a value that DeepSpeed's ZeRO does not know.
    """
    if not config.deepspeed:
        return {}
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    passed: Settings = dict(config.deepspeed)
    merged = {**passed.get("zero_optimization", {}), **zero}
    try:
        DeepSpeedZeroConfig(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"learner.deepspeed.zero_optimization.{'.'.join(map(str, first['loc']))}: DeepSpeed "
            f"refuses {first['input']!r} ({clean_line(first['msg'])})"
        ) from None
    return {**passed, "zero_optimization": merged}


# ------------------------------------------------------------------------------------------ model


def load_model(
    path: Path,
    config: LearnerConfig,
    *,
    head: HeadName,
    head_size: int = 1,
    lora: LoraConfig | None,
    settings: Settings,
) -> Head:
    """Load the trainable model; `settings` are DeepSpeed's.

    A value head starts at zero, so that the first values are 0 for every token. A score head of
    `head_size` outputs is kept where `path` is a scorer already, and random otherwise.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    quantize = lora is not None and lora.quantize is not None
    if quantize and head != "policy":
        raise ConfigError(f"lora.quantize is for a policy, not for a {head} head; leave it out")
    sharded = settings["zero_optimization"]["stage"] == 3
    # While this object exists, from_pretrained shards each parameter as it is loaded (ZeRO-3).
    sharding = HfDeepSpeedConfig(dict(settings)) if sharded else None
    model_config = AutoConfig.from_pretrained(str(path), **AS_DATA)
    packing = packing_of(model_config.model_type, config)
    prepare_config(model_config, attention=config.attention, packing=packing)
    arguments: Settings = {
        "config": model_config,
        "dtype": getattr(torch, config.dtype),
    }
    model: nn.Module
    if head == "value":
        model = _load_critic(path, arguments, sharded=sharded)
    elif head == "score":
        model = _load_scorer(path, arguments, head_size=head_size, sharded=sharded)
    else:
        if quantize:
            arguments["quantization_config"] = quantization_settings(arguments["dtype"])
        model = AutoModelForCausalLM.from_pretrained(str(path), **WEIGHTS_AS_DATA, **arguments)
        use_exact_kernels(model)
    if sharded:
        _rebuild_rotary(model)
    del sharding
    if lora is not None:
        model = _with_lora(model, lora)
    if config.activation_checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    return HEADS[head](model, packing)


def _load_critic(path: Path, arguments: Settings, *, sharded: bool) -> PreTrainedModel:
    """Load a token classifier whose one output starts at zero."""
    import deepspeed
    from transformers import AutoModelForTokenClassification

    model_config: PreTrainedConfig = arguments["config"]
    model_config.num_labels = 1
    model_config.classifier_dropout = 0.0
    model = AutoModelForTokenClassification.from_pretrained(
        str(path), **WEIGHTS_AS_DATA, **arguments
    )
    parameters = list(model.score.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded):
        for parameter in parameters:
            nn.init.zeros_(parameter)
    return model


def _load_scorer(
    path: Path, arguments: Settings, *, head_size: int, sharded: bool
) -> PreTrainedModel:
    """Load a sequence classifier of `head_size` outputs.

    Raises ConfigError where the directory's model has another head.
    """
    import deepspeed
    from transformers import AutoModelForSequenceClassification

    model_config: PreTrainedConfig = arguments["config"]
    has_head = any(
        name.endswith("ForSequenceClassification") for name in model_config.architectures or ()
    )
    if has_head and model_config.num_labels != head_size:
        raise ConfigError(
            f"model: {path} is a scorer with {model_config.num_labels} outputs, the objective "
            f"needs {head_size}; start from a language model"
        )
    model_config.num_labels = head_size
    model = AutoModelForSequenceClassification.from_pretrained(
        str(path), **WEIGHTS_AS_DATA, **arguments
    )
    if not hasattr(model, "score"):
        raise ConfigError(
            f"model: {type(model).__name__} does not read a linear `score` at the last token; "
            "expected a decoder such as qwen2, qwen3, llama or mistral"
        )
    if not has_head:
        weight = model.score.weight
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=sharded):
            # A single output starts near 0, where no completion and no position is preferred. A
            # product of embeddings would have no gradient there: several outputs start with unit
            # variance (for hidden states as a final norm scales them).
            scale = 0.1 if head_size == 1 else 1.0
            nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[-1]))
    return model


def _rebuild_rotary(model: nn.Module) -> None:
    """Recompute rotary frequencies in float32, which positions need to be right.

    Sharded loading creates every float tensor in the training dtype.
    """
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            fresh = type(module)(config=module.config)
            for name, buffer in fresh.named_buffers(recurse=False, remove_duplicate=False):
                setattr(module, name, buffer)


def _with_lora(model: nn.Module, lora: LoraConfig) -> nn.Module:
    import peft
    from peft.tuners.lora.layer import ParamWrapper

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora_targets(model, lora),
        exclude_modules=["score"],
    )
    # Adapters in the model's own dtype: ZeRO-3 shards one dtype only, and DeepSpeed keeps float32
    # masters anyway.
    wrapped: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    if any(isinstance(module, ParamWrapper) for module in wrapped.modules()):
        raise ConfigError(
            f"policy.lora.target_modules: {', '.join(lora.target_modules)} names layers of the "
            "experts, which transformers holds as one tensor and whose adapters no engine reads; "
            "expected all-linear or layers of the attention"
        )
    score = getattr(model, "score", None)
    if score is not None:
        # A value or score head is new, so it is trained itself rather than adapted.
        score.requires_grad_(True)
    return wrapped


# ----------------------------------------------------------------------------------------- engine


def start_engine(
    model: Head, config: LearnerConfig, *, settings: Settings, lr: float, total_steps: int
) -> DeepSpeedEngine:
    """Build optimizer, schedule and DeepSpeed engine around the model."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        _optimizer_groups(trainable, config.weight_decay),
        lr=lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    factor = partial(
        lr_factor,
        total_steps=total_steps,
        warmup=config.warmup,
        kind=config.schedule,
        min_lr=config.min_lr,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    numel = sum(math.prod(whole_shape(p)) for p in trainable)
    zero = {**settings["zero_optimization"], "reduce_bucket_size": min(numel, 500_000_000)}
    return _initialize(
        model,
        {**settings, "zero_optimization": zero},
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )


def start_frozen(model: Head, settings: Settings) -> DeepSpeedEngine:
    """Build a DeepSpeed engine around a model that is sharded by ZeRO-3 and not trained."""
    return _initialize(model.requires_grad_(False), settings)


def _initialize(model: Head, settings: Settings, **training: Any) -> DeepSpeedEngine:
    import deepspeed

    # 16-bit modes cast every buffer too, and rotary frequencies in 16 bits are wrong positions.
    buffers = {
        name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the bfloat16 optimizer prints its memory
        engine: DeepSpeedEngine
        engine, *_ = deepspeed.initialize(
            model=model, config=settings, dist_init_required=False, **training
        )
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(engine.module.get_submodule(owner), last, buffer.to(engine.device))
    return engine


def _optimizer_groups(
    trainable: list[nn.Parameter], weight_decay: float
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Exempt vectors (norms, biases) from weight decay."""
    if not weight_decay:
        return trainable
    matrices = [p for p in trainable if len(whole_shape(p)) > 1]
    vectors = [p for p in trainable if len(whole_shape(p)) <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # With adapters only there are no vectors, and DeepSpeed drops an empty group.
    return [group for group in groups if group["params"]]
